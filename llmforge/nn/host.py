"""Tensors that wait in host memory while the device computes with others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmforge.errors import ConfigError
from llmforge.nn.int8 import Embedding8bit, Int8Matrix
from llmforge.quant.int8 import dequantize_int8_rows

_on_host: ContextVar[bool] = ContextVar("on_host", default=False)


@contextmanager
def _host_memory() -> Iterator[None]:
    token = _on_host.set(True)
    try:
        yield
    finally:
        _on_host.reset(token)


def allocates_on_host() -> bool:
    """Whether what is allocated now belongs into host memory wherever the model is: for an estimate that is made without a device."""
    return _on_host.get()


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory, without a gradient. From a CUDA device it is on its way when this returns; `to_device` waits for it."""
    with torch.no_grad(), _host_memory():
        # Pinned memory lets the copy run beside what the host does; torch keeps such buffers for the next step. Fake tensors have none.
        copy = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda and type(x) is Tensor)
        return copy.copy_(x, non_blocking=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in host memory on the device, in order with what the device was told before."""
    with torch.no_grad():
        return torch.empty(x.shape, dtype=x.dtype, device=device).copy_(x, non_blocking=True)


class HostEmbedding(nn.Module):
    """A frozen embedding whose table stays in host memory: rows are looked up there, and go to the device of the ids.

    `model.to("cuda")` does not move the table, `model.bfloat16()` does cast it. It is no parameter, but part of the `state_dict()`,
    under the name that it had in nn.Embedding.

    Args:
        weight: (num_embeddings, embedding_dim); not copied where it is on the CPU.
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight.detach() if weight.is_meta else weight.detach().cpu())

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids -> (..., embedding_dim), on the device of the ids"""
        with _host_memory():
            rows = F.embedding(input.cpu(), self.weight)
        return to_device(rows, input.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        weight, sample = self.weight, fn(self.weight.new_empty(0))  # of what fn does, the dtype counts, not the device
        if weight.is_meta and not sample.is_meta:
            self.weight = torch.empty(weight.shape, dtype=sample.dtype, device="cpu")
        else:
            self.weight = weight.to(sample.dtype)
        return self

    @property
    def num_weights(self) -> int:
        """Weights of the table."""
        return self.weight.numel()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class HostEmbedding8bit(Embedding8bit):
    """An `Embedding8bit` whose table stays in host memory, wherever the model goes: codes of rows go to the device, and are decoded there.

    Args:
        matrix: (num_embeddings, embedding_dim), moved to the CPU.
        dtype: of what it returns.
    """

    def __init__(self, matrix: Int8Matrix, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(matrix if matrix.codes.is_meta else matrix.cpu(), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids -> (..., embedding_dim), on the device of the ids"""
        with _host_memory():
            codes, scales = self._rows(input.cpu())
        device = input.device
        return dequantize_int8_rows(to_device(codes, device), to_device(scales, device), dtype=self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding8bit":
        sample = fn(self.matrix.scales.new_empty(0, dtype=self.dtype))
        self.dtype = sample.dtype
        if self.matrix.codes.is_meta and not sample.is_meta:
            self.matrix.to_empty(device="cpu")
        return self


def offload_embedding_(model: nn.Module) -> list[str]:
    """Keep a model's token embedding in host memory from now on, frozen: a GPU then holds V * C weights less, and gets T rows per step.

    Args:
        model: of a family of `llmforge.models`, or another one that says the path of its token embedding in `embedding_name`.
    Returns:
        the name of the embedding; nothing if it was there already.
    Raises:
        ConfigError: the output projection is tied to it, or it is neither a plain nn.Embedding nor an `Embedding8bit`. Nothing is
            changed then.
    """
    name: Any = getattr(model, "embedding_name", None)
    if name is None:
        raise ConfigError(
            f"{type(model).__name__} does not say which its token embedding is; set embedding_name to its path"
        )
    embedding = model.get_submodule(name)
    if isinstance(embedding, (HostEmbedding, HostEmbedding8bit)):
        return []
    of_8_bits = type(embedding) is Embedding8bit
    if not of_8_bits and (type(embedding) is not nn.Embedding or embedding.max_norm is not None):
        raise ConfigError(
            f"{name} is a {type(embedding).__name__}, and only a plain nn.Embedding can move to host memory, or an Embedding8bit"
        )
    table: Any = embedding.matrix if of_8_bits else embedding.weight
    held: Any = model.named_modules if of_8_bits else model.named_parameters
    here = f"{name}.matrix" if of_8_bits else f"{name}.weight"
    shared = [other for other, each in held(remove_duplicate=False) if each is table and other != here]
    if shared:
        raise ConfigError(
            f"{name} cannot move to host memory: {', '.join(shared)} is the same matrix, and the device computes with all of it; "
            "models with tie_word_embeddings keep it on the device"
        )
    host: nn.Module
    if isinstance(embedding, Embedding8bit):
        host = HostEmbedding8bit(embedding.matrix, embedding.dtype)
    else:
        host = HostEmbedding(table)
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = host.train(embedding.training)
    return [name]
