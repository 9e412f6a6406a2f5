"""Eight-bit numbers whose steps are small near zero and wide near one, a float scale per block: scales of scales, optimizer states.

A code stands for a value between -1 and 1 (signed), or 0 and 1. In each of seven decades, from 1e-7..1e-6 up to 0.1..1, the values are
the middles of equally wide steps, twice as many as in the decade below; 0 and 1 are there exactly. Codes, order and float32 values
are those of bitsandbytes, so that what either writes the other reads.

Source: Dettmers et al. 2022, arXiv:2110.02861 (8-bit optimizers), section 2 and appendix F; Dettmers 2016, arXiv:1511.04561.
"""

import torch
from torch import Tensor

BLOCK_SIZE = 256  # values that share a scale
_DECADES = 7
_SMALLEST = 1e-38  # of a scale that divides: a block of zeros is zeros


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values of the codes, rising, float32 on the CPU.

    >>> dynamic_map(signed=True)[[0, 127, 255]]
    tensor([-0.9930,  0.0000,  1.0000])
    """
    with torch.device("cpu"):
        values = [torch.tensor([0.0, 1.0])]
        for decade in range(_DECADES):
            steps = 2**decade if signed else 2 ** (decade + 1)
            edges = torch.linspace(0.1, 1, steps + 1)
            middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - _DECADES + 1)
            values += [middles, -middles] if signed else [middles]
        return torch.cat(values).sort().values


_MAPS = {signed: dynamic_map(signed=signed).tolist() for signed in (False, True)}
_tables: dict[tuple[bool, torch.device], tuple[Tensor, Tensor]] = {}


def zero_code(*, signed: bool) -> int:
    """The code of 0.

    >>> zero_code(signed=True), zero_code(signed=False)
    (127, 0)
    """
    return _MAPS[signed].index(0.0)


def _tables_for(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Values of the codes and the midpoints between them, on the device of `values`."""
    key = (signed, values.device)
    if key in _tables and is_plain(values):
        return _tables[key]
    with torch.inference_mode(False):
        table = values.new_tensor(_MAPS[signed], dtype=torch.float32)
        tables = table, (table[:-1] + table[1:]) * 0.5
    if is_plain(values):
        _tables[key] = tables
    return tables


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values of its own: constants for others (FakeTensorMode's, say) must be of their kind, and not be kept."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def quantize_dynamic(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes.

    Args:
        values: any shape, taken in row-major order; float32. Of unsigned ones none may be below 0.
    Returns:
        codes, uint8, (numel); scales, float32, (numel / 256 rounded up): the largest magnitude of each block.
    A value in the middle of two codes gets the even one, as from bitsandbytes' CUDA kernel. (Its CPU code looks values up in a table
    of 65,536 cells and misses the nearest code now and then, and most of those below 1.5e-5.)
    """
    flat = values.reshape(-1)
    n = flat.numel()
    if not n:
        return flat.new_empty(0, dtype=torch.uint8), flat.new_empty(0, dtype=torch.float32)
    # What the last block lacks is filled with zeros.
    blocks = torch.nn.functional.pad(flat, (0, -n % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    low, high = blocks.aminmax(dim=1)
    scales = torch.maximum(-low, high)
    scaled = blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]
    _, midpoints = _tables_for(flat, signed)
    below = torch.bucketize(scaled, midpoints, out_int32=True)
    above = torch.bucketize(scaled, midpoints, out_int32=True, right=True)  # differs on a midpoint alone
    codes = torch.where(below % 2 == 0, below, above)
    return codes.to(torch.uint8).view(-1)[:n], scales


def dequantize_dynamic(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """What codes of `quantize_dynamic` stand for: float32, (numel)."""
    n = codes.numel()
    table, _ = _tables_for(codes, signed)
    values = torch.index_select(table, 0, codes.reshape(-1).int())
    whole = n // BLOCK_SIZE * BLOCK_SIZE
    values[:whole].view(-1, BLOCK_SIZE).mul_(scales[: whole // BLOCK_SIZE, None])
    if whole < n:
        values[whole:].mul_(scales[-1])
    return values
