"""Eight-bit integers with a float32 scale per row, what an embedding and an output projection can be kept in: 1 + 4 / n bytes per weight.

    scale = max |row| / 127        code = round(weight / scale), halves to even        weight ~ code * scale

A weight is off by at most half a scale, 1/254 of the largest of its row.

Source: Dettmers et al. 2022, arXiv:2208.07339 (LLM.int8()), section 2.1: absmax quantization, row by row.
"""

import torch
from torch import Tensor

from llmforge.errors import ConfigError


def quantize_int8_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes.

    Args:
        matrix: (rows, n), floats; computed with in float32.
    Returns:
        codes, int8, (rows, n), from -127 to 127; scales, float32, (rows). A row of zeros has the scale 0.
    Raises:
        ConfigError: NaN or infinity among the weights.
    >>> quantize_int8_rows(torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    (tensor([[127, -64,   0],
            [  0,   0,   0]], dtype=torch.int8), tensor([0.0079, 0.0000]))
    """
    rows = matrix.detach().float()
    low, high = rows.aminmax(dim=1)  # NaN if one value is
    scales = torch.maximum(low.abs(), high.abs()) / 127
    if not scales.isfinite().all():
        raise ConfigError(
            "NaN or infinity among the weights, for which 8 bits have no codes; take an earlier checkpoint"
        )
    codes = rows / torch.where(scales > 0, scales, 1)[:, None]
    # The scale of a row of subnormal numbers has few bits of its own, and can be too small for the largest.
    return codes.round_().clamp_(-127, 127).to(torch.int8), scales


def dequantize_int8_rows(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What codes stand for, some rows or all: products in float32, rounded to `dtype` once.

    Args:
        codes, scales: (..., n) int8 and (...) float32.
    Returns:
        (..., n), `dtype`.
    """
    # The kernel rounds what it has computed in registers: no float32 matrix is made on the way to 16 bits.
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scales[..., None], out=out)
