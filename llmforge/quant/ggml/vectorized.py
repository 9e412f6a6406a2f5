"""The searches of `reference` on all sub-blocks at once, in plain torch: the same bits on the CPU and on CUDA.

Sub-blocks lie in columns, so that a sum over their elements runs in order, row by row, and each step of it is one operation over
all of them. Nothing here divides by, or takes a reciprocal of, a Python number: torch would multiply by a rounded inverse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BELOW_HALF = 0.49999997019767761  # the float32 below 0.5, for which v + 0.5 would be 1
TINY = 1e-15  # ggml's GROUP_MAX_EPS: below it a sub-block is zero


def sums(x: Tensor, *, squares: bool = False) -> Tensor:
    """See `reference.sums`; x (N, n) -> (N)."""
    columns = x.t().contiguous()
    return _in_order(columns * columns if squares else columns)


def plain(x: Tensor, *, half: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.plain`; x (N, n) -> d (N), lowest (N), codes (N, n) uint8."""
    # Not amin and amax: of 0.0 and -0.0 the first counts.
    low, high = (x.gather(1, index[:, None])[:, 0] for index in (x.argmin(1), x.argmax(1)))
    if half == 128:
        d = divide(x.abs().amax(1), 127)
    elif half:
        largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
        d = divide(torch.where(largest == 0, 0.0, largest), -half)  # not -0.0
    else:
        d = divide(high - low, top)
    scaled = (x if half else x - low[:, None]) * torch.where(d != 0, divide(1, d), 0.0)[:, None]
    bias = torch.full_like(scaled, BELOW_HALF).copysign_(scaled) if half == 128 else half + 0.5
    codes = torch.where(scaled.isfinite(), (scaled + bias).trunc_(), 0.0)
    return d, low, (codes + 128 if half == 128 else codes).clamp_(max=top).to(torch.uint8)


def magnitudes(x: Tensor) -> Tensor:
    """See `reference.magnitudes`; x (N, n) -> (N, n)."""
    return root(divide(sums(x, squares=True), x.shape[1]))[:, None] + x.abs()


def important(x: Tensor, importance: Tensor, sigma2: Tensor) -> Tensor:
    """See `reference.important`; x and importance (N, n), sigma2 (N) -> (N, n)."""
    return importance * root(sigma2[:, None] + x * x)


def recode(x: Tensor, step: Tensor, offset: Tensor, codes: Tensor, *, low: int, high: int) -> Tensor:
    """See `reference.recode`; x (N, n), step and offset (N), codes (N, n) uint8, which may be changed -> the same."""
    again = nearest((x + offset[:, None]) / step[:, None], low, high) - low
    return torch.where(step[:, None] != 0, again.to(torch.uint8), codes)


