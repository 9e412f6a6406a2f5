"""Causal attention on torch's scaled_dot_product_attention, and the masks that it needs beyond the plain case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from llmforge.nn.documents import Documents


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | Documents | None = None, dropout: float = 0.0
) -> Tensor:
    """Each query attends to the keys up to its own position; the queries are the last T of the S tokens.

    Args:
        q: (B, H, T, D), the new tokens.
        k, v: (B, K, S, D), S >= T, all tokens so far. Each of the K heads serves H / K heads of q (grouped-query attention).
        mask: what may be attended to, where that is less: see `attention_mask`, or the documents that are packed into the rows.
        dropout: probability of dropping an attention weight; pass 0 outside training.
    Returns:
        (B, H, T, D)
    """
    if mask is not None and not isinstance(mask, Tensor):
        return mask.attention(q, k, v, dropout=dropout)
    T, S = q.shape[2], k.shape[2]
    if q.shape[1] != k.shape[1]:
        # Repeated, not enable_gqa: with that, torch 2.13 leaves the fused kernel on the CPU and under a mask.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if mask is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if mask is None and T > 1:  # is_causal aligns the mask to the first key; with a cache the queries belong at the end
        mask = attention_mask(T, S, device=q.device)
    # Without a mask here T is 1: the newest token sees everything.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attention_mask(
    T: int,
    S: int,
    *,
    window: int | None = None,
    padding: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which of S tokens each of the last T may attend to: itself and the past, within the window and without the padding.

    Args:
        window: how many tokens a token sees, itself included (Mistral); None = all of the past.
        padding: (B,) int64, how many tokens at the beginning of each row stand for nothing.
    Returns:
        (T, S) bool, or (B, 1, T, S) with padding. A token of the padding sees itself, so that its attention is defined.
    >>> attention_mask(2, 4, window=2).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None, :]
    return visible(query, key, window=window, padding=padding)


def visible(query: Tensor, key: Tensor, *, window: int | None = None, padding: Tensor | None = None) -> Tensor:
    """`attention_mask` for queries at the places (T, 1) and keys at the places (1, S)."""
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if padding is not None:
        mask = (mask & (key >= padding[:, None, None]) | (key == query))[:, None]
    return mask
