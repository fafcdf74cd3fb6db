"""What adapters add to the outputs of a linear, in Triton: thin matrices, which one follows from the row.

    _thin   x times the transpose of A, a few ranks of a row a program
    _wide   that times B, added to a tile of what the linear gave

Which adapter a row has is read where the kernel runs, as is which rows of the stacked matrices are its own, so that a graph
holds neither. Sums are in fp32 (fp64 for fp64), and what lies between the two is not rounded.

Letters: N rows, I input width, O output width, r rank, R ranks of all adapters together, K adapters.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["room", "count"])
def _thin(x, a, bounds, of, thin, inputs, room, count, RANKS: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr):
    """thin [N, room] of x [N, I] and a [R, I]: of a row whose adapter `of` [N] is k, the rows from bounds[0, k] up to
    bounds[1, k] of a, `room` at most; nothing where k is below 0."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    k = tl.load(of + row)
    if k >= 0:
        start, end = tl.load(bounds + k), tl.load(bounds + count + k)
        rank, at = piece * RANKS + tl.arange(0, RANKS), tl.arange(0, TILE)
        own = start + rank < end
        if piece * RANKS < end - start:
            total = tl.zeros([RANKS, TILE], kind)
            source = a + (start + rank).to(tl.int64)[:, None] * inputs + at[None, :]
            for begin in range(0, inputs, TILE):
                inside = begin + at < inputs
                some = tl.load(x + row * inputs + begin + at, mask=inside, other=0).to(kind)
                weights = tl.load(source + begin, mask=own[:, None] & inside[None, :], other=0).to(kind)
                total += weights * some[None, :]
            tl.store(thin + row * room + rank, tl.sum(total, 1), mask=own)


@triton.jit(do_not_specialize=["room", "count"])
def _wide(thin, b, bounds, of, out, outputs, room, count, RANKS: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr):
    """Add to out [N, O] what is left of `_thin`, thin [N, room], times b [R, O]; nothing is written of a row without."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    k = tl.load(of + row)
    if k >= 0:
        start, end = tl.load(bounds + k), tl.load(bounds + count + k)
        at, some = piece * TILE + tl.arange(0, TILE), tl.arange(0, RANKS)
        inside = at < outputs
        if end > start:
            total = tl.zeros([TILE], kind)
            for begin in range(0, end - start, RANKS):
                rank = begin + some
                own = start + rank < end
                share = tl.load(thin + row * room + rank, mask=own, other=0)
                source = b + (start + rank).to(tl.int64)[:, None] * outputs + at[None, :]
                weights = tl.load(source, mask=own[:, None] & inside[None, :], other=0).to(kind)
                total += tl.sum(weights * share[:, None], 0)
            to = out + row * outputs + at
            total += tl.load(to, mask=inside, other=0).to(kind)
            tl.store(to, total.to(out.dtype.element_ty), mask=inside)
