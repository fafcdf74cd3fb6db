"""The INT8 product in Triton: levels of the activations, then whole numbers on tensor cores, scaled as they leave. To the bit
what `quant.int8_linear_reference` gives: sums of whole numbers depend on no order, and every rounding is that of IEEE.

Letters: M rows, I input width, O output width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _largest(x):
    """max |x| of one dimension; NaN where x holds one, which `tl.max` leaves out: a broken model must be seen to be broken."""
    return tl.max(tl.abs(x), 0) + tl.sum(tl.where(x == x, 0.0, x), 0)


@triton.jit
def _levels(x, levels, scales, I: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, ZERO: tl.constexpr):  # noqa: E741
    """int8 levels [M, I] and fp32 scales [M] of x [M, I] fp32, as `quant.token_levels` and `quant.token_scale`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    y = tl.load(x + row * I + at, mask=at < I, other=0)
    scale = tl.div_rn(_largest(y), 1.0 * TOP)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    level = tl.div_rn(y, scale + tl.zeros_like(y)) + ZERO
    level = (level + 12582912.0) - 12582912.0 - ZERO  # to the nearest whole number, ties to even
    level = tl.where(level == level, level, 0.0)  # the scale is NaN then, and so are the products
    level = tl.minimum(tl.maximum(level, -1.0 * ZERO), 1.0 * TOP)
    tl.store(levels + row * I + at, level.to(tl.int8), mask=at < I)
    tl.store(scales + row, scale)


@triton.jit
def _product(
    levels, weight, scales, weight_scales, out, M, O, I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """out [M, O] fp32 = (levels [M, I] times the transpose of weight [O, I]) * weight_scales [O] * scales [M]."""
    column, row = tl.program_id(0), tl.program_id(1)
    m, o, i = row * ROWS + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEEP)
    left = levels + m.to(tl.int64)[:, None] * I + i[None, :]
    right = weight + o.to(tl.int64)[None, :] * I + i[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, I, DEEP):
        inside = first + i < I
        a = tl.load(left + first, mask=(m < M)[:, None] & inside[None, :], other=0)
        b = tl.load(right + first, mask=(o < O)[None, :] & inside[:, None], other=0)
        total += tl.dot(a, b, out_dtype=tl.int32)
    found = total.to(tl.float32) * tl.load(weight_scales + o, mask=o < O, other=0)[None, :]
    found = found * tl.load(scales + m, mask=m < M, other=0)[:, None]
    tl.store(out + m.to(tl.int64)[:, None] * O + o[None, :], found, mask=(m < M)[:, None] & (o < O)[None, :])
