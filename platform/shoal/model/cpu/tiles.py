"""Vector code for tiles of a product, made by hand in LLVM where no compiler makes it of a loop: what the products in fp and in
INT8 (`floats`, `integers`) share.

A tile of some rows of x and some rows of the weight keeps all its sums in vector registers over the whole input width, and
asks for the weights far ahead. Both are read as they are stored: no packed copy.

Such code takes arrays, never their addresses. numba frees an array after its last use, and knows of no use through a number: an
address that outlives its array reads what another thread has written there since. Only `start` makes addresses, within the
call that the array was given to and that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils, errors

I8, I32, I64, F32, F64 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_BYTES = {str(I8): 1, str(F32): 4, str(F64): 8}
# Bytes of a weight that are fetched ahead, in the order of memory, into the second cache: the first has room for too few that
# are on their way. 4 KiB into the first: half the speed of one thread at eight rows of fp32.
AHEAD = 16384

Values = list[ir.Value]
Step = Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]  # builder, sums, x, w -> sums
Add = Callable[[ir.Value, ir.Value], ir.Value]


def features() -> set[str]:
    """Instructions of this CPU by LLVM's names (or of the one that NUMBA_CPU_FEATURES describes)."""
    described = config.CPU_FEATURES  # type: ignore[attr-defined]
    if described is not None:
        return {name.removeprefix("+") for name in described.split(",") if name.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def rows_of(kind: Any) -> Any:
    """`kind`, numba's type of an argument, if it is an array whose rows lie one after the other, which tiles count on. Raises
    TypingError, so that numba names the place in the kernel that gives anything else, an address above all."""
    if not (isinstance(kind, types.Array) and kind.layout == "C"):
        raise errors.TypingError(f"a tile reads arrays whose rows lie one after the other, got {kind}")
    return kind


def start(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, *at: ir.Value) -> ir.Value:
    """The address of the element at the indices `at` of an array of the type `kind`; indices left out are 0."""
    made = context.make_array(kind)(context, builder, array)
    address = builder.ptrtoint(made.data, I64)
    for index, stride in zip(at, cgutils.unpack_tuple(builder, made.strides, kind.ndim), strict=False):
        address = builder.add(address, builder.mul(index, stride))
    return address


def apart(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value) -> ir.Value:
    """Bytes from one row of an array to the next."""
    made = context.make_array(kind)(context, builder, array)
    distance: ir.Value = cgutils.unpack_tuple(builder, made.strides, kind.ndim)[0]
    return distance


def load(builder: ir.IRBuilder, kind: ir.Type, start: ir.Value, *offsets: ir.Value) -> ir.Value:
    """What lies `offsets` bytes after the address `start`."""
    return builder.load(place(builder, kind, start, *offsets), align=1)


def load_wide(builder: ir.IRBuilder, kind: ir.VectorType, start: ir.Value, *offsets: ir.Value) -> ir.Value:
    """The fp32 vector `kind` of the bfloat16 that lie there: the upper halves of its numbers."""
    bits = ir.VectorType(I32, kind.count)
    found = builder.zext(load(builder, ir.VectorType(ir.IntType(16), kind.count), start, *offsets), bits)
    return builder.bitcast(builder.shl(found, ir.Constant(bits, [16] * kind.count)), kind)


def place(builder: ir.IRBuilder, kind: ir.Type, start: ir.Value, *offsets: ir.Value) -> ir.Value:
    """A pointer to it."""
    for offset in offsets:
        start = builder.add(start, offset)
    return builder.inttoptr(start, kind.as_pointer())


def fetch(builder: ir.IRBuilder, start: ir.Value, *offsets: ir.Value) -> None:
    """Ask for what lies there, into the second cache: it is read soon, and nothing waits for it."""
    line = place(builder, I8, start, *offsets)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, I32(0), I32(2), I32(1))


def sums(
    builder: ir.IRBuilder, x: ir.Value, w: ir.Value, size: ir.Value, rows: int, outputs: int, *,
    loaded: ir.VectorType, held: ir.VectorType, step: Step, apart: ir.Value | None = None, ahead: ir.Value | None = None,
    narrow: bool = False,
) -> Values:  # fmt: skip
    """The vectors of sums of each row with each output, row after row, once the loop over a row's `size` bytes is through.
    `loaded`: what is read at once, whose bytes divide `size`; `held`: what it is added to, by `step`; `apart`: bytes from
    one output's row of `w` to the next [`size`]; `ahead`: bytes to fetch ahead [nothing is]; `narrow`: `w` is of
    bfloat16 beside fp32."""
    apart = size if apart is None else apart
    stride, zero = loaded.count * _BYTES[str(loaded.element)], ir.Constant(held, [0] * held.count)
    before, loop = builder.block, builder.append_basic_block("loop")
    after = builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(I64)
    old = [builder.phi(held) for _ in range(rows * outputs)]
    there, read = (builder.lshr(at, I64(1)), load_wide) if narrow else (at, load)
    weights = [read(builder, loaded, w, builder.mul(I64(o), apart), there) for o in range(outputs)]
    for o in range(outputs) if ahead is not None else ():
        fetch(builder, w, builder.mul(I64(outputs), there), ahead, I64(o * stride // (2 if narrow else 1)))
    new = []
    for m in range(rows):
        value = load(builder, loaded, x, builder.mul(I64(m), size), at)
        new += [step(builder, old[m * outputs + o], value, weights[o]) for o in range(outputs)]
    next_ = builder.add(at, I64(stride))
    for phi, first, then in ((at, I64(0), next_), *((a, zero, b) for a, b in zip(old, new, strict=True))):
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_signed("<", next_, size), loop, after)
    builder.position_at_end(after)
    return new


def totals(builder: ir.IRBuilder, vectors: Values, add: Add) -> ir.Value:
    """The sum over each of 1 or 4 vectors, as one vector of as many. Four are added while they are transposed: 13 operations
    instead of 40, where a tile of 768 inputs multiplies 192 times."""
    lanes = vectors[0].type.count

    def added(a: ir.Value, b: ir.Value, first: list[int], second: list[int]) -> ir.Value:
        one, other = (ir.Constant(ir.VectorType(I32, len(at)), at) for at in (first, second))
        return add(builder.shuffle_vector(a, b, one), builder.shuffle_vector(a, b, other))

    def mixed(a: ir.Value, b: ir.Value, low: tuple[int, ...], high: tuple[int, ...]) -> ir.Value:
        """Within each four: places `low` of both vectors side by side, plus places `high`; 4 and more are of `b`."""
        spread = [
            [at % 4 + four + lanes * (at // 4) for four in range(0, lanes, 4) for at in way] for way in (low, high)
        ]
        return added(a, b, *spread)

    if len(vectors) == 1:
        (total,), least = vectors, 1
    else:
        first, second = (mixed(a, b, (0, 4, 1, 5), (2, 6, 3, 7)) for a, b in (vectors[:2], vectors[2:]))
        total, least = mixed(first, second, (0, 1, 4, 5), (2, 3, 6, 7)), 4
    width = lanes
    while width > least:
        width //= 2
        total = added(total, total, list(range(width)), list(range(width, 2 * width)))
    return total


def nothing() -> Any:
    """What a function without a result gives, as numba wants it."""
    return cgutils.get_null_value(ir.LiteralStructType([]).as_pointer())
