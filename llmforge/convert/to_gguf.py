"""GGUF files that llama.cpp, LM Studio and Ollama load, and that compute what the model computes."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf import size_label
from torch import nn

from llmforge.convert.base import Family
from llmforge.convert.imatrix import Importance
from llmforge.convert.load import source
from llmforge.convert.mixture import FILE_TYPES, Mixture, choose_types
from llmforge.convert.published import ExportReport, Published, check_not_its_own, inputs_of, prepare, publish
from llmforge.errors import ConvertError, some
from llmforge.formats.gguf import GGUFTensor, write_gguf
from llmforge.nn.rounded import rounded_weights
from llmforge.tokenizers import Tokenizer


def export_gguf(
    model_or_folder: nn.Module | Published | str | os.PathLike[str],
    tokenizer: Tokenizer | None,
    path: str | os.PathLike[str],
    *,
    file_type: str = "F16",
    tensor_types: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write a GGUF file.

    It appears when it is complete. Where the process is killed, the next one with the same model from disk, options and file goes on
    with the tensors that are written, which are in `.part-<file>` beside it until then.

    Args:
        model_or_folder: a model of a known family, which is not changed; or what `load` accepts, or `open_model` gives: that is not
            loaded, but goes from file to file one tensor at a time.
        tokenizer: that of the model; None = the one in the folder.
        file_type: "F32", "F16", "BF16", "Q8_0", "Q4_K_M" ... (`mixture.FILE_TYPES`), with the types that llama.cpp's quantize
            gives each tensor. Norms, biases and positions are F32 always; rows that do not fit a type's blocks get another one,
            which the report's notes say.
        tensor_types: pattern -> type, for tensors whose GGUF name contains that regular expression: {"attn_v": "Q8_0"}.
        importance: how much each input of each matrix matters, from `collect_imatrix` or `read_imatrix`; None = all alike.
        name: how programs show the model; None = the file's name.
        progress: called with the number of weights that are written, and of all.
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
    check_not_its_own(published, path)
    vocabulary = tokenizer.gguf_vocabulary()
    published = prepare(published, tokenizer)
    family = published.family
    config, tensors, notes = family.to_gguf(published.config, published.tensors)
    tensors = {family.gguf_name(own_name): tensor for own_name, tensor in tensors.items()}

    arch, n_params = family.gguf_arch, published.num_params
    metadata = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.size_label": size_label(n_params, n_params, 0, 0),
        "general.file_type": FILE_TYPES[file_type][0],
        "general.quantization_version": 2,
        **gguf_metadata(published.family, config),
        **vocabulary.metadata(rows=config.vocab_size),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    own_types = {
        f"^{re.escape(name)}$": given for name, given in family.gguf_types(published.config, file_type).items()
    }
    mixture = choose_types(
        file_type,
        {"general.architecture": arch, **metadata},
        shapes,
        tensor_types={**(tensor_types or {}), **own_types},  # the first that fits counts
        has_importance=importance is not None,
    )
    notes += (
        family.gguf_notes(published.config, file_type)
        + mixture.notes()
        + _not_as_trained(model_or_folder, family, mixture, importance)
    )
    weights = importance.fitting(shapes) if importance is not None else {}
    notes += importance.notes(mixture.types) if importance is not None else []
    described = [
        GGUFTensor(name, mixture.types.get(name, "F32"), tensor, weights.get(name)) for name, tensor in tensors.items()
    ]
    # What else the bytes depend on, the vocabulary and the types, is in the header.
    digest = importance.digest() if importance is not None else None
    inputs = inputs_of(published, file_type=file_type, importance=digest)
    write_gguf(path, arch, metadata, described, progress=progress, inputs=inputs)
    types = Counter(tensor.type_name for tensor in described)
    return ExportReport(path, path.stat().st_size, file_type, types, published.notes + notes, n_params)


def _not_as_trained(model: object, family: Family, mixture: Mixture, importance: Importance | None) -> list[str]:
    """Whether a model that trains with rounded weights is written with other ones."""
    trained = rounded_weights(model) if isinstance(model, nn.Module) else {}
    other = [name for name, given in trained.items() if mixture.types.get(family.gguf_name(name)) != given]
    if trained and (other or importance is not None):
        how = f"another type: {some(other)}" if other else "an importance matrix, and it did not train with one"
        return [f"the model trains with rounded weights, but the file rounds with {how}"]
    return []


def gguf_metadata(family: Family, config: Any) -> dict[str, Any]:
    """The sizes and settings of a model, as a file's metadata names them."""
    fields = {key: getattr(config, field) for key, (field, _) in family.gguf_fields.items()}
    return {f"{family.gguf_arch}.{key}": value for key, value in {**fields, **family.gguf_metadata(config)}.items()}


def model_types(model: nn.Module, file_type: str, **options: Any) -> Mixture:
    """The types that `export_gguf` gives a model's tensors, under the model's own names; options as of `choose_types`."""
    published = publish(model)
    family = published.family
    config, tensors, _ = family.to_gguf(*family.complete(published.config, published.tensors))
    names = {family.gguf_name(own_name): own_name for own_name in tensors}
    metadata = {"general.architecture": family.gguf_arch, **gguf_metadata(family, config)}
    shapes = {name: tensors[own_name].shape for name, own_name in names.items()}
    mixture = choose_types(file_type, metadata, shapes, **options)
    return replace(mixture, types={names[name]: given for name, given in mixture.types.items()})
