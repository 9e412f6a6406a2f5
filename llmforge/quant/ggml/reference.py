"""How ggml rounds a sub-block, one sub-block at a time, in plain Python: to be read, and to hold the fast forms to it.

A sub-block is 16 or 32 neighbouring weights that share a scale. Each search here looks for the scale (and the minimum) with the
least weighted error; everything after that (rounding the scales themselves, packing bits) is in `types`.

Bytes are llama.cpp's only if every operation is one float32 operation, in its order: no fused multiply-add, sums element by
element, `w * l * l` as `(w * l) * l`. Here numpy's float32 scalars do that; `vectorized` and `kernels.c` do the same.

Source: ggml/src/ggml-quants.c of llama.cpp (make_qkx2_quants, make_qkx3_quants, make_qx_quants, make_q3_quants, make_qp_quants,
quantize_row_iq4_nl_impl).
"""

# mypy: disable-error-code="no-any-return"
# (numpy's scalars are Any in arithmetic)

from collections.abc import Sequence

import numpy as np
from numpy import float32 as f32

TINY = f32(1e-15)  # ggml's GROUP_MAX_EPS: below it a sub-block is zero


def nearest(v: np.float32) -> int:
    """The nearest integer, half to even: 1.5 * 2^23 is added, and the integer is read from the mantissa."""
    return int((v + f32(12_582_912.0)).view(np.int32) & 0x007FFFFF) - 0x00400000


def clamp(code: int, low: int, high: int) -> int:
    """The code, at least low and at most high."""
    return max(low, min(high, code))


def sums(x: Sequence[np.float32], *, squares: bool = False) -> np.float32:
    """The sum of the elements, or of their squares, in order."""
    total = f32(0)
    for v in x:
        total += v * v if squares else v
    return total


def plain(x: Sequence[np.float32], *, half: int, top: int) -> tuple[np.float32, np.float32, list[int]]:
    """Blocks without a search. For Q4_0, Q5_0, Q8_0 (half 8, 16, 128) and Q4_1, Q5_1 (half 0).

    Returns:
        d, the lowest value, codes 0..top: x is close to d * (code - half), or, where half is 0, to d * code + lowest.
    """
    low, high, largest = min(x), max(x), _extreme(x)
    if half == 128:
        d = abs(largest) / f32(127)
    else:
        d = largest / f32(-half) if half else (high - low) / f32(top)
    inverse = f32(1) / d if d != 0 else f32(0)
    codes = []
    for v in x:
        scaled = (v if half else v - low) * inverse
        if not np.isfinite(scaled):
            code = 128 if half == 128 else 0
        elif half == 128:  # half away from zero
            code = 128 + int(np.copysign(np.floor(abs(float(scaled)) + 0.5), scaled))
        else:
            code = int(scaled + f32(half + 0.5))
        codes.append(min(code, top))
    return d, low, codes


def magnitudes(x: Sequence[np.float32]) -> list[np.float32]:
    """Weights of the errors without importance: the root mean square of the sub-block + |x|."""
    root = np.sqrt(sums(x, squares=True) / f32(len(x)))
    return [root + abs(v) for v in x]


def important(x: Sequence[np.float32], importance: Sequence[np.float32], sigma2: np.float32) -> list[np.float32]:
    """Weights of the errors with importance; sigma2 is a mean square of the neighbourhood."""
    return [w * np.sqrt(sigma2 + v * v) for w, v in zip(importance, x, strict=True)]


def recode(
    x: Sequence[np.float32], step: np.float32, offset: np.float32, codes: Sequence[int], *, low: int, high: int
) -> list[int]:
    """Codes, counted from low, for the scale that was rounded itself; those of the search where it is rounded to 0."""
    return [clamp(nearest((v + offset) / step), low, high) - low for v in x] if step != 0 else list(codes)


