"""Products in fp32 and fp64 compiled for the CPU with numba: `fused` calls `product` with tensors; `decode.layer` and
`attention` call them as parts of their own.

A tile of 4 rows x 4 outputs multiplies at the processor's full rate (100 GFLOP/s in fp32 on a core where oneDNN, with a packed
copy of the weight, comes to 60 at eight rows and to 100 from 32 on). One and two rows are bound by memory, which
plain loops read fastest.

Letters: N rows, D input width, O output width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from shoal.model.cpu import tiles
from shoal.model.cpu.compiled import fast
from shoal.model.cpu.tiles import I64

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
    """A function of the arrays x, w and out; of the first row of x, the first of w, the column of its result, and the bytes to
    fetch ahead: it fills `rows` x `outputs` results. Of wider rows of w it reads as many numbers as x has. Uint16 in w are
    bfloat16's bits."""

    @intrinsic
    def tile(_typing: Any, x: Any, w: Any, out: Any, row: Any, output: Any, column: Any, ahead: Any) -> Any:
        kinds = [tiles.rows_of(kind) for kind in (x, w, out)]
        vector, narrow = _vector(x.dtype), w.dtype == types.uint16

        def code(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
            *arrays, row, output, column, ahead = args
            x, w, out = (
                tiles.start(context, builder, kind, array, *at)
                for kind, array, at in zip(kinds, arrays, ((row,), (output,), (row, column)), strict=True)
            )
            size, apart, stride = (tiles.apart(context, builder, *pair) for pair in zip(kinds, arrays, strict=True))
            sums = tiles.sums(
                builder, x, w, size, rows, outputs, loaded=vector, held=vector, step=_multiply_add, apart=apart, ahead=ahead,
                narrow=narrow,
            )  # fmt: skip
            for m in range(rows):
                total = tiles.totals(builder, sums[m * outputs : (m + 1) * outputs], builder.fadd)
                place = tiles.place(builder, total.type, out, builder.mul(I64(m), stride))
                builder.store(total, place, align=1)
            return tiles.nothing()

        return types.void(*kinds, *[types.intp] * 4), code

    return tile


_largest, _tile_3, _tile_2, _tile_1 = (_tile(rows, TILE) for rows in (_ROWS, 3, 2, 1))
_single = _tile(1, 1)


@intrinsic
def _weigh(_typing: Any, weights: Any, x: Any, out: Any, column: Any, to: Any) -> Any:
    """A function of the arrays weights, x and out; of a column of x, and of a place in out: it adds the sum of the rows of x
    from that column on, each times its weight, over COLUMNS vectors, to what is there. There is a row of x at least; of uint16
    they are bfloat16's bits."""
    kinds = [tiles.rows_of(kind) for kind in (weights, x, out)]
    number, item = weights.dtype, x.dtype.bitwidth // 8
    vector = _vector(number)
    size = vector.count * number.bitwidth // 8
    places = ir.VectorType(tiles.I32, vector.count)
    read = tiles.load_wide if x.dtype == types.uint16 else tiles.load

    def code(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        *arrays, column, to = args
        stride = tiles.apart(context, builder, kinds[1], arrays[1])
        made = context.make_array(kinds[1])(context, builder, arrays[1])
        count = cgutils.unpack_tuple(builder, made.shape, 2)[0]
        weights, x, out = (
            tiles.start(context, builder, kind, array, *at)
            for kind, array, at in zip(kinds, arrays, ((), (I64(0), column), (to,)), strict=True)
        )
        before, loop = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        first = [tiles.load(builder, vector, out, I64(c * size)) for c in range(COLUMNS)]
        builder.branch(loop)
        builder.position_at_end(loop)
        at, old = builder.phi(tiles.I64), [builder.phi(vector) for _ in first]
        weight = tiles.load(builder, vector.element, weights, builder.mul(at, I64(number.bitwidth // 8)))
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, tiles.I32(0))
        all_ = builder.shuffle_vector(one, one, ir.Constant(places, [0] * vector.count))
        rows = [read(builder, vector, x, builder.mul(at, stride), I64(c * vector.count * item)) for c in range(COLUMNS)]
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

    return types.void(*kinds, types.intp, types.intp), code


@intrinsic
def _line(_typing: Any, x: Any, offset: Any) -> Any:
    """A function of an array and of bytes from its beginning: it asks for the line there."""
    kind = tiles.rows_of(x)

    def code(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        tiles.fetch(builder, tiles.start(context, builder, kind, args[0]), args[1])
        return tiles.nothing()

    return types.void(kind, types.intp), code


@fast
def fetch(x):
    """Ask for all of x, which is read soon, so that memory is not waited for line by line."""
    for at in range(0, x.size * x.itemsize, _LINE):
        _line(x, at)


@fast
def fits(count, item):
    """Are `count` numbers of `item` bytes whole vectors?"""
    return count % max(_BYTES // item, 4) == 0


@fast
def dots(x, w, out, column, ahead):
    """out [N, column ..] = the products of the rows of x [N, D] and those of w [O, D or wider], whose first D numbers count. D
    numbers are such that they `fit`. Fetches w `ahead` bytes ahead."""
    rows, count = len(x), len(w)
    o = 0
    while o + TILE <= count:
        m = 0
        while m + _ROWS <= rows:
            _largest(x, w, out, m, o, column + o, ahead)
            m += _ROWS
        if rows - m == 3:
            _tile_3(x, w, out, m, o, column + o, ahead)
        elif rows - m == 2:
            _tile_2(x, w, out, m, o, column + o, ahead)
        elif rows - m == 1:
            _tile_1(x, w, out, m, o, column + o, ahead)
        o += TILE
    while o < count:
        for m in range(rows):
            _single(x, w, out, m, o, column + o, ahead)
        o += 1


@fast
def weigh(weights, x, column, out):
    """Add the sum of the rows of x [N, ...] from `column` on, each times its weight [N], to out [D]. Half of D is such that it
    `fits`."""
    step = COLUMNS * max(_BYTES // out.itemsize, 4)
    for c in range(0, len(out), step):
        _weigh(weights, x, out, column + c, c)


@fast.called
def product(x, weight, out):
    """out [N, O] = x [N, D] @ weight [O, D] transposed. From three rows on, a row's result does not depend on the others."""
    rows, width = x.shape
    zero = x.dtype.type(0)
    if rows > 2 and fits(width, x.itemsize):
        dots(x, weight, out, 0, _AHEAD)
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


def widened(x):
    """x itself, or in fp32 where it is of bfloat16's bits."""


@extending.overload(widened)
def _widened(x):
    if x.dtype != types.uint16:
        return lambda x: x

    def wide(x):
        bits = np.empty(x.shape, np.uint32)
        for r in range(len(x)):
            for o in range(x.shape[1]):
                bits[r, o] = np.uint32(x[r, o]) << np.uint32(16)
        return bits.view(np.float32)

    return wide


def thinned(x, a, out):
    """As `product`, with a of bfloat16's bits as well."""


@extending.overload(thinned)
def _thinned(x, a, out):
    if a.dtype != types.uint16:
        return lambda x, a, out: product(x, a, out)

    def thin(x, a, out):
        if fits(x.shape[1], x.itemsize):
            dots(x, a, out, 0, _AHEAD)
        else:
            product(x, widened(a), out)

    return thin


@fast.called
def beside(x, numbers, places, of, out):
    """Adds to each row of out [N, O] its row of x [N, I] times the transpose of A [r, I], times B [r, O]: they begin at
    places[k, 0] and places[k, 1] of `numbers`, which are of x's kind or bfloat16's bits, r is places[k, 2], and k the row's
    number in `of` [N]; nothing where that is below 0. Rows of one number that follow each other share what is read."""
    inputs = x.shape[1]
    outputs = out.shape[1]
    whole = outputs % 2 == 0 and fits(outputs // 2, out.itemsize)
    start = 0
    while start < len(of):
        k, end = of[start], start + 1
        while end < len(of) and of[end] == k:
            end += 1
        if k >= 0 and places[k, 2] > 0:
            a, b, ranks = places[k, 0], places[k, 1], places[k, 2]
            wide = numbers[b : b + ranks * outputs].reshape(ranks, outputs)
            thin = np.empty((end - start, ranks), x.dtype)
            thinned(x[start:end], numbers[a : a + ranks * inputs].reshape(ranks, inputs), thin)
            for n in range(len(thin)):
                if whole:
                    weigh(thin[n], wide, 0, out[start + n])
                else:
                    full = widened(wide)
                    for r in range(len(full)):
                        for o in range(outputs):
                            out[start + n, o] += thin[n, r] * full[r, o]
        start = end
