"""Products in fp32 and fp64 compiled for the CPU with numba: `fused` calls `product` with tensors, `kernels.layer` as a part of
a whole layer.

A tile of 4 rows x 4 outputs multiplies at the processor's full rate (100 GFLOP/s in fp32 on a core where oneDNN, with a packed
copy of the weight, comes to 60 at eight rows and to 100 from 32 on; docs/log.md). One and two rows are bound by memory, which
plain loops read fastest.

Letters: N rows, D input width, O output width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shoal.model import tiles
from shoal.model.compiled import fast
from shoal.model.tiles import I64

TILE = 4  # outputs of a tile
_HAS = tiles.features()
_BYTES = 64 if "avx512f" in _HAS else 32 if "avx" in _HAS else 16  # of a vector register
_ROWS = 2 if "sse2" in _HAS and _BYTES < 64 else 4  # of the largest tile: its sums fill half the registers


def _tile(rows: int) -> Any:
    """A function of the addresses of x, weights and results, the bytes of a row of the first two and from one row of results to
    the next, and a zero of the type: it fills `rows` x `TILE` results."""

    @intrinsic
    def tile(_typing: Any, x: Any, w: Any, out: Any, size: Any, stride: Any, zero: Any) -> Any:
        real = tiles.F32 if zero == types.float32 else tiles.F64
        vector = ir.VectorType(real, max(4, 8 * _BYTES // zero.bitwidth))
        name = f"llvm.fmuladd.v{vector.count}f{zero.bitwidth}"

        def step(builder: ir.IRBuilder, old: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
            return tiles.call(builder, name, vector, x, w, old)

        def code(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            x, w, out, size, stride, _ = args
            sums = tiles.sums(builder, x, w, size, rows, TILE, loaded=vector, held=vector, step=step, ahead=True)
            for m in range(rows):
                total = tiles.totals(builder, sums[m * TILE : (m + 1) * TILE], builder.fadd)
                place = tiles.place(builder, total.type, out, builder.mul(I64(m), stride))
                builder.store(total, place, align=1)
            return tiles.nothing()

        return types.void(*[types.intp] * 5, zero), code

    return tile


_largest, _tile_3, _tile_2, _tile_1 = (_tile(rows) for rows in (_ROWS, 3, 2, 1))


@fast
def _plain(x, weight, out):
    """As `product`: each weight is read once, in the order of memory, for two rows at a time."""
    rows, width = x.shape
    zero = x.dtype.type(0)
    for o in range(len(weight)):
        row = weight[o]
        for n in range(0, rows - 1, 2):
            first = second = zero
            for i in range(width):
                w = row[i]
                first += x[n, i] * w
                second += x[n + 1, i] * w
            out[n, o], out[n + 1, o] = first, second
        if rows % 2:
            last = zero
            for i in range(width):
                last += x[rows - 1, i] * row[i]
            out[rows - 1, o] = last


@fast
def product(x, weight, out):
    """out [N, O] = x [N, D] @ weight [O, D] transposed. From three rows on, a row's result does not depend on the others."""
    rows, width = x.shape
    size, outputs = width * x.itemsize, len(weight)
    if rows <= 2 or size % max(_BYTES, 4 * x.itemsize):
        _plain(x, weight, out)
        return
    zero, stride = x.dtype.type(0), outputs * x.itemsize
    a, w, y = x.ctypes.data, weight.ctypes.data, out.ctypes.data
    whole = outputs - outputs % TILE
    for _ in range(0, whole, TILE):
        m = 0
        while m + _ROWS <= rows:
            _largest(a + m * size, w, y + m * stride, size, stride, zero)
            m += _ROWS
        if rows - m == 3:
            _tile_3(a + m * size, w, y + m * stride, size, stride, zero)
        elif rows - m == 2:
            _tile_2(a + m * size, w, y + m * stride, size, stride, zero)
        elif rows - m == 1:
            _tile_1(a + m * size, w, y + m * stride, size, stride, zero)
        w, y = w + TILE * size, y + TILE * x.itemsize
    for m in range(rows):
        _plain(x[m : m + 1], weight[whole:], out[m : m + 1, whole:])
