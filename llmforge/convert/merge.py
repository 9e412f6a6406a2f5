"""An adapter in the weights of its base, computed row by row as they are read: no model is in memory, and no matrix.

    merged rows = base rows + scale * B rows @ A                    (and with DoRA, each to its length)

The sum is float32 and rounded once, in the order in which peft's merge_and_unload rounds, so the bytes are the same. Under QLoRA the
adapter was trained beside a base of 4 bits and made up for some of its rounding: on that base, rounded anew here, the sum is the
model that was trained; on the original weights it is another one, which peft gives and which has not seen the rounding errors that
the adapter corrects.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmforge.convert.base import Family, Tensors
from llmforge.convert.bitsandbytes import nf4_of
from llmforge.convert.published import Published, account, shared_names
from llmforge.errors import CheckpointError, ConfigError, ConvertError, some
from llmforge.finetune.adapter_files import Adapter, LoRATensors, Rounding
from llmforge.finetune.quantize import NF4Config
from llmforge.formats.lazy import LazyTensor
from llmforge.nn.lora import merged
from llmforge.nn.replace import matches
from llmforge.quant.nf4 import NF4Tensor, dequantize_rows_nf4

MergeBase = Literal["original", "nf4"]
MERGE_BASES: tuple[MergeBase, ...] = ("original", "nf4")

# Rows are computed in whole groups of so many. In smaller ones a library for matrices may take another kernel, which adds the
# products in another order, and a row would depend on how many are read with it.
_GROUP = 64
_WEIGHTS = 1 << 19  # that are computed at a time, about: 2 MB of float32, which stay in a CPU's caches


def merge(published: Published, adapter: Adapter, *, base: MergeBase | None = None) -> Published:
    """The model with an adapter in its weights, which are computed when they are read.

    Args:
        published: the base that the adapter was trained on.
        base: "original": onto the weights as they are; "nf4": onto the weights as the training saw them, NF4 in the layers that were
            rounded then (in all linear layers but lm_head, where the adapter does not say which); never embeddings. None = "nf4"
            where the adapter says that its base was rounded, else "original".
    Returns:
        the base's config, types and names, with `notes` that say what was merged onto what. An output projection that is tied to
        the embedding becomes one of its own where the adapter changes one of the two.
    Raises:
        CheckpointError: the adapter is of another model: layers that are not there, or of another shape.
        ConvertError: layers that no matrix can replace (BitLinear).
        ConfigError: another `base`.
    """
    if base not in (None, *MERGE_BASES):
        raise ConfigError(f"merge_base ({base!r}) must be one of {', '.join(MERGE_BASES)}")
    family, config = published.family, published.config
    layers = {_own_name(family, f"{name}.weight"): layer for name, layer in adapter.layers.items()}
    saved = {_own_name(family, name): tensor for name, tensor in adapter.saved.items()}
    notes = list(published.notes)
    config, tensors = _untied(family, config, published.tensors, layers, saved, notes)
    _check(family, config, tensors, layers, saved)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    rounding = adapter.rounding if base != "original" else None
    if base == "nf4" and rounding is None:
        nf4 = NF4Config()
        rounding = Rounding(nf4, tuple(_linear_layers(family, config, tensors, nf4.skip)))
    if rounding is not None:
        tensors = _rounded(family, tensors, rounding)
        notes.append(
            f"merged onto the base rounded to NF4 in {len(rounding.modules)} linear layers, as "
            + (
                "it was in training"
                if adapter.rounding is not None
                else "asked for; the adapter does not say how it was in training"
            )
        )
    elif adapter.rounding is not None:
        notes.append(
            "merged onto the original weights; in training they were rounded to NF4, so this is not quite that model"
        )
    else:
        notes.append("merged onto the original weights")
    if adapter.rounding is not None and adapter.rounding.nf4.embedding_bits == 8:
        notes.append("embedding and output projection are as in the base; in training they had 8 bits")
    for name, dtype in dtypes.items():
        if name in layers:
            tensors[name] = _with_delta(tensors[name], layers[name], dtype)
        elif name in saved:
            tensors[name] = _saved(family, name, saved[name], dtype)
        elif tensors[name].dtype != dtype:  # rounded to NF4 and back, without an adapter
            tensors[name] = tensors[name].then(partial(Tensor.to, dtype=dtype), by_row=True)
    misfit = CheckpointError("the adapter does not fit this model")
    merged_model = account(family, config, tensors, misfit)
    return replace(published, config=config, tensors=merged_model.tensors, notes=notes)


def _own_name(family: Family, hf_name: str) -> str:
    name = family.own_name(hf_name)
    return hf_name if name is None else name  # `_check` says that it is not there


def _untied(
    family: Family,
    config: Any,
    tensors: Tensors,
    layers: Mapping[str, LoRATensors],
    saved: Mapping[str, LazyTensor],
    notes: list[str],
) -> tuple[Any, Tensors]:
    """The model with an own tensor for every name that the adapter changes: what it changes is not shared any more."""
    tensors = dict(tensors)
    changed = {*layers, *saved}
    for first, *others in shared_names(family.blueprint(config.replace(**{family.layers_field: 1}))):
        for other in others:
            if not changed & {first, other}:
                continue
            if not getattr(config, "tie_word_embeddings", False):
                raise ConvertError(f"{other} is {first} itself, and the adapter changes one of them alone")
            tensors[other] = tensors[first]
            config = config.replace(tie_word_embeddings=False)
            notes.append(
                f"{other} is a matrix of its own now: it was tied to {first}, and the adapter changes one of the two"
            )
    return config, tensors


def _check(
    family: Family, config: Any, tensors: Tensors, layers: Mapping[str, LoRATensors], saved: Mapping[str, LazyTensor]
) -> None:
    """Refuse an adapter of another model, with all that does not fit."""
    absent = [name.removesuffix(".weight") for name in (*layers, *saved) if name not in tensors]
    misshapen = [
        f"{name} is {tensors[name].shape}, the adapter's {(layer.B.shape[0], layer.A.shape[1])}"
        for name, layer in layers.items()
        if name in tensors and tensors[name].shape != (layer.B.shape[0], layer.A.shape[1])
    ]
    misshapen += [
        f"{name} is {tensors[name].shape}, the adapter's {_saved(family, name, tensor, tensor.dtype).shape}"
        for name, tensor in saved.items()
        if name in tensors and tensors[name].shape != _saved(family, name, tensor, tensor.dtype).shape
    ]
    if absent or misshapen:
        parts = [("the model does not have", absent), ("of another shape", misshapen)]
        found = "; ".join(f"{what}: {some(names)}" for what, names in parts if names)
        raise CheckpointError(f"the adapter is of another model ({found}); give the one that it was trained on")
    modules = dict(family.blueprint(config.replace(**{family.layers_field: 1})).named_modules())
    for name in layers:
        module = modules.get(_of_first_layer(family, name.removesuffix(".weight")))
        if type(module) is not nn.Linear:
            raise ConvertError(
                f"{name.removesuffix('.weight')} is a {type(module).__name__}, not a plain linear layer: no weight computes what it computes "
                "with the adapter, so they cannot be merged"
            )


def _of_first_layer(family: Family, name: str) -> str:
    """The name of the same module in the first layer; others are alike."""
    return re.sub(rf"^({re.escape(family.layers_prefix)})\d+\.", r"\g<1>0.", name)


def _linear_layers(family: Family, config: Any, tensors: Tensors, skip: tuple[str, ...]) -> Iterator[str]:
    """The names of the plain linear layers of a model, less those that `skip` names and those tied to an embedding."""
    modules = dict(family.blueprint(config.replace(**{family.layers_field: 1})).named_modules())
    for name in tensors:
        module, _, kind = name.rpartition(".")
        plain = type(modules.get(_of_first_layer(family, module))) is nn.Linear
        if plain and kind == "weight" and not matches(module, skip):
            yield module


def _rounded(family: Family, tensors: Tensors, rounding: Rounding) -> Tensors:
    names = [_own_name(family, f"{module}.weight") for module in rounding.modules]
    if absent := [name for name in names if name not in tensors or len(tensors[name].shape) != 2]:
        raise CheckpointError(
            f"the adapter is of another model: its base.json names rounded layers that are not there: {some(absent)}"
        )
    latest = _Latest()
    return {**tensors, **{name: _as_nf4(name, tensors[name], rounding.nf4, latest) for name in names}}


class _Latest:
    """The codes of the tensor that was read last: its blocks share them, and no other tensor's are kept."""

    name: str | None = None
    codes: NF4Tensor | None = None


