"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """C -> F twice, one of the two through SiLU as a gate for the other, F -> C.

    Args:
        dim: width C.
        hidden_dim: width F.
        bias: of the three matrices.
    Source: Shazeer 2020, arXiv:2002.05202; parameter names are Hugging Face's.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        out: Tensor = self.down_proj(self.hidden(x))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """What is projected back: (..., C) -> (..., F)"""
        hidden: Tensor = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return hidden


class SquaredReLU(nn.Module):
    """C -> F, the square of ReLU, F -> C: no gate, so two matrices where SwiGLU has three.

    Args:
        dim: width C.
        hidden_dim: width F.
        bias: of the two matrices.
    Source: So et al. 2021, arXiv:2109.08668; parameter names are those of Hugging Face's Arcee.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return out
