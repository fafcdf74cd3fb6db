"""INT8 products compiled for the CPU with numba: rounding, the product in whole numbers, and scaling in one call. `int8` calls
it with tensors, and `kernels.layer` as a part of a whole layer.

    u = round(x/s_x + 64), unsigned 7 bits       result = (sum u w_q - 64 sum w_q) s_w s_x

The weight is read as it is stored, [O, I] in int8: no packed copy. A tile of up to 4 rows x 4 outputs keeps its sums in vector
registers over the whole input width. One instruction multiplies and adds: VPDPBUSD where the CPU has AVX-512 VNNI, 64 products;
VPMADDUBSW on AVX2, whose 16-bit sums 7-bit levels cannot saturate (127 * 127 * 2 < 32768), and plain vectors elsewhere.

Letters: M rows, I input width, K the same rounded up to `STEP`, O output width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from shoal.model.compiled import exact, peak

STEP = 64  # bytes: rows of levels and weights are multiples of it
TILE = 4  # rows, and outputs, of the largest tile
_AHEAD = 4096  # bytes of weights that are fetched ahead, in the order of memory: two to three times as fast as none
_TINY = np.finfo(np.float32).tiny
_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


def instructions() -> str:
    """Which of the three ways this CPU gets (or the one that NUMBA_CPU_FEATURES describes)."""
    described = config.CPU_FEATURES  # type: ignore[attr-defined]
    if described is not None:
        has = {name.removeprefix("+") for name in described.split(",") if name.startswith("+")}
    else:
        has = {name for name, there in binding.get_host_cpu_features().items() if there}
    return "vnni" if {"avx512vnni", "avx512bw"} <= has else "avx2" if "avx2" in has else "plain"


_WAY = instructions()
_BYTES, _LANES = {"vnni": (64, 16), "avx2": (32, 8), "plain": (16, 16)}[_WAY]  # a load, and the sums that it feeds
_SUMS = ir.VectorType(_I32, _LANES)


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _multiply_add(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    """`sums` + the products of unsigned bytes `x` and signed bytes `w`, four bytes (plain: one) to a sum."""
    if _WAY == "vnni":
        x, w = (builder.bitcast(v, _SUMS) for v in (x, w))
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _SUMS, sums, x, w)
    if _WAY == "avx2":
        pairs = ir.VectorType(ir.IntType(16), 16)
        ones = ir.Constant(pairs, [1] * 16)
        two = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, x, w)
        return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", _SUMS, two, ones))
    return builder.add(sums, builder.mul(builder.zext(x, _SUMS), builder.sext(w, _SUMS)))


def _totals(builder: ir.IRBuilder, sums: list[ir.Value]) -> ir.Value:
    """The sum over each of 1 or 4 vectors, as one vector of as many. Four are added while they are transposed: 13 operations
    instead of 40, where a tile of 768 inputs multiplies 192 times."""
    if len(sums) == 1:
        one = _call(builder, f"llvm.vector.reduce.add.v{_LANES}i32", _I32, sums[0])
        return builder.insert_element(ir.Constant(ir.VectorType(_I32, 1), ir.Undefined), one, _I32(0))

    def added(a: ir.Value, b: ir.Value, first: list[int], second: list[int]) -> ir.Value:
        one, other = (ir.Constant(ir.VectorType(_I32, len(at)), at) for at in (first, second))
        return builder.add(builder.shuffle_vector(a, b, one), builder.shuffle_vector(a, b, other))

    def mixed(a: ir.Value, b: ir.Value, low: tuple[int, ...], high: tuple[int, ...]) -> ir.Value:
        """Within each four: places `low` of both vectors side by side, plus places `high`; 4 and more are of `b`."""
        spread = [
            [at % 4 + four + _LANES * (at // 4) for four in range(0, _LANES, 4) for at in way] for way in (low, high)
        ]
        return added(a, b, *spread)

    first, second = (mixed(a, b, (0, 4, 1, 5), (2, 6, 3, 7)) for a, b in (sums[:2], sums[2:]))
    total = mixed(first, second, (0, 1, 4, 5), (2, 3, 6, 7))
    width = _LANES
    while width > 4:
        width //= 2
        total = added(total, total, list(range(width)), list(range(width, 2 * width)))
    return total


def _tile(rows: int, outputs: int) -> Any:
    """A function of the addresses of levels, weights, 64 times their sums, weight scales, row scales and results, and of K and
    the bytes from one row of results to the next: it fills `rows` x `outputs` results."""

    @intrinsic
    def tile(
        _typing: Any, x: Any, w: Any, shift: Any, w_scale: Any, x_scale: Any, out: Any, k: Any, stride: Any
    ) -> Any:
        def code(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            x, w, shift, w_scale, x_scale, out, k, stride = args

            def load(kind: ir.Type, start: ir.Value, *offsets: ir.Value) -> ir.Value:
                for offset in offsets:
                    start = builder.add(start, offset)
                return builder.load(builder.inttoptr(start, kind.as_pointer()), align=1)

            def times(count: int, value: ir.Value) -> ir.Value:
                return builder.mul(value, _I64(count))

            before, loop = builder.block, builder.append_basic_block("k")
            after = builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            at = builder.phi(_I64)
            sums = [builder.phi(_SUMS) for _ in range(rows * outputs)]
            bytes_ = ir.VectorType(_I8, _BYTES)
            weights = [load(bytes_, w, times(o, k), at) for o in range(outputs)]
            for o in range(outputs) if _WAY == "vnni" else ():
                ahead = builder.add(builder.add(w, times(outputs, at)), _I64(_AHEAD + o * _BYTES))
                ahead = builder.inttoptr(ahead, _I8.as_pointer())
                _call(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, _I32(0), _I32(3), _I32(1))
            new = []
            for m in range(rows):
                levels = load(bytes_, x, times(m, k), at)
                new += [_multiply_add(builder, sums[m * outputs + o], levels, weights[o]) for o in range(outputs)]
            next_ = builder.add(at, _I64(_BYTES))
            at.add_incoming(_I64(0), before)
            at.add_incoming(next_, loop)
            for old, changed in zip(sums, new, strict=True):
                old.add_incoming(ir.Constant(_SUMS, [0] * _LANES), before)
                old.add_incoming(changed, loop)
            builder.cbranch(builder.icmp_signed("<", next_, k), loop, after)
            builder.position_at_end(after)

            whole, real = ir.VectorType(_I32, outputs), ir.VectorType(_F32, outputs)
            shifts, scales = load(whole, shift), load(real, w_scale)
            for m in range(rows):
                total = _totals(builder, new[m * outputs : (m + 1) * outputs])
                scale = load(_F32, x_scale, _I64(4 * m))
                row_scale = ir.Constant(real, ir.Undefined)
                for o in range(outputs):
                    row_scale = builder.insert_element(row_scale, scale, _I32(o))
                result = builder.fmul(builder.sitofp(builder.sub(total, shifts), real), scales)
                place = builder.inttoptr(builder.add(out, times(m, stride)), real.as_pointer())
                builder.store(builder.fmul(result, row_scale), place, align=1)
            return cgutils.get_null_value(ir.LiteralStructType([]).as_pointer())

        return types.void(*[types.intp] * 8), code

    return tile


_tile_4, _tile_3, _tile_2, _tile_1, _single = (*(_tile(rows, TILE) for rows in (4, 3, 2, 1)), _tile(1, 1))


@exact
def _round(x, levels, scale):
    """levels [M, K] = round(x/s + 64), 0 beyond I, and scale [M] = s = max |x| / 63, above 0 (NaN where x has one)."""
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
            levels[m, i] = np.uint8(
                np.int32(min(high, max(low, level)))
            )  # in this order NaN becomes 0, its row's scale is NaN
        levels[m, width:] = 0


@exact
def linear(x, weight, shift, scale, out):
    """out [M, O] for x [M, I]: `weight` int8 [O, K], 64 times its row sums `shift` int32 [O], and `scale` [O]. As
    `quant.int8_linear_reference`, to the bit while sums stay below 2^31."""
    rows, (outputs, k) = len(x), weight.shape
    levels, row_scale = np.empty((rows, k), np.uint8), np.empty(rows, np.float32)
    _round(x, levels, row_scale)
    a, w, h, s, r, y = (
        levels.ctypes.data,
        weight.ctypes.data,
        shift.ctypes.data,
        scale.ctypes.data,
        row_scale.ctypes.data,
        out.ctypes.data,
    )
    o, stride = 0, 4 * outputs
    while rows > 1 and o + TILE <= outputs:  # one row is bound by memory, which is read fastest in its own order
        m = 0
        while m + TILE <= rows:
            _tile_4(a + m * k, w, h, s, r + 4 * m, y + m * stride, k, stride)
            m += TILE
        if rows - m == 3:
            _tile_3(a + m * k, w, h, s, r + 4 * m, y + m * stride, k, stride)
        elif rows - m == 2:
            _tile_2(a + m * k, w, h, s, r + 4 * m, y + m * stride, k, stride)
        elif rows - m == 1:
            _tile_1(a + m * k, w, h, s, r + 4 * m, y + m * stride, k, stride)
        w, h, s, y, o = w + TILE * k, h + 4 * TILE, s + 4 * TILE, y + 4 * TILE, o + TILE
    while o < outputs:
        for m in range(rows):
            _single(a + m * k, w, h, s, r + 4 * m, y + m * stride, k, stride)
        w, h, s, y, o = w + k, h + 4, s + 4, y + 4, o + 1