def affine(
    x: Sequence[np.float32],
    weights: Sequence[np.float32],
    *,
    top: int,
    factors: Sequence[np.float32],
    absolute: bool = False,
) -> tuple[np.float32, np.float32, list[int]]:
    """x is close to scale * code - minimum, code 0..top. For Q2_K, Q4_K, Q5_K, Q4_1 and Q5_1.

    Each factor spreads the range over that many steps, and a weighted line is fitted through (code, x). The best line so far also
    gives the minimum that the next candidates start from: the order of the factors matters.

    Args:
        absolute: the error is |difference|, not its square.
    Returns:
        scale, minimum (0 or more), codes.
    """
    n = range(len(x))
    low, high = min(x), max(x)
    sum_w, sum_x = sums(weights), sums([w * v for w, v in zip(weights, x, strict=True)])
    low = min(low, f32(0))
    if high == low:
        return f32(0), -low, [0 for _ in n]

    def error(scale: np.float32, codes: list[int], low: np.float32) -> np.float32:
        diffs = [scale * f32(codes[i]) + low - x[i] for i in n]
        return sums([weights[i] * (abs(diffs[i]) if absolute else diffs[i] * diffs[i]) for i in n])

    iscale = f32(top) / (high - low)
    scale = f32(1) / iscale
    codes = [clamp(nearest(iscale * (v - low)), 0, top) for v in x]
    best = error(scale, codes, low)
    for factor in factors:
        iscale = factor / (high - low)
        tried = [clamp(nearest(iscale * (v - low)), 0, top) for v in x]
        weighted = [weights[i] * f32(tried[i]) for i in n]
        sum_l = sums(weighted)
        sum_l2 = sums([weighted[i] * f32(tried[i]) for i in n])
        sum_xl = sums([weighted[i] * x[i] for i in n])
        det = sum_w * sum_l2 - sum_l * sum_l
        if not det > 0:
            continue
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / det
        if this_low > 0:
            this_scale, this_low = sum_xl / sum_l2, f32(0)
        this_error = error(this_scale, tried, this_low)
        if this_error < best:
            best, scale, low, codes = this_error, this_scale, this_low, tried
    return scale, -low, codes


def symmetric(
    x: Sequence[np.float32], weights: Sequence[np.float32], *, half: int, factors: Sequence[np.float32]
) -> tuple[np.float32, list[int]]:
    """x is close to scale * (code - half), code 0..2 half - 1. For Q6_K; with importance Q3_K, Q4_0 and Q5_0 too.

    Each factor maps the element of largest magnitude there, usually near -half; the scale is then a weighted least squares fit.
    """
    n = range(len(x))
    extreme = _extreme(x)
    if abs(extreme) < TINY:
        return f32(0), [0 for _ in n]
    scale, best, codes = f32(0), f32(0), []
    for number, factor in enumerate(factors):
        iscale = factor / extreme
        tried = [clamp(nearest(iscale * v), -half, half - 1) for v in x]
        sum_xl = sums([weights[i] * x[i] * f32(tried[i]) for i in n])
        sum_l2 = sums([weights[i] * f32(tried[i]) * f32(tried[i]) for i in n])
        if number == 0:
            scale = sum_xl / sum_l2 if sum_l2 != 0 else f32(0)
        elif sum_l2 > 0 and sum_xl * sum_xl > best * sum_l2:
            scale = sum_xl / sum_l2
        else:
            continue
        best, codes = scale * sum_xl, tried
    return scale, [code + half for code in codes]


def refined(x: Sequence[np.float32], *, half: int, n_passes: int) -> tuple[np.float32, list[int]]:
    """x is close to scale * (code - half); each code in turn moves where that helps the fit. For Q3_K."""
    n = range(len(x))
    extreme = _extreme(x)
    if abs(extreme) < TINY:
        return f32(0), [0 for _ in n]
    iscale = f32(-half) / extreme
    codes = [clamp(nearest(iscale * v), -half, half - 1) for v in x]
    weights = [v * v for v in x]
    sum_xl = sums([weights[i] * x[i] * f32(codes[i]) for i in n])
    sum_l2 = sums([weights[i] * f32(codes[i]) * f32(codes[i]) for i in n])
    for _ in range(n_passes):
        for i in n:
            xl = sum_xl - weights[i] * x[i] * f32(codes[i])
            l2 = sum_l2 - weights[i] * f32(codes[i]) * f32(codes[i])
            if not xl > 0:
                continue
            code = clamp(nearest(x[i] * l2 / xl), -half, half - 1)
            xl += weights[i] * x[i] * f32(code)
            l2 += weights[i] * f32(code) * f32(code)
            if code != codes[i] and l2 > 0 and xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                codes[i], sum_xl, sum_l2 = code, xl, l2
    return sum_xl / sum_l2 if sum_l2 > 0 else f32(0), [code + half for code in codes]


