"""Attention of packed documents: several stand in one row, and a token sees those of its own alone."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llmforge.errors import ConfigError, DataError
from llmforge.nn.attention import attention_mask, causal_attention

# "varlen": torch's FlashAttention over documents of any length (CUDA, 16-bit types). "mask": one call for all rows, which computes
# the pairs between documents too. "loop": a call per document, which computes nothing in vain and holds no mask.
DocumentBackend = Literal["varlen", "mask", "loop"]

# What a call of the loop costs, forward and backward, in pairs of tokens of the mask. CPU: 0.2 ms a call against 0.25 us a pair, with
# 8 heads of 64 on one core. CUDA: an estimate, 0.15 ms of launches against 0.5 ns for 32 heads of 128 at 100 TFLOP/s.
_PAIRS_PER_CALL = {"cpu": 1_000, "cuda": 300_000}

_chosen: ContextVar[DocumentBackend | None] = ContextVar("document_backend", default=None)


@contextmanager
def document_backend(backend: DocumentBackend) -> Iterator[None]:
    """Compute the attention of packed documents with this backend, not with the cheapest one, in passes that begin within the block.

    Raises:
        ConfigError: an unknown backend. "varlen" where torch has none for the device or dtype raises at the first layer.
    """
    if backend not in ("varlen", "mask", "loop"):
        raise ConfigError(f"document backend {backend!r} must be 'varlen', 'mask' or 'loop'")
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclass(frozen=True)
class _Pack:
    """What all layers share; the rest is computed when a layer asks for it."""

    positions: Tensor  # (B, T) int64
    lengths: tuple[int, ...]  # of all documents, row by row
    backend: DocumentBackend | None

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """Where documents begin in the rows laid end to end, and where the last one ends: (N + 1,) int32."""
        lengths = torch.tensor([0, *self.lengths], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(self.positions.device)

    @functools.cached_property
    def loop_is_cheaper(self) -> bool:
        B, T = self.positions.shape
        per_call = _PAIRS_PER_CALL.get(self.positions.device.type, _PAIRS_PER_CALL["cuda"])
        return sum(length**2 + per_call for length in self.lengths) < B * T**2

    @functools.cached_property
    def masks(self) -> dict[int | None, Tensor]:
        return {}


class Documents:
    """The documents packed into a batch, as one layer sees them. Made once per forward pass; layers share what is computed of it.

    Args:
        positions: (B, T) int64, of each token in its document: every row begins with 0, and each further 0 begins a document.
    Raises:
        DataError: positions that do not count up from 0.
    >>> Documents(torch.tensor([[0, 1, 2, 0, 1, 0]])).lengths
    (3, 2, 1)
    """

    def __init__(self, positions: Tensor) -> None:
        # One copy to the host (the number of documents must be known there anyway), instead of several waits for the device; none, where
        # the tensor says from what it was copied.
        rows = getattr(positions, "on_host", positions).detach().cpu()
        begins = rows == 0
        if rows.ndim != 2 or not bool(begins[:, :1].all() and (begins[:, 1:] | (rows.diff(dim=1) == 1)).all()):
            raise DataError(
                f"positions of packed documents must be (B, T) and count 0, 1, 2, ... from where each document begins, the first one "
                f"at the start of its row; got shape {tuple(rows.shape)}, beginning {rows.flatten()[:8].tolist()}"
            )
        places = begins.flatten().nonzero().flatten().tolist()
        ends = [*places[1:], rows.numel()]
        lengths = tuple(end - begin for begin, end in zip(places, ends, strict=True))
        self._pack = _Pack(positions, lengths, _chosen.get())
        self.window: int | None = None

    @property
    def positions(self) -> Tensor:
        """(B, T) int64"""
        return self._pack.positions

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document, row by row."""
        return self._pack.lengths

    def windowed(self, window: int | None) -> "Documents":
        """The same documents for a layer whose tokens see only so many, themselves included (Mistral); None = all of the past."""
        documents = object.__new__(Documents)
        documents._pack = self._pack
        documents.window = window if window is not None and window < max(self.lengths) else None
        return documents

    def mask(self) -> Tensor:
        """Which tokens of its row each one may attend to: (B, 1, T, T) bool."""
        if self.window not in self._pack.masks:
            number = (self.positions == 0).cumsum(1)  # of the document, (B, T)
            T, device = number.shape[1], number.device
            same = number[:, :, None] == number[:, None, :]
            self._pack.masks[self.window] = (same & attention_mask(T, T, window=self.window, device=device))[:, None]
        return self._pack.masks[self.window]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Causal attention within each document.

        Args:
            q: (B, H, T, D).
            k, v: (B, K, T, D), K divides H.
            dropout: probability of dropping an attention weight; pass 0 outside training.
        Returns:
            (B, H, T, D)
        Raises:
            ConfigError: `document_backend("varlen")` was asked for, and does not work with these tensors.
        """
        backend = self._pack.backend
        has_varlen = dropout == 0 and _has_varlen(q.device, q.dtype, q.shape[-1])
        if backend == "varlen" and not has_varlen:
            raise ConfigError(
                f"varlen attention needs a CUDA device with FlashAttention, torch 2.10, a 16-bit dtype and no dropout; this is "
                f"{q.device}, torch {torch.__version__}, {q.dtype}, dropout {dropout}; use 'mask' or 'loop'"
            )
        if backend is None and len(self.lengths) == len(q):  # each row is one document: no mask of T x T, and no loop
            return self._one(q, k, v, dropout=dropout)
        if backend is None:
            backend = "varlen" if has_varlen else "loop" if self._pack.loop_is_cheaper else "mask"
        if backend == "mask":
            return causal_attention(q, k, v, mask=self.mask(), dropout=dropout)
        B = len(q)
        if backend == "varlen":
            q, k, v = (rearrange(x, "B H T D -> (B T) H D") for x in (q, k, v))
            window = -1 if self.window is None else self.window - 1  # tokens to the left
            y = _varlen(q, k, v, self._pack.cu_seqlens, max(self.lengths), window)
            return rearrange(y, "(B T) H D -> B H T D", B=B)
        rows = (torch.split(rearrange(x, "B H T D -> 1 H (B T) D"), list(self.lengths), dim=2) for x in (q, k, v))
        found = [self._one(*parts, dropout=dropout) for parts in zip(*rows, strict=True)]
        return rearrange(torch.cat(found, dim=2), "1 H (B T) D -> B H T D", B=B)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float) -> Tensor:
        """Attention of rows that are one document each."""
        T, mask = q.shape[2], None
        if self.window is not None and self.window < T:
            mask = attention_mask(T, T, window=self.window, device=q.device)
        return causal_attention(q, k, v, mask=mask, dropout=dropout)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    attend: Any = varlen_attn
    y: Tensor = attend(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(window, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    return y


@functools.cache
def _has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen attention can be used: versions and wheels of torch differ in what they have, so it is tried once."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _varlen_works(device, dtype, head_dim)


def _varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether varlen attention runs, forward and backward, and finds what SDPA finds: with windows, and heads that share keys."""
    generator = torch.Generator(device).manual_seed(0)
    # Hooks that do nothing: those of a checkpoint around the layer must not meet these tensors.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        q, k, v = (
            torch.randn(8, heads, head_dim, device=device, dtype=dtype, generator=generator).requires_grad_()
            for heads in (2, 1, 1)
        )
        try:
            found = _varlen(q, k, v, torch.tensor([0, 3, 8], dtype=torch.int32, device=device), 5, 1)
            grads = torch.autograd.grad(found.float().square().sum(), (q, k, v))
        except (ImportError, RuntimeError, TypeError):  # no such function, kernel or argument
            return False
        parts = [
            [x.transpose(0, 1)[None] for x in rows]
            for rows in zip(*(torch.split(x, [3, 5]) for x in (q, k, v)), strict=True)
        ]
        expected = [
            causal_attention(*part, mask=attention_mask(T, T, window=2, device=device))
            for part, T in zip(parts, (3, 5), strict=True)
        ]
        rows = torch.cat(expected, dim=2)[0].transpose(0, 1)
        expected_grads = torch.autograd.grad(rows.float().square().sum(), (q, k, v))
    pairs = zip((found, *grads), (rows, *expected_grads), strict=True)
    return all(torch.allclose(one.float(), other.float(), atol=5e-2, rtol=5e-2) for one, other in pairs)
