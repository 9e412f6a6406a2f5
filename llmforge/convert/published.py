"""From our model to what its family publishes, and back: every tensor accounted for, by name and shape."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmforge.config import read_json_object
from llmforge.convert.base import Family, Tensors
from llmforge.convert.gpt2 import GPT2
from llmforge.errors import CheckpointError, ConfigError, ConvertError
from llmforge.models import LanguageModel
from llmforge.tokenizers import Tokenizer

FAMILIES: list[Family] = [GPT2()]


@dataclass(frozen=True)
class ExportReport:
    """What an exporter wrote."""

    path: Path
    bytes: int
    file_type: str  # "F16", "Q8_0" ... of a GGUF; "float32" ... of a Hugging Face folder
    tensors: Counter[str]  # how many tensors of each type
    notes: list[str] = field(default_factory=list)  # what differs from the model as it was trained, and why


@dataclass(frozen=True)
class Published:
    """A model as its family's files hold it."""

    family: Family
    config: Any
    tensors: Tensors
    notes: list[str]


def publish(model: nn.Module, tokenizer: Tokenizer | None) -> Published:
    """Account for every tensor of a model and fit its vocabulary to the tokenizer's; the model stays as it is.

    Raises:
        ConvertError: an unknown kind of model, a tensor too many or too few, NaN, or a tokenizer of another vocabulary.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile(model) is a wrapper
    family = next((family for family in FAMILIES if type(model) is family.model_class), None)
    if family is None:
        known = ", ".join(family.model_class.__name__ for family in FAMILIES)
        raise ConvertError(
            f"{type(model).__name__} is no model that other programs know ({known}); if it computes the same as one of them, "
            "load its state_dict() into that one and export it"
        )
    config: Any = model.config
    with torch.device("meta"):
        blueprint = family.model_class(config)
    state = dict(model.state_dict())
    _compare(
        {name: tuple(tensor.shape) for name, tensor in blueprint.state_dict().items()},
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        ConvertError(f"the model is not a plain {family.model_class.__name__} of its config"),
    )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ConvertError(f"{name} holds NaN or infinity: the training diverged; export an earlier checkpoint")
    _drop_shared_(state, blueprint, ConvertError("the model does not fit its config"))
    config, tensors = family.complete(config, state)
    notes: list[str] = []
    if tokenizer is not None:
        config, tensors = _fit_vocabulary(family, config, tensors, tokenizer, notes)
    return Published(family, config, tensors, notes)


def assemble(
    family: Family, config: Any, tensors: Mapping[str, Tensor], source: Path, dtype: torch.dtype
) -> LanguageModel:
    """Build the model of `config` from exactly these tensors, copied and converted to `dtype`.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape; all are named.
    """
    n_layers = getattr(config, family.layers_field)
    if n_layers > len(tensors):  # before a model of a million layers is built
        raise CheckpointError(f"{source} has {len(tensors)} tensors, too few for {n_layers} layers")
    try:
        with torch.device("meta"):
            model = family.model_class(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{source} has sizes that no model can have: {config}") from error
    tensors = dict(tensors)
    misfit = CheckpointError(f"{source} does not fit its config")
    _drop_shared_(tensors, model, misfit)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _compare(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, misfit)
    for names in _shared_names(model):
        tensor = tensors[names[0]]
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{names[0]} in {source} is {tensor.dtype}, not floats; quantized models cannot be read"
            )
        parameter = nn.Parameter(tensor.to(dtype, copy=True).contiguous())
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        return read_json_object(folder / "config.json")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter; more than one where it is shared."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _drop_shared_(tensors: Tensors, model: nn.Module, misfit: Exception) -> None:
    """Leave each shared tensor under its first name; what the model shares must be equal."""
    for first, *others in _shared_names(model):
        for name in others:
            if name in tensors and first in tensors and not torch.equal(tensors.pop(name), tensors[first]):
                raise type(misfit)(
                    f"{misfit}: {name} differs from {first}, but the config ties them (tie_word_embeddings)"
                )


def _compare(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], misfit: Exception) -> None:
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} is {found[name]}, must be {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(differences.values()):
        parts = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
        raise type(misfit)(f"{misfit}; {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _fit_vocabulary(
    family: Family, config: Any, tensors: Tensors, tokenizer: Tokenizer, notes: list[str]
) -> tuple[Any, Tensors]:
    rows, tokens = config.vocab_size, tokenizer.vocab_size
    if tokens == rows + 1 and tokenizer.eos_token_id == rows:
        notes.append(
            f"a row for <|endoftext|> (id {rows}) added, which the model never chooses: it was trained without"
        )
        return family.append_eos_row(config, tensors)
    # Embeddings are often padded to a multiple of 64 or 128 (nanoGPT: 50,304 rows for 50,257 tokens); more is another tokenizer.
    if not 0 <= rows - tokens < max(128, tokens // 50):
        raise ConvertError(
            f"the model has {rows:,} tokens and the tokenizer {tokens:,}; take the tokenizer that the model was trained with"
        )
    if rows > tokens:
        notes.append(f"{rows - tokens} of the model's {rows:,} rows stand for no token of the tokenizer")
    return config, tensors
