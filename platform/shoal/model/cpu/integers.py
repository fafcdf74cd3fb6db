"""INT8 products compiled for the CPU with numba: rounding, the product in whole numbers, and scaling in one call. `int8` calls
it with tensors, and `decode.layer` as a part of a whole layer.

    u = round(x/s_x + 64), unsigned 7 bits       result = (sum u w_q - 64 sum w_q) s_w s_x

The weight is read as it is stored, [O, I] in int8: no packed copy. A tile of up to 4 rows x 4 outputs keeps its sums in vector
registers over the whole input width. One instruction multiplies and adds: VPDPBUSD where the CPU has AVX-512 VNNI, 64 products;
VPMADDUBSW on AVX2, whose 16-bit sums 7-bit levels cannot saturate (127 * 127 * 2 < 32768), and plain vectors elsewhere.

Letters: M rows, I input width, K the same rounded up to `STEP`, O output width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from shoal.model.cpu import tiles
from shoal.model.cpu.compiled import exact, finite
from shoal.model.cpu.tiles import F32, I8, I32, I64

STEP = 64  # bytes: rows of levels and weights are multiples of it
TILE = 4  # rows, and outputs, of the largest tile
_TINY = np.finfo(np.float32).tiny


def instructions() -> str:
    """Which of the three ways this CPU gets."""
    has = tiles.features()
    return "vnni" if {"avx512vnni", "avx512bw"} <= has else "avx2" if "avx2" in has else "plain"


_WAY = instructions()
_BYTES, _LANES = {"vnni": (64, 16), "avx2": (32, 8), "plain": (16, 16)}[_WAY]  # a load, and the sums that it feeds
_SUMS = ir.VectorType(I32, _LANES)


def _multiply_add(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    """`sums` + the products of unsigned bytes `x` and signed bytes `w`, four bytes (plain: one) to a sum."""
    if _WAY == "vnni":
        x, w = (builder.bitcast(v, _SUMS) for v in (x, w))
        return tiles.call(builder, "llvm.x86.avx512.vpdpbusd.512", _SUMS, sums, x, w)
    if _WAY == "avx2":
        pairs = ir.VectorType(ir.IntType(16), 16)
        ones = ir.Constant(pairs, [1] * 16)
        two = tiles.call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, x, w)
        return builder.add(sums, tiles.call(builder, "llvm.x86.avx2.pmadd.wd", _SUMS, two, ones))
    return builder.add(sums, builder.mul(builder.zext(x, _SUMS), builder.sext(w, _SUMS)))


def _tile(rows: int, outputs: int) -> Any:
    """A function of levels, weights, 64 times their sums, weight scales, row scales and results, all arrays, and of the first
    row and the first output: it fills `rows` x `outputs` results."""

    @intrinsic
    def tile(
        _typing: Any, x: Any, w: Any, shift: Any, w_scale: Any, x_scale: Any, out: Any, row: Any, output: Any
    ) -> Any:
        kinds = [tiles.rows_of(kind) for kind in (x, w, shift, w_scale, x_scale, out)]

        def code(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            *arrays, row, output = args
            places = (row,), (output,), (output,), (output,), (row,), (row, output)
            x, w, shift, w_scale, x_scale, out = (
                tiles.start(context, builder, kind, array, *at)
                for kind, array, at in zip(kinds, arrays, places, strict=True)
            )
            k, stride = (tiles.apart(context, builder, kinds[i], arrays[i]) for i in (0, 5))
            sums = tiles.sums(
                builder, x, w, k, rows, outputs, loaded=ir.VectorType(I8, _BYTES), held=_SUMS, step=_multiply_add,
                ahead=I64(tiles.AHEAD) if _WAY == "vnni" else None,
            )  # fmt: skip
            whole, real = ir.VectorType(I32, outputs), ir.VectorType(F32, outputs)
            shifts, scales = tiles.load(builder, whole, shift), tiles.load(builder, real, w_scale)
            for m in range(rows):
                total = tiles.totals(builder, sums[m * outputs : (m + 1) * outputs], builder.add)
                scale = tiles.load(builder, F32, x_scale, I64(4 * m))
                row_scale = ir.Constant(real, ir.Undefined)
                for o in range(outputs):
                    row_scale = builder.insert_element(row_scale, scale, I32(o))
                result = builder.fmul(builder.sitofp(builder.sub(total, shifts), real), scales)
                place = tiles.place(builder, real, out, builder.mul(I64(m), stride))
                builder.store(builder.fmul(result, row_scale), place, align=1)
            return tiles.nothing()

        return types.void(*kinds, types.intp, types.intp), code

    return tile


_tile_4, _tile_3, _tile_2, _tile_1, _single = (*(_tile(rows, TILE) for rows in (4, 3, 2, 1)), _tile(1, 1))


@finite
def peak(x):
    """Largest absolute value; NaN is for the caller to see."""
    most = x.dtype.type(0)
    for i in range(len(x)):
        most = max(most, abs(x[i]))
    return most


@exact
def _round(x, levels, scale):
    """levels [M, K] = round(x/s + 64), anything beyond I, and scale [M] = s = max |x| / 63, above 0 (NaN where x has one)."""
    rows, width = x.shape
    zero, low, high = x.dtype.type(64), x.dtype.type(0), x.dtype.type(127)
    for m in range(rows):
        most = peak(x[m])
        broken = False
        for i in range(width):
            broken |= x[m, i] != x[m, i]
        s = max(most / x.dtype.type(63), x.dtype.type(_TINY))
        scale[m] = x.dtype.type(np.nan) if broken else s
        for i in range(width):
            level = np.rint(x[m, i] / s + zero)
            # in this order NaN becomes 0, its row's scale is NaN
            levels[m, i] = np.uint8(np.int32(min(high, max(low, level))))


@exact.called
def linear(x, weight, shift, scale, out):
    """out [M, O] for x [M, I]: `weight` int8 [O, K], 0 beyond I, 64 times its row sums `shift` int32 [O], and `scale` [O]. As
    `quant.int8_linear_reference`, to the bit while sums stay below 2^31."""
    rows, (outputs, k) = len(x), weight.shape
    levels, row_scale = np.empty((rows, k), np.uint8), np.empty(rows, np.float32)
    _round(x, levels, row_scale)
    o = 0
    while rows > 1 and o + TILE <= outputs:  # one row is bound by memory, which is read fastest in its own order
        m = 0
        while m + TILE <= rows:
            _tile_4(levels, weight, shift, scale, row_scale, out, m, o)
            m += TILE
        if rows - m == 3:
            _tile_3(levels, weight, shift, scale, row_scale, out, m, o)
        elif rows - m == 2:
            _tile_2(levels, weight, shift, scale, row_scale, out, m, o)
        elif rows - m == 1:
            _tile_1(levels, weight, shift, scale, row_scale, out, m, o)
        o += TILE
    while o < outputs:
        for m in range(rows):
            _single(levels, weight, shift, scale, row_scale, out, m, o)
        o += 1
