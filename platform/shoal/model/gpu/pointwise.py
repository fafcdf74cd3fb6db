"""Norm and activation in Triton, in one launch each; sums in fp32 (fp64 for fp64). Letters: N rows, D width, F inner width."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _norm(
    x, added, weight, total, out, eps, D: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr, EXACT: tl.constexpr
):
    """out [N, D] = rms norm of x, or of total = x + added, which is stored as well."""
    row = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    at = tl.arange(0, WIDE)
    y = tl.load(x + row * D + at, mask=at < D, other=0).to(kind)
    if ADDS:
        y += tl.load(added + row * D + at, mask=at < D, other=0).to(kind)
        rounded = y.to(total.dtype.element_ty)
        tl.store(total + row * D + at, rounded, mask=at < D)
        y = rounded.to(kind)
    scale = 1.0 / tl.sqrt(tl.sum(y * y, 0) / D + eps)
    y = y * scale * tl.load(weight + at, mask=at < D, other=0).to(kind)
    tl.store(out + row * D + at, y.to(out.dtype.element_ty), mask=at < D)


@triton.jit
def _swiglu(both, out, F: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr):
    """out [N, F] = silu(gate) * up of both [N, 2F], gate first."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    gate = tl.load(both + row * 2 * F + at, mask=at < F, other=0).to(kind)
    up = tl.load(both + row * 2 * F + F + at, mask=at < F, other=0).to(kind)
    found = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * F + at, found.to(out.dtype.element_ty), mask=at < F)
