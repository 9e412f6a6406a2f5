"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, with an optional bias (nanoGPT's `bias=False` has a weight alone).

    Args:
        dim: width C of the last dimension.
        bias: whether to add a learned bias.
        eps: added to the variance; 1e-5 is GPT-2's.
    Source: Ba et al. 2016, arXiv:1607.06450.
    >>> LayerNorm(4, bias=False)(torch.tensor([[1.0, 1.0, 3.0, 3.0]])).round()
    tensor([[-1., -1.,  1.,  1.]], grad_fn=<RoundBackward0>)
    """

    def __init__(self, dim: int, *, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Division by the root of the mean square of the last dimension, computed in float32, times a learned gain.

    Args:
        dim: width of the last dimension.
        eps: added to the mean square.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467; the order of rounding is that of transformers' LlamaRMSNorm.
    >>> (RMSNorm(2)(torch.tensor([[3.0, 4.0]])) * 12.5**0.5).round()
    tensor([[3., 4.]], grad_fn=<RoundBackward0>)
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
