"""Which blocks each query of a row reads, in Triton: what `attention.block_scores` and `attention.select` say, without a score
of a head ever being stored.

    _rate   scores of a tile of queries: their softmax over blocks takes two passes over the summaries, and is summed over the
            heads of a group where it is
    _pick   the K best of a query by their bits, in the order of the text

A block is complete: they are numbered along a row, so that those which a query may choose are `many` up to the number `ends`.

Letters: B rows, T tokens, t queries of a strip, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, N blocks of a row, K
blocks read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.model.gpu.attention import _best, _product


@triton.jit
def _wants(
    own, summaries, begin, row, head, N,
    KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, VARIANCE: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """z of `own` [R, d] with the blocks from `begin` on: q.mean / sqrt d (+ q^2.var / 2d)."""
    block, dim = begin + tl.arange(0, TILE), tl.arange(0, WIDE)
    size: tl.constexpr = 2 * D if VARIANCE else D
    place = ((row * N + block) * KV_HEADS + head)[None, :] * size + dim[:, None]
    there = (block < N)[None, :] & (dim < D)[:, None]
    found = _product(own, tl.load(summaries + place, mask=there, other=0), PRECISION, EXACT)
    if VARIANCE:
        spread = tl.load(summaries + place + D, mask=there, other=0)
        found += _product(own * own * (SCALE / 2), spread, PRECISION, EXACT)
    return found * SCALE


@triton.jit
def _rate(
    q, summaries, ends, manys, scores,
    T, N, first, count, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    VARIANCE: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """scores [B, Hk, t, N] for the `count` queries from `first` on: of the blocks that a query may choose, its first one's
    first. ends, manys [B, T]. EACH queries, GROUP (at least G) heads of each."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    r, dim = tl.arange(0, EACH * GROUP), tl.arange(0, WIDE)
    n, g = tile * EACH + r // GROUP, r % GROUP
    real = (n < count) & (g < G)
    places = ((row * T + first + n) * HEADS + head * G + g)[:, None] * D + dim[None, :]
    own = tl.load(q + places, mask=real[:, None] & (dim < D)[None, :], other=0).to(kind)
    end = tl.load(ends + row * T + first + n, mask=real, other=0)
    start = end - tl.load(manys + row * T + first + n, mask=real, other=0)
    low, high = tl.min(tl.where(real & (end > start), start, N), 0), tl.max(end, 0)
    top = tl.full([EACH * GROUP], float("-inf"), kind)
    total = tl.zeros([EACH * GROUP], kind)
    if G > 1:
        for begin in range(low, high, TILE):
            block = begin + tl.arange(0, TILE)
            z = _wants(own, summaries, begin, row, head, N, KV_HEADS, D, WIDE, VARIANCE, TILE, SCALE, PRECISION, EXACT)
            z = tl.where((block[None, :] >= start[:, None]) & (block[None, :] < end[:, None]), z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            top = higher
    query = tile * EACH + tl.arange(0, EACH)
    end_of = tl.load(ends + row * T + first + query, mask=query < count, other=0)
    start_of = end_of - tl.load(manys + row * T + first + query, mask=query < count, other=0)
    to = scores + ((row * KV_HEADS + head) * count + query)[:, None] * N - start_of[:, None]
    for begin in range(low, high, TILE):
        block = begin + tl.arange(0, TILE)
        z = _wants(own, summaries, begin, row, head, N, KV_HEADS, D, WIDE, VARIANCE, TILE, SCALE, PRECISION, EXACT)
        if G > 1:
            base = tl.where(total == 0, 0.0, top)  # a total of NaN stays: all scores of its query are NaN
            z = tl.exp(z - base[:, None]) / tl.where(total == 0, 1.0, total)[:, None]
        z = tl.where(real[:, None], z, 0.0)
        kept = (block[None, :] >= start_of[:, None]) & (block[None, :] < end_of[:, None])
        tl.store(to + block[None, :], tl.sum(tl.reshape(z, (EACH, GROUP, TILE)), 1), mask=kept)


@triton.jit
def _pick(
    scores, ends, manys, chosen,
    T, N, first, count, KV_HEADS: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """chosen [B, Hk, T, K] int32: the sinks and the best of the rest in ascending order, as numbers of the row's blocks; -1
    where there are fewer. Of equal scores the lower block. TILE: at least N."""
    n, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    many = tl.load(manys + row * T + first + n)
    start = tl.load(ends + row * T + first + n) - many
    to = chosen + ((row * KV_HEADS + head) * T + first + n) * K
    if many > K:
        b = tl.arange(0, TILE)
        score = tl.load(scores + ((row * KV_HEADS + head) * count + n) * N + b, mask=b < many, other=0)
        taken = _best(score, b, many, K, SINKS, EXACT)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(to + place, start + b, mask=taken)
    else:
        every = tl.arange(0, WIDE)
        tl.store(to + every, tl.where(every < many, start + every, -1), mask=every < K)
