"""GGUF files that llama.cpp, LM Studio and Ollama load, and that compute what the model computes."""

import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

from gguf import size_label
from torch import Tensor, nn

from llmforge.convert.base import Family
from llmforge.convert.load import source
from llmforge.convert.published import ExportReport, Published, prepare
from llmforge.errors import ConvertError
from llmforge.formats.gguf import GGUFTensor, write_gguf
from llmforge.formats.lazy import LazyTensor
from llmforge.tokenizers import Tokenizer

# Name -> general.file_type, llama.cpp's llama_ftype.
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}

# Largest value of each type; the scale of a Q8_0 block is a float16.
_LARGEST = {"F16": 65_504.0, "Q8_0": 127 * 65_504.0}


def export_gguf(
    model_or_folder: nn.Module | Published | str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    path: str | os.PathLike[str],
    *,
    file_type: str = "F16",
    name: str | None = None,
) -> ExportReport:
    """Write a GGUF file.

    Args:
        model_or_folder: a model of a known family, which is not changed; or what `load` accepts, or `open_model` gives: that is not
            loaded, but goes from file to file one tensor at a time.
        tokenizer: that of the model; None = the one in the folder.
        file_type: type of the matrices: "F32", "F16", "BF16" or "Q8_0". Norms, biases and positions are F32 always, and rows that
            are no multiple of 32 are F16 instead of Q8_0.
        name: how programs show the model; None = the file's name.
    Raises:
        ConvertError: the model, the tokenizer or the file type cannot be expressed.
        WriteError: the file cannot be written.
    """
    path = Path(path)
    if file_type not in FILE_TYPES:
        raise ConvertError(f"file_type ({file_type!r}) must be one of {', '.join(FILE_TYPES)}")
    published, tokenizer = source(model_or_folder, tokenizer)
    if tokenizer is None:
        raise ConvertError("a GGUF file contains the tokenizer; give the one that the model was trained with")
    vocabulary = tokenizer.gguf_vocabulary()
    published = prepare(published, tokenizer)
    family = published.family
    config, tensors, notes = family.to_gguf(published.config, published.tensors)

    described = [_describe(family, own_name, tensor, file_type) for own_name, tensor in tensors.items()]
    types = Counter(tensor.type_name for tensor in described)
    if file_type == "Q8_0" and types["F16"]:
        notes.append(f"{types['F16']} tensors are F16: their rows are not a multiple of 32, as Q8_0 needs")
    arch, n_params = family.gguf_arch, published.num_params
    fields = {key: getattr(config, field) for key, (field, _) in family.gguf_fields.items()}
    metadata = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.size_label": size_label(n_params, n_params, 0, 0),
        "general.file_type": FILE_TYPES[file_type],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in {**fields, **family.gguf_metadata(config)}.items()},
        **vocabulary.metadata(rows=config.vocab_size),
    }
    write_gguf(path, arch, metadata, described)
    return ExportReport(path, path.stat().st_size, file_type, types, published.notes + notes)


def _describe(family: Family, own_name: str, tensor: LazyTensor, file_type: str) -> GGUFTensor:
    name, type_name = family.gguf_name(own_name), file_type
    if len(tensor.shape) == 1 or name in family.gguf_float32:  # other types load and then abort in the first decode
        type_name = "F32"
    elif file_type == "Q8_0" and tensor.shape[-1] % 32:
        type_name = "F16"
    if type_name in _LARGEST:
        tensor = tensor.then(partial(_small_enough, own_name, type_name))
    return GGUFTensor(name, type_name, tensor)


def _small_enough(own_name: str, type_name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "meta":
        low, high = tensor.aminmax()
        if (largest := max(-low.item(), high.item())) > _LARGEST.get(type_name, math.inf):
            raise ConvertError(
                f"{own_name} has a value of {largest:.3g}, too large for {type_name}; export BF16 or F32"
            )
    return tensor