def affine(
    x: Tensor, weights: Tensor, *, top: int, factors: Sequence[float], absolute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.affine`; x and weights (N, n) -> scale (N), minimum (N), codes (N, n) uint8."""
    x, weights = x.t().contiguous(), weights.t().contiguous()
    low = high = x[0]
    for row in x[1:]:  # not amin: of 0.0 and -0.0 the first must stay
        low, high = torch.where(row < low, row, low), torch.where(row > high, row, high)
    sum_w, sum_x = _in_order(weights), _in_order(weights * x)
    low = torch.where(low > 0, 0.0, low)
    flat = high == low
    iscale = divide(top, high - low)
    scale = divide(1, iscale)

    def distance(scale: Tensor, codes: Tensor, low: Tensor) -> Tensor:
        diff = codes.mul(scale).add_(low).sub_(x)
        return _in_order((diff.abs_() if absolute else diff.square_()).mul_(weights))

    best = distance(scale, nearest(iscale * (x - low), 0, top), low)
    best_iscale, best_offset = iscale, low
    for factor in factors:
        iscale = divide(factor, high - low)
        codes = nearest((x - low).mul_(iscale), 0, top)
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = _in_order(weighted), _in_order(weighted * codes), _in_order(weighted * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        positive = this_low > 0
        this_low = torch.where(positive, 0.0, this_low)
        this_scale = torch.where(positive, sum_xl / sum_l2, this_scale)
        error = distance(this_scale, codes, this_low)
        wins = (det > 0) & (error < best)
        best = torch.where(wins, error, best)
        best_iscale = torch.where(wins, iscale, best_iscale)
        best_offset = torch.where(wins, low, best_offset)
        scale = torch.where(wins, this_scale, scale)
        low = torch.where(wins, this_low, low)  # the next candidates start from it
    codes = nearest(best_iscale * (x - best_offset), 0, top).masked_fill_(flat, 0)
    return scale.masked_fill(flat, 0), -low, codes.to(torch.uint8).t().contiguous()


def symmetric(x: Tensor, weights: Tensor, *, half: int, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """See `reference.symmetric`; x and weights (N, n) -> scale (N), codes (N, n) uint8."""
    x, weights = x.t().contiguous(), weights.t().contiguous()
    largest, magnitude = extreme(x)
    weighted = weights * x
    scale = best = best_iscale = torch.zeros_like(largest)
    for number, factor in enumerate(factors):
        iscale = divide(factor, largest)
        codes = nearest(iscale * x, -half, half - 1)
        sum_xl, sum_l2 = _in_order(weighted * codes), _in_order((weights * codes).mul_(codes))
        this_scale = torch.where(sum_l2 != 0, sum_xl / sum_l2, 0.0)
        wins = (
            (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2) if number else torch.ones_like(magnitude, dtype=torch.bool)
        )
        scale = torch.where(wins, this_scale, scale)
        best = torch.where(wins, this_scale * sum_xl, best)
        best_iscale = torch.where(wins, iscale, best_iscale)
    zero = magnitude < TINY
    codes = nearest(best_iscale * x, -half, half - 1).add_(half).masked_fill_(zero, 0)
    return scale.masked_fill(zero, 0), codes.to(torch.uint8).t().contiguous()


def refined(x: Tensor, *, half: int, n_passes: int) -> tuple[Tensor, Tensor]:
    """See `reference.refined`; x (N, n) -> scale (N), codes (N, n) uint8."""
    x = x.t().contiguous()
    largest, magnitude = extreme(x)
    weights = x * x
    codes = nearest(divide(-half, largest) * x, -half, half - 1)
    sum_xl, sum_l2 = _in_order(weights * x * codes), _in_order(weights * codes * codes)
    for _ in range(n_passes):
        for i in range(len(x)):
            wx, w = weights[i] * x[i], weights[i]
            xl, l2 = sum_xl - wx * codes[i], sum_l2 - w * codes[i] * codes[i]
            code = nearest(x[i] * l2 / xl, -half, half - 1)
            changed = (xl > 0) & (code != codes[i])
            xl, l2 = xl + wx * code, l2 + w * code * code
            wins = changed & (l2 > 0) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            codes[i] = torch.where(wins, code, codes[i])
            sum_xl = torch.where(wins, xl, sum_xl)
            sum_l2 = torch.where(wins, l2, sum_l2)
    zero = magnitude < TINY
    scale = torch.where(~zero & (sum_l2 > 0), sum_xl / sum_l2, 0.0)
    return scale, codes.add_(half).masked_fill_(zero, 0).to(torch.uint8).t().contiguous()


def nonlinear(x: Tensor, weights: Tensor, *, values: Sequence[int], factors: Sequence[float]) -> Tensor:
    """See `reference.nonlinear`; x and weights (N, n) -> scale (N)."""
    x, weights = x.t().contiguous(), weights.t().contiguous()
    largest, magnitude = extreme(x)
    table = torch.tensor(values, dtype=torch.float32, device=x.device)
    scale = best = torch.zeros_like(largest)
    for number, factor in enumerate([None, *factors]):
        iscale = divide(1, divide(-largest, values[0])) if factor is None else divide(factor, largest)
        levels = table[nearest_value(iscale * x, values)]
        weighted = weights * levels
        sum_xq, sum_q2 = _in_order(weighted * x), _in_order(weighted * levels)
        this_scale = torch.where(sum_q2 > 0, sum_xq / sum_q2, 0.0)
        wins = (
            (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2) if number else torch.ones_like(magnitude, dtype=torch.bool)
        )
        scale = torch.where(wins, this_scale, scale)
        best = torch.where(wins, this_scale * sum_xq, best)
    return scale.masked_fill(magnitude < TINY, 0)


def positive(x: Tensor, weights: Tensor, *, top: int, factors: Sequence[float], n_passes: int) -> tuple[Tensor, Tensor]:
    """See `reference.positive`; x and weights (N, n) -> scale (N), codes (N, n) uint8."""
    x, weights = x.t().contiguous(), weights.t().contiguous()
    high = x.amax(0).clamp_(min=0)
    best_iscale = best = torch.zeros_like(high)
    for number, factor in enumerate(factors):
        iscale = divide(factor, high)
        codes = _wrapped(nearest(iscale * x, None, None)) if number == 0 else nearest(iscale * x, None, top)
        diff = x - divide(1, iscale) * codes
        error = _in_order(weights * diff * diff)
        wins = error < best if number else torch.ones_like(high, dtype=torch.bool)
        best, best_iscale = torch.where(wins, error, best), torch.where(wins, iscale, best_iscale)
    codes = nearest(best_iscale * x, None, top)
    sum_xl, sum_l2 = _in_order(weights * x * codes), _in_order(weights * codes * codes)
    codes = _wrapped(codes)
    for _ in range(n_passes):
        for i in range(len(x)):
            wx, w = weights[i] * x[i], weights[i]
            xl, l2 = sum_xl - wx * codes[i], sum_l2 - w * codes[i] * codes[i]
            code = nearest(x[i] * l2 / xl, None, top)
            changed = (xl > 0) & (l2 > 0) & (code != codes[i])
            xl, l2 = xl + wx * code, l2 + w * code * code
            wins = changed & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            codes[i] = torch.where(wins, _wrapped(code), codes[i])
            sum_xl = torch.where(wins, xl, sum_xl)
            sum_l2 = torch.where(wins, l2, sum_l2)
    zero = high < TINY
    scale = torch.where(~zero & (sum_l2 > 0), sum_xl / sum_l2, 0.0)
    return scale, codes.masked_fill_(zero, 0).to(torch.uint8).t().contiguous()


def nearest(v: Tensor, low: int | None, high: int | None) -> Tensor:
    """Round half to even as ggml's nearest_int does, also where that overflows, and clamp; float32 in, float32 out."""
    codes = ((v + 12_582_912.0).view(torch.int32) & 0x007FFFFF).sub_(0x00400000)
    return (codes if low is None and high is None else codes.clamp_(low, high)).float()


def nearest_value(v: Tensor, values: Sequence[int]) -> Tensor:
    """Which of the 16 ascending values is nearest, the higher one of two, as ggml's best_index_int8; int64."""
    table = torch.tensor(values, dtype=torch.float32, device=v.device)
    above = torch.bucketize(v, table, right=True).clamp_(1, 15)
    index = above - (v - table[above - 1] < table[above] - v).long()
    return torch.where(v <= table[0], 0, torch.where(v >= table[15], 15, index))


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """a / b, rounded once, where one of them may be a number."""
    device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
    a, b = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (a, b))
    return torch.div(a.expand(b.shape) if a.dim() == 0 else a, b.expand(a.shape) if b.dim() == 0 else b)


def root(v: Tensor) -> Tensor:
    """The square root, rounded once: torch's own of a float32 may be one unit in the last place off on the CPU (MKL)."""
    return v.double().sqrt().float()


def _in_order(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


def extreme(x: Tensor) -> tuple[Tensor, Tensor]:
    """The element of largest magnitude of each column, the first of several, and the magnitude."""
    largest = magnitude = torch.zeros_like(x[0])
    for row in x:
        size = row.abs()
        larger = size > magnitude
        largest, magnitude = torch.where(larger, row, largest), torch.where(larger, size, magnitude)
    return largest, magnitude


def _wrapped(codes: Tensor) -> Tensor:
    """As an unsigned byte keeps them: ggml stores them so."""
    return (codes.int() & 0xFF).float()