def nonlinear(
    x: Sequence[np.float32], weights: Sequence[np.float32], *, values: Sequence[int], factors: Sequence[np.float32]
) -> np.float32:
    """The scale for which x is closest to scale * one of 16 values. For IQ4_NL and IQ4_XS."""
    extreme = _extreme(x)
    if abs(extreme) < TINY:
        return f32(0)
    n = range(len(x))
    scale, best = f32(0), f32(0)
    for number, iscale in enumerate([f32(1) / (-extreme / f32(values[0])), *(factor / extreme for factor in factors)]):
        levels = [f32(values[nearest_value(iscale * v, values)]) for v in x]
        sum_xq = sums([weights[i] * levels[i] * x[i] for i in n])
        sum_q2 = sums([weights[i] * levels[i] * levels[i] for i in n])
        if number == 0:
            scale = sum_xq / sum_q2 if sum_q2 > 0 else f32(0)
        elif sum_q2 > 0 and sum_xq * sum_xq > best * sum_q2:
            scale = sum_xq / sum_q2
        else:
            continue
        best = scale * sum_xq
    return scale


def positive(
    x: Sequence[np.float32], weights: Sequence[np.float32], *, top: int, factors: Sequence[np.float32], n_passes: int
) -> tuple[np.float32, list[int]]:
    """x (0 or more) is close to scale * code, code 0..top: how the scales of sub-blocks are rounded, with importance."""
    n = range(len(x))
    high = max(f32(0), *x)
    if high < TINY:
        return f32(0), [0 for _ in n]
    best, best_iscale = f32(0), f32(0)
    for number, factor in enumerate(factors):
        iscale = factor / high
        tried = [nearest(iscale * v) & 0xFF if number == 0 else min(top, nearest(iscale * v)) for v in x]
        diffs = [x[i] - f32(1) / iscale * f32(tried[i]) for i in n]
        error = sums([weights[i] * diffs[i] * diffs[i] for i in n])
        if number == 0 or error < best:
            best, best_iscale = error, iscale
    codes = [min(top, nearest(best_iscale * v)) for v in x]
    sum_xl = sums([weights[i] * x[i] * f32(codes[i]) for i in n])
    sum_l2 = sums([weights[i] * f32(codes[i]) * f32(codes[i]) for i in n])
    codes = [code & 0xFF for code in codes]  # ggml keeps them in a byte
    for _ in range(n_passes):
        for i in n:
            xl = sum_xl - weights[i] * x[i] * f32(codes[i])
            l2 = sum_l2 - weights[i] * f32(codes[i]) * f32(codes[i])
            if not (xl > 0 and l2 > 0):
                continue
            code = min(top, nearest(x[i] * l2 / xl))
            xl += weights[i] * x[i] * f32(code)
            l2 += weights[i] * f32(code) * f32(code)
            if code != codes[i] and xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                codes[i], sum_xl, sum_l2 = code & 0xFF, xl, l2
    return sum_xl / sum_l2 if sum_l2 > 0 else f32(0), codes


def nearest_value(v: np.float32, values: Sequence[int]) -> int:
    """Index of the nearest of ascending values; of two equally near, the higher."""
    if v <= values[0]:
        return 0
    if v >= values[-1]:
        return len(values) - 1
    above = next(index for index, value in enumerate(values) if v < value)
    return above - 1 if v - f32(values[above - 1]) < f32(values[above]) - v else above


def _extreme(x: Sequence[np.float32]) -> np.float32:
    """The element of largest magnitude, the first of several."""
    extreme = f32(0)
    for v in x:
        if abs(v) > abs(extreme):
            extreme = v
    return extreme
