"""Causal attention on torch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Each query attends to the keys up to its own position; the queries are the last T of the S tokens.

    Args:
        q: (B, H, T, D), the new tokens.
        k, v: (B, H, S, D), S >= T, all tokens so far.
        dropout: probability of dropping an attention weight; pass 0 outside training.
    Returns:
        (B, H, T, D)
    """
    T, S = q.shape[2], k.shape[2]
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    if T == 1:  # the newest token sees everything
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # is_causal aligns the mask to the first key; with a cache the queries belong at the end.
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
