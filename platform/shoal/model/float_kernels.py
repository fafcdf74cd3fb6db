"""Products in fp32 and fp64 compiled for the CPU with numba: `fused` calls `product` with tensors; `kernels.layer` and
`attention_kernels` call them as parts of their own.

A tile of 4 rows x 4 outputs multiplies at the processor's full rate (100 GFLOP/s in fp32 on a core where oneDNN, with a packed
copy of the weight, comes to 60 at eight rows and to 100 from 32 on; docs/log.md). One and two rows are bound by memory, which
plain loops read fastest.

Letters: N rows, D input width, O output width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types

from shoal.model import tiles
from shoal.model.compiled import fast
from shoal.model.tiles import I64

intrinsic: Any = extending.intrinsic  # callers leave out the first argument, which its type does not say
TILE = 4  # outputs of a tile
COLUMNS = 2  # vectors of a result that `weigh` keeps in registers
_HAS = tiles.features()
_BYTES = 64 if "avx512f" in _HAS else 32 if "avx" in _HAS else 16  # of a vector register
_ROWS = 2 if "sse2" in _HAS and _BYTES < 64 else 4  # of the largest tile: its sums fill half the registers
_AHEAD, _LINE = tiles.AHEAD, 64


def _vector(number: Any) -> ir.VectorType:
    """Of numbers of numba's type `number`: a register, and at least as many as `tiles.totals` takes."""
    return ir.VectorType(tiles.F32 if number == types.float32 else tiles.F64, max(4, 8 * _BYTES // number.bitwidth))


def _multiply_add(builder: ir.IRBuilder, sums: ir.Value, x: ir.Value, w: ir.Value) -> ir.Value:
    name = f"llvm.fmuladd.v{sums.type.count}f{32 if sums.type.element == tiles.F32 else 64}"
    return tiles.call(builder, name, sums.type, x, w, sums)


def _tile(rows: int, outputs: int) -> Any:
    """A function of the addresses of x, w and results; of the bytes of a row of x, from one row of w to the next, likewise of
    the results, and to fetch ahead; and of a zero of the type: it fills `rows` x `outputs` results."""

    @intrinsic
    def tile(_typing: Any, x: Any, w: Any, out: Any, size: Any, apart: Any, stride: Any, ahead: Any, zero: Any) -> Any:
        vector = _vector(zero)

        def code(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            x, w, out, size, apart, stride, ahead, _ = args
            sums = tiles.sums(
                builder, x, w, size, rows, outputs, loaded=vector, held=vector, step=_multiply_add, apart=apart, ahead=ahead
            )  # fmt: skip
            for m in range(rows):
                total = tiles.totals(builder, sums[m * outputs : (m + 1) * outputs], builder.fadd)
                place = tiles.place(builder, total.type, out, builder.mul(I64(m), stride))
                builder.store(total, place, align=1)
            return tiles.nothing()

        return types.void(*[types.intp] * 7, zero), code

    return tile


_largest, _tile_3, _tile_2, _tile_1 = (_tile(rows, TILE) for rows in (_ROWS, 3, 2, 1))
_single = _tile(1, 1)


@intrinsic
def _weigh(_typing: Any, weights: Any, x: Any, out: Any, count: Any, stride: Any, zero: Any) -> Any:
    """A function of the addresses of `count` weights, of the first row of x and of the result, and the bytes from one row of x
    to the next: it adds the weighted sum of COLUMNS vectors of the rows to the result."""
    vector = _vector(zero)
    size = vector.count * zero.bitwidth // 8

    def code(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        weights, x, out, count, stride, _ = args
        before, loop = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        first = [tiles.load(builder, vector, out, I64(c * size)) for c in range(COLUMNS)]
        builder.branch(loop)
        builder.position_at_end(loop)
        at, old = builder.phi(tiles.I64), [builder.phi(vector) for _ in first]
        weight = tiles.load(builder, vector.element, weights, builder.mul(at, I64(zero.bitwidth // 8)))
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, tiles.I32(0))
        all_ = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(tiles.I32, vector.count), [0] * vector.count))
        rows = [tiles.load(builder, vector, x, builder.mul(at, stride), I64(c * size)) for c in range(COLUMNS)]
        new = [_multiply_add(builder, sums, all_, row) for sums, row in zip(old, rows, strict=True)]
        next_ = builder.add(at, I64(1))
        for phi, start, then in ((at, I64(0), next_), *zip(old, first, new, strict=True)):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", next_, count), loop, after)
        builder.position_at_end(after)
        for c, sums in enumerate(new):
            builder.store(sums, tiles.place(builder, vector, out, I64(c * size)), align=1)
        return tiles.nothing()

    return types.void(*[types.intp] * 5, zero), code


@intrinsic
def _line(_typing: Any, address: Any) -> Any:
    def code(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        tiles.fetch(builder, args[0])
        return tiles.nothing()

    return types.void(types.intp), code


@fast
def fetch(address, size):
    """Ask for `size` bytes that are read soon, so that memory is not waited for line by line."""
    for at in range(0, size, _LINE):
        _line(address + at)


@fast
def fits(size, item):
    """Are `size` bytes of numbers of `item` bytes whole vectors?"""
    return size % max(_BYTES, 4 * item) == 0


@fast
def dots(x, rows, w, count, size, apart, out, stride, ahead, zero, item):
    """The products of `rows` rows at the address x and `count` rows of w: each of `size` bytes that `fits`, those of w `apart`
    bytes from each other; results of a row of x side by side, `stride` bytes from row to row. Fetches w `ahead` bytes ahead.
    `zero` and `item`: of the type, and its bytes."""
    o = 0
    while o + TILE <= count:
        m = 0
        while m + _ROWS <= rows:
            _largest(x + m * size, w, out + m * stride, size, apart, stride, ahead, zero)
            m += _ROWS
        if rows - m == 3:
            _tile_3(x + m * size, w, out + m * stride, size, apart, stride, ahead, zero)
        elif rows - m == 2:
            _tile_2(x + m * size, w, out + m * stride, size, apart, stride, ahead, zero)
        elif rows - m == 1:
            _tile_1(x + m * size, w, out + m * stride, size, apart, stride, ahead, zero)
        o, w, out = o + TILE, w + TILE * apart, out + TILE * item
    while o < count:
        for m in range(rows):
            _single(x + m * size, w, out + m * stride, size, apart, stride, ahead, zero)
        o, w, out = o + 1, w + apart, out + item


@fast
def weigh(weights, x, count, size, stride, out, zero, item):
    """Add the sum of `count` rows of `size` bytes at the address x, `stride` bytes apart, each times its weight, to the row at
    `out`. Half of `size` must be such that it `fits`."""
    step = COLUMNS * max(_BYTES, 4 * item)
    for c in range(0, size, step):
        _weigh(weights, x + c, out + c, count, stride, zero)


@fast
def product(x, weight, out):
    """out [N, O] = x [N, D] @ weight [O, D] transposed. From three rows on, a row's result does not depend on the others."""
    rows, width = x.shape
    zero, item = x.dtype.type(0), x.itemsize
    if rows > 2 and fits(width * item, item):
        size, stride = width * item, len(weight) * item
        a, w, y = x.ctypes.data, weight.ctypes.data, out.ctypes.data
        dots(a, rows, w, len(weight), size, size, y, stride, _AHEAD, zero, item)
        return
    for o in range(len(weight)):  # each weight once, in the order of memory, for two rows at a time
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