def _as_nf4(name: str, tensor: LazyTensor, nf4: NF4Config, latest: _Latest) -> LazyTensor:
    """The tensor in NF4 and back, float32: exactly what a layer of 4 bits multiplies with."""

    def read_rows(start: int, stop: int) -> Tensor:
        if latest.name != name or latest.codes is None:
            latest.codes, latest.name = None, name  # the old ones leave before the new ones come
            try:
                latest.codes = nf4_of(tensor, nf4)
            except ConfigError as error:
                raise ConvertError(f"{name}: {error}") from error
        return dequantize_rows_nf4(latest.codes, start, stop)

    return LazyTensor(tensor.shape, torch.float32, lambda: read_rows(0, tensor.num_rows), read_rows)


def _with_delta(weight: LazyTensor, layer: LoRATensors, dtype: torch.dtype) -> LazyTensor:
    """A matrix (out, in) and the adapter of its layer; `dtype` is that of the result."""
    n_rows, width = weight.shape
    step = max(_GROUP, _WEIGHTS // width // _GROUP * _GROUP)

    def sums(weight: LazyTensor, start: int, stop: int, out: Tensor) -> None:
        last = min(-(-stop // _GROUP) * _GROUP, n_rows)
        first = max(0, min(start // _GROUP * _GROUP, last - _GROUP))
        W, A, B = weight.rows(first, last), layer.A.rows(0, layer.A.num_rows), layer.B.rows(first, last)
        magnitude = layer.magnitude.rows(0, 1).view(-1)[first:last] if layer.magnitude is not None else None
        for i in range(0, last - first, step):
            j = min(i + step, last - first)
            i = max(0, min(i, j - _GROUP))
            rows = merged(W[i:j], A, B[i:j], layer.scale, None if magnitude is None else magnitude[i:j])
            wanted, end = max(first + i, start), min(first + j, stop)
            out[wanted - start : end - start] = rows[wanted - first - i : end - first - i]

    def read() -> Tensor:
        source = weight if weight.read_rows is not None else LazyTensor.of(weight.read())
        out = torch.empty(weight.shape, dtype=dtype)
        sums(source, 0, n_rows, out)
        return out

    def read_rows(start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, width, dtype=dtype)
        sums(weight, start, stop, out)
        return out

    return LazyTensor(weight.shape, dtype, read, read_rows if weight.read_rows is not None else None)


def _saved(family: Family, name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A tensor of modules_to_save in our layout and the base's type, as peft keeps it."""
    return tensor.then(lambda t: family.hf_layout(name, t).to(dtype), by_row=family.hf_keeps_rows(name))


__all__ = ["MERGE_BASES", "MergeBase", "merge"]
