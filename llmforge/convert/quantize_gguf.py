"""A GGUF file in another type, straight from file to file: any architecture whose mixtures are known, metadata as it is."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from llmforge.convert.imatrix import Importance
from llmforge.convert.mixture import FILE_TYPES, choose_types
from llmforge.convert.published import ExportReport, inputs_of_files
from llmforge.errors import CheckpointError, ConvertError, shown
from llmforge.formats.gguf import GGUFTensor, read_gguf_bytes, read_gguf_header, read_gguf_tensors, write_gguf
from llmforge.quant.ggml import FLOATS

# Of the file as it was, not of the one that is written.
_REPLACED = {"general.architecture", "general.alignment", "general.file_type", "general.quantization_version"}
_REPLACED |= {"split.no", "split.count", "split.tensors.count"}


def quantize_gguf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    file_type: str,
    tensor_types: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    requantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a GGUF file's weights in another type: the bytes that llama.cpp's quantize writes.

    Args:
        source: a .gguf of floats, best F32 or BF16.
        path: the file to write; not the source.
        file_type, tensor_types, importance, progress: as of `export_gguf`.
        requantize: allow tensors that are quantized already, whose errors add up.
    Raises:
        CheckpointError: the source is missing or damaged.
        ConvertError: a type or an architecture that is not known, an importance of another model, tensors that are quantized.
        WriteError: the file cannot be written.
    """
    source, path = Path(source), Path(path)
    header = read_gguf_header(source, exact_text=True)
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise CheckpointError(f"{source} does not say its architecture (general.architecture is {shown(arch)})")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise ConvertError(f"{source} is one of several parts; join them first with llama.cpp's gguf-split --merge")
    if path.exists() and path.samefile(source):
        raise ConvertError(f"{path} is the source itself; name another file")
    shapes = {info.name: info.shape for info in header.tensors}
    mixture = choose_types(
        file_type, header.metadata, shapes, tensor_types=tensor_types, has_importance=importance is not None
    )
    weights = importance.fitting(shapes) if importance is not None else {}
    notes = importance.notes(mixture.types) if importance is not None else []
    values = read_gguf_tensors(source, header)
    tensors = []
    for info in header.tensors:
        given = mixture.types.get(info.name, info.type_name)
        if given == info.type_name:
            tensors.append(GGUFTensor(info.name, given, read_gguf_bytes(source, info)))
            continue
        if info.type_name not in FLOATS and not requantize:
            raise ConvertError(
                f"{source} has {info.name} in {info.type_name} already: quantizing it again adds to its errors; take a file "
                "of F32, BF16 or F16, or allow it (--requantize)"
            )
        tensors.append(GGUFTensor(info.name, given, values[info.name], weights.get(info.name)))
    metadata = {key: value for key, value in header.metadata.items() if key not in _REPLACED and value != []}
    empty = [key for key, value in header.metadata.items() if value == []]
    metadata |= {"general.file_type": FILE_TYPES[file_type][0], "general.quantization_version": 2}
    types = {key: kind for key, kind in header.types.items() if key not in _REPLACED}
    digest = importance.digest() if importance is not None else None
    inputs = inputs_of_files([source], file_type=file_type, importance=digest)
    write_gguf(path, arch, metadata, tensors, types=types, progress=progress, inputs=inputs)
    notes += [f"empty metadata left out: {', '.join(empty)}"] if empty else []
    counted = Counter(tensor.type_name for tensor in tensors)
    n_params = sum(math.prod(shape) for shape in shapes.values())
    return ExportReport(path, path.stat().st_size, file_type, counted, notes + mixture.notes(), n_params)
