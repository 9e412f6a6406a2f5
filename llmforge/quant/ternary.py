"""Ternary weights and 8-bit activations of BitNet b1.58, as pure functions on tensors.

A weight matrix becomes codes -1, 0, 1 times one scale, the mean of its absolute values ("absmean"); activations become codes
-127 .. 127 times a scale for each token, or for each 256 values of one ("absmax"). All of it is computed in float32, whatever the
dtype of the tensors: in bfloat16 8 % of the activation codes would be others.

Sources: Ma et al. 2024, arXiv:2402.17764 (b1.58), and its training tips (microsoft/unilm, bitnet); blocks of 256 and the rounding of
their activations are ggml's, quantize_row_q8_K.
"""

import torch
from torch import Tensor

from llmforge.errors import ConfigError

GROUP = 256  # values per block of ggml's TQ1_0 and TQ2_0 weights, and of the activations that meet them
_SMALLEST = 1e-5  # of a scale, as in the paper's code


def absmean(weight: Tensor, *, group_size: int | None = None) -> Tensor:
    """Mean of the absolute values, at least 1e-5.

    Args:
        weight: (out, in) of floats.
        group_size: so many neighbours in a row share a mean; None = the whole matrix does.
    Returns:
        float32: () or, with groups, (out, in / group_size, 1).
    >>> absmean(torch.tensor([[0.5, -1.0], [0.0, 2.5]]))
    tensor(1.)
    """
    return _mean(_grouped(weight.float(), group_size).abs(), group_size).clamp(min=_SMALLEST)


def ternary_codes(
    weight: Tensor, *, group_size: int | None = None, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Codes and scale of a matrix: round(weight / absmean), clipped to -1 .. 1, and the absmean as `scale_dtype` can hold it.

    Args:
        weight: (out, in) of floats.
        scale_dtype: bfloat16 makes a scale that float16, ggml's type of scales, holds too: what is exported is what was computed.
    Returns:
        (out, in) int8, and the scale in float32 as `absmean` shapes it.
    >>> ternary_codes(torch.tensor([[0.4, -1.0], [0.1, 2.5]]))
    (tensor([[ 0, -1],
            [ 0,  1]], dtype=torch.int8), tensor(1.))
    """
    rounded, scale = _rounded(weight, group_size)
    return rounded.view(weight.shape).to(torch.int8), rounded_scale(scale, scale_dtype)


def rounded_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A positive float32 scale to the nearest that bfloat16 holds, ties to even, as float32; unchanged for float32.

    On the bits, since torch.compile drops a cast to bfloat16 and back: it would compute with another scale than the one exported.

    >>> rounded_scale(torch.tensor(1.003), torch.bfloat16)
    tensor(1.)
    """
    if dtype == torch.float32:
        return scale
    bits = scale.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def fake_ternary(weight: Tensor, *, group_size: int | None = None, scale_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix that codes and scale stand for, in the weight's shape and dtype; see `ternary_codes`."""
    rounded, scale = _rounded(weight, group_size)
    return rounded.mul_(rounded_scale(scale, scale_dtype)).view(weight.shape).to(weight.dtype)


def latent_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """A float matrix that becomes exactly these codes and this scale again.

    The plain product of the two would not: its absmean is the scale times the share of codes that are not 0.

    Args:
        codes: (out, in) of -1, 0 and 1.
        scale: float32, () or (out, groups, 1).
    Returns:
        (out, in) float32
    """
    groups = None if scale.ndim == 0 else codes.shape[1] // scale.shape[1]
    values = _grouped(codes.float(), groups)
    share = _mean(values.abs(), groups)
    return (values * (scale / share.clamp(min=1 / values.numel()))).view(codes.shape)


def int8_codes(x: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes of activations, and what one step of them is worth: round(127 x / absmax), to even, and absmax / 127.

    Args:
        x: (..., in) of floats.
        group_size: so many neighbours share a scale; None = the whole last dimension does.
    Returns:
        (..., in) int8, and float32 (..., 1) or, with groups, (..., in / group_size, 1).
    """
    rounded, step = _rounded_activations(x, group_size)
    return rounded.view(x.shape).to(torch.int8), step


def fake_int8(x: Tensor, *, group_size: int | None = None) -> Tensor:
    """The activations that codes and steps stand for, in the shape and dtype of x; see `int8_codes`."""
    rounded, step = _rounded_activations(x, group_size)
    return rounded.mul_(step).view(x.shape).to(x.dtype)


def pack_2bit(codes: Tensor) -> Tensor:
    """Four codes in a byte, as transformers keeps them: row r of the i-th quarter of the rows in bits 2i and 2i + 1, plus 1.

    Args:
        codes: (out, in) of -1, 0 and 1; out divisible by 4.
    Returns:
        (out / 4, in) uint8
    Raises:
        ConfigError: rows that are not divisible by 4.
    >>> pack_2bit(torch.tensor([[-1], [0], [1], [1]]))  # 0 + 1*4 + 2*16 + 2*64
    tensor([[164]], dtype=torch.uint8)
    """
    if codes.shape[0] % 4:
        raise ConfigError(f"{codes.shape[0]} rows of codes cannot be packed by four; use a multiple of 4")
    quarters = (codes + 1).to(torch.uint8).view(4, -1, codes.shape[1])
    packed = quarters[0].clone()
    for i in range(1, 4):
        packed |= quarters[i] << (2 * i)
    return packed


def unpack_2bit(packed: Tensor) -> Tensor:
    """The reverse: (out / 4, in) uint8 -> (out, in) int8 of -1, 0 and 1.

    Raises:
        ConfigError: bits that stand for no code.
    """
    codes = torch.cat([(packed >> (2 * i)) & 3 for i in range(4)])
    if (codes == 3).any():
        raise ConfigError("the packed weights hold bits that stand for none of -1, 0 and 1: the file is damaged")
    return codes.to(torch.int8) - 1


def _rounded(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """round(weight / absmean), clipped, in groups and float32; and the absmean."""
    scale = absmean(weight, group_size=group_size)
    return (_grouped(weight.float(), group_size) * (1 / scale)).round_().clamp_(-1, 1), scale


def _rounded_activations(x: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    values = _grouped(x.float(), group_size)
    largest = values.abs().amax(dim=-1, keepdim=True)
    # Per token the paper's least scale; a group of ggml's has none, but a group of zeros must not divide by 0.
    largest = largest.clamp(min=_SMALLEST if group_size is None else 1e-30)
    return (values * (127 / largest)).round_(), largest / 127


def _mean(values: Tensor, group_size: int | None) -> Tensor:
    return values.mean() if group_size is None else values.mean(dim=-1, keepdim=True)


def _grouped(values: Tensor, group_size: int | None) -> Tensor:
    if group_size is None:
        return values
    if values.shape[-1] % group_size:
        raise ConfigError(f"rows of {values.shape[-1]} values do not divide into groups of {group_size}")
    return values.reshape(*values.shape[:-1], values.shape[-1] // group_size, group_size)
