"""Attention over pages in Triton: score the blocks, choose, attend. Nothing is gathered, and no row pays for the length of
another. `launch.attend` says what each is given, and which of two ways is taken.

    _alone     all of it, a row and a KV head a program: one launch, where these are enough to fill a device

    _score     q x summaries of the complete blocks, a tile of blocks a program; left out where blocks are few
    _choose    softmax over blocks, summed over the heads of a group; the K best by their bits, in the order of the text
    _attend    window and chosen blocks, each cut into pieces of equal length, a piece a program
    _join      the pieces of each branch, and the branches by gamma

Programs of a launch know nothing of each other: where one reads what another wrote there are two launches. What a program
wrote itself it reads after a barrier of its own threads.

A number that is no constant would be handed over in fp32, so SCALE, 1 / sqrt d, is one.
Sums, scores and softmax are fp32; under EXACT (fp64 models, which tests use) all is fp64 and no tensor core is asked.

Letters: N rows (a token each), H query heads, Hk KV heads, G = H/Hk, d head dim, S block, P page, B blocks of the longest
table, K blocks read, w window, U units, M units of a table, Y pieces of both branches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product(a, b, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """a [R, I] times b [I, O]. "wide": bf16 operands as fp32, the same sum, for the interpreter, which has no bf16 product."""
    if EXACT:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _complete(t, window, S: tl.constexpr, BEYOND: tl.constexpr):
    """How many blocks the query at t may choose of: the complete ones, or those that begin before its window."""
    many = (t + 1) // S
    if BEYOND:
        many = tl.maximum(t - window + S, 0) // S
    return many


@triton.jit
def _rated(
    own, summaries, table, head, b, many, unit_step, head_step, block_step,
    D: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr, VARIANCE: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[R, TILE]: what `own` [R, d] gives the blocks `b` of the `many` of a table: q.mean / sqrt d (+ q^2.var / 2d)."""
    at = tl.arange(0, WIDE)
    unit = tl.load(table + b // PAGED, mask=b < many, other=0).to(tl.int64)
    place = unit * unit_step + head * head_step + (b % PAGED) * block_step
    there = (b < many)[None, :] & (at < D)[:, None]
    mean = tl.load(summaries + place[None, :] + at[:, None], mask=there, other=0)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    found = _product(own, mean, "ieee", EXACT)
    if VARIANCE:
        spread = tl.load(summaries + place[None, :] + D + at[:, None], mask=there, other=0)
        spread = tl.where(tl.abs(spread) < float("inf"), spread, 0.0)
        found += _product(own * own * (SCALE / 2), spread, "ieee", EXACT)
    return found * SCALE


@triton.jit
def _score(
    q, summaries, tables, positions, requests, z,
    table_step, unit_step, head_step, block_step, window, dense, count,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, BEYOND: tl.constexpr, VARIANCE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """z [N, H, B]: `_rated` for each block that the row may choose, where it has more than K."""
    row, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row)
    many = _complete(t, window, S, BEYOND)
    if (t >= dense) & (many > K) & (tile * TILE < many):
        group, at, b = tl.arange(0, ROWS), tl.arange(0, WIDE), tile * TILE + tl.arange(0, TILE)
        mine = group[:, None] * D + at[None, :] + (row * HEADS + head * G) * D
        own = tl.load(q + mine, mask=(group < G)[:, None] & (at < D)[None, :], other=0).to(kind)
        table = tables + tl.load(requests + row) * table_step
        found = _rated(
            own,
            summaries,
            table,
            head,
            b,
            many,
            unit_step,
            head_step,
            block_step,
            D,
            WIDE,
            PAGED,
            VARIANCE,
            SCALE,
            EXACT,
        )
        to = (row * HEADS + head * G + group[:, None]) * count + b[None, :]
        tl.store(z + to, found, mask=(group < G)[:, None] & (b < many)[None, :])


@triton.jit
def _best(score, b, many, K: tl.constexpr, SINKS: tl.constexpr, EXACT: tl.constexpr):
    """Are the blocks `b`, of which there are `many` (more than K), read by their `score`? The sinks and the best of the rest, K
    in all; of equal scores the lower block. The K-th is found a bit at a time, in whole numbers in the order of the scores."""
    TOP: tl.constexpr = 62 if EXACT else 30
    LEAST: tl.constexpr = -0x8000000000000000 if EXACT else -0x80000000
    MOST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if EXACT else 0x7FFFFFFF
    there = b < many
    score = score + 0.0  # one zero, not two
    if EXACT:
        bits = score.to(tl.int64, bitcast=True)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(b < SINKS, MOST, bits)
    bits = tl.where(there, bits, LEAST)
    kth = tl.where(tl.sum((bits >= 0).to(tl.int32), 0) >= K, 0, LEAST).to(tl.int64)
    for i in range(TOP + 1):
        higher = kth + (tl.full([], 1, tl.int64) << (TOP - i))
        kth = tl.where(tl.sum((bits >= higher).to(tl.int32), 0) >= K, higher, kth)
    above = (bits > kth).to(tl.int32)
    tied = ((bits == kth) & there).to(tl.int32)
    room = K - tl.sum(above, 0)
    return (above > 0) | ((tied > 0) & (tl.cumsum(tied, 0) <= room))


@triton.jit
def _list(
    own, summaries, table, head, t, many, z, chosen, unit_step, head_step, block_step, dense, count,
    G: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, VARIANCE: tl.constexpr,
    SCORES: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`chosen` [K] int32: the sinks and the best of the rest in ascending order; the number of a block, or -1. Of equal scores
    the lower block. `z` [G, B] holds the scores; under SCORES it is filled first, EACH blocks at a time, for `own` [R, d].
    TILE: blocks, at least B; FULL: at least K."""
    if (t >= dense) & (many > K):
        if SCORES:
            group = tl.arange(0, ROWS)
            for begin in range(0, many, EACH):
                some = begin + tl.arange(0, EACH)
                found = _rated(
                    own, summaries, table, head, some, many, unit_step, head_step, block_step, D, WIDE, PAGED, VARIANCE,
                    SCALE, EXACT,
                )  # fmt: skip
                to = z + group.to(tl.int64)[:, None] * count + some[None, :]
                tl.store(to, found, mask=(group < G)[:, None] & (some < many)[None, :])
            tl.debug_barrier()
        b = tl.arange(0, TILE)
        there = b < many
        if G == 1:
            score = tl.load(z + b, mask=there, other=float("-inf"))
        else:
            score = tl.zeros([TILE], tl.float64 if EXACT else tl.float32)
            for g in range(G):
                one = tl.load(z + g * count + b, mask=there, other=float("-inf"))
                one = tl.exp(one - tl.max(one, 0))
                score += one / tl.sum(one, 0)
        taken = _best(score, b, many, K, SINKS, EXACT)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + place, b, mask=taken)
    else:
        every = tl.arange(0, FULL)
        tl.store(chosen + every, tl.where(every < many, every, -1), mask=every < K)


@triton.jit
def _choose(
    q, summaries, tables, positions, requests, z, chosen,
    table_step, unit_step, head_step, block_step, window, dense, count,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, BEYOND: tl.constexpr, VARIANCE: tl.constexpr, SCORES: tl.constexpr,
    EACH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """chosen [N, Hk, K] int32, as `_list`, of scores z [N, H, B], which are made here under SCORES."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row).to(tl.int32)
    group, at = tl.arange(0, ROWS), tl.arange(0, WIDE)
    own = tl.zeros([ROWS, WIDE], kind)
    if SCORES:
        mine = (row * HEADS + head * G + group[:, None]) * D + at[None, :]
        own = tl.load(q + mine, mask=(group < G)[:, None] & (at < D)[None, :], other=0).to(kind)
    table = tables + tl.load(requests + row) * table_step
    _list(
        own, summaries, table, head, t, _complete(t, window, S, BEYOND), z + (row * HEADS + head * G) * count,
        chosen + (row * KV_HEADS + head) * K, unit_step, head_step, block_step, dense, count,
        G, D, PAGED, K, SINKS, VARIANCE, SCORES, EACH, TILE, WIDE, ROWS, FULL, SCALE, EXACT,
    )  # fmt: skip


@triton.jit
def _scales(at, mask):
    """The bfloat16 that lies in the two bytes at each place of int8 memory, as fp32."""
    low = tl.load(at, mask=mask, other=0).to(tl.int32) & 0xFF
    high = tl.load(at + 1, mask=mask, other=0).to(tl.int32) & 0xFF
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _reads(t, many, window, dense, S: tl.constexpr, K: tl.constexpr, BEYOND: tl.constexpr):
    """Of the query at t, which may choose of `many` blocks: its window's first key, and how many keys window and chosen blocks
    (with the tail, where the branches are two) hold. Where both would be all, the second is 0: the window is enough."""
    early = t < dense
    first = tl.where(early, 0, tl.maximum(t - window + 1, 0))
    taken = tl.minimum(many, K) * S
    if BEYOND:
        far = tl.where(early, 0, taken)
    else:
        far = tl.where(early | (t + 1 <= tl.minimum(window, K * S)), 0, taken + (t + 1) % S)
    return first, t + 1 - first, far


@triton.jit
def _over(
    own, more, kv, table, chosen, head, t, many, first, near, start, end, top, total, sums,
    unit_step, head_step, slot_step,
    D: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BEYOND: tl.constexpr,
    INT8: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Largest score [R], divisor [R] and undivided sum of values [R, d] of `own` [R, d], after those that were given: over the
    keys from number `start` to `end` of the window (`near`) or of the `chosen` blocks and the tail; `more` [R] is added to
    each score."""
    at, step = tl.arange(0, WIDE), tl.arange(0, TILE)
    inside = at < D
    for begin in range(start, end, TILE):
        e = begin + step
        valid = e < end
        if near:
            key = first + e
        else:
            place = e // S
            taken = tl.minimum(many, K)
            # of a layer that chooses nothing, `chosen` is memory of another type, which is never read
            block = tl.load(chosen + place, mask=valid & (place < taken), other=0).to(tl.int32)
            key = tl.where(place < taken, block, (t + 1) // S) * S + e % S
            if BEYOND:  # what the window holds already is not read twice
                valid = valid & (key < first)
        unit = tl.load(table + key // P, mask=valid, other=0).to(tl.int64)
        slot = kv + unit * unit_step + head * head_step + (key % P) * slot_step
        read = valid[:, None] & inside[None, :]
        k = tl.load(slot[:, None] + at[None, :], mask=read, other=0)
        v = tl.load(slot[:, None] + D + at[None, :], mask=read, other=0)
        if INT8:
            k = k.to(tl.float32) * _scales(slot + 2 * D, valid)[:, None]
            v = v.to(tl.float32) * _scales(slot + 2 * D + 2, valid)[:, None]
        k, v = k.to(own.dtype), v.to(own.dtype)
        s = _product(own, tl.trans(k), PRECISION, EXACT) * SCALE + more[:, None]
        s = tl.where(valid[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None] + _product(p.to(own.dtype), v, PRECISION, EXACT)
        top = higher
    return top, total, sums


@triton.jit
def _attend(
    q, kv, tables, positions, requests, chosen, bias, part, stats,
    table_step, unit_step, head_step, slot_step, window, dense,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, BEYOND: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    NEAR: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """part [N, H, Y, d] and stats [N, H, Y, 2]: a sum of values that is not yet divided, its largest score and its divisor, for
    each piece of what a row reads. The first NEAR are of the window, the others of the chosen blocks (and the tail,
    where the branches are two). A piece without a key has the divisor 0."""
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row).to(tl.int32)
    group, at = tl.arange(0, ROWS), tl.arange(0, WIDE)
    heads, inside = group < G, at < D
    mine = (row * HEADS + head * G + group[:, None]) * D + at[None, :]
    own = tl.load(q + mine, mask=heads[:, None] & inside[None, :], other=0)
    table = tables + tl.load(requests + row) * table_step
    near = piece < NEAR
    share = tl.where(near, NEAR, PIECES - NEAR)
    index = tl.where(near, piece, piece - NEAR)
    many = 0
    if K > 0:
        many = _complete(t, window, S, BEYOND)
    first, length, far = _reads(t, many, window, dense, S, K, BEYOND)
    more = tl.zeros([ROWS], kind)
    if near:
        if BEYOND:
            more += tl.where(t < dense, 0.0, tl.load(bias + head * G + group, mask=heads, other=0).to(kind))
    else:
        length = far
    each = (length + share * TILE - 1) // (share * TILE) * TILE
    top, total, sums = _over(
        own, more, kv, table, chosen + (row * KV_HEADS + head) * K, head, t, many, first, near, index * each,
        tl.minimum((index + 1) * each, length), tl.full([ROWS], float("-inf"), kind), tl.zeros([ROWS], kind),
        tl.zeros([ROWS, WIDE], kind), unit_step, head_step, slot_step,
        D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
    )  # fmt: skip
    to = (row * HEADS + head * G + group) * PIECES + piece
    tl.store(part + to[:, None] * D + at[None, :], sums, mask=heads[:, None] & inside[None, :])
    tl.store(stats + to * 2, top, mask=heads)
    tl.store(stats + to * 2 + 1, total, mask=heads)


@triton.jit
def _alone(
    q, kv, summaries, tables, positions, requests, z, chosen, bias, gamma, out,
    table_step, unit_step, head_step, slot_step, to_unit, to_head, to_block, window, dense, count,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
    PAGED: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, BEYOND: tl.constexpr, GATED: tl.constexpr,
    VARIANCE: tl.constexpr, INT8: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
    FULL: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [N, H, d]: a row and a KV head from scores to the sum of both branches. z [N, H, B] and chosen [N, Hk, K] are its
    own memory; BLOCKS is at least B, FULL at least K."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row).to(tl.int32)
    group, at = tl.arange(0, ROWS), tl.arange(0, WIDE)
    mine = (row * HEADS + head * G + group[:, None]) * D + at[None, :]
    real = (group < G)[:, None] & (at < D)[None, :]
    own = tl.load(q + mine, mask=real, other=0)
    table = tables + tl.load(requests + row) * table_step
    listed = chosen + (row * KV_HEADS + head) * K
    many = 0
    if K > 0:
        many = _complete(t, window, S, BEYOND)
        _list(
            own.to(kind), summaries, table, head, t, many, z + (row * HEADS + head * G) * count, listed,
            to_unit, to_head, to_block, dense, count,
            G, D, PAGED, K, SINKS, VARIANCE, True, TILE, BLOCKS, WIDE, ROWS, FULL, SCALE, EXACT,
        )  # fmt: skip
        tl.debug_barrier()
    first, length, far = _reads(t, many, window, dense, S, K, BEYOND)
    none, more = tl.zeros([ROWS], kind), tl.zeros([ROWS], kind)
    if BEYOND:
        more += tl.where(t < dense, 0.0, tl.load(bias + head * G + group, mask=group < G, other=0).to(kind))
    lowest, empty = tl.full([ROWS], float("-inf"), kind), tl.zeros([ROWS, WIDE], kind)
    top, total, sums = _over(
        own, more, kv, table, listed, head, t, many, first, True, 0, length, lowest, none, empty,
        unit_step, head_step, slot_step, D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
    )  # fmt: skip
    if BEYOND:
        top, total, sums = _over(
            own, none, kv, table, listed, head, t, many, first, False, 0, far, top, total, sums,
            unit_step, head_step, slot_step, D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
        )  # fmt: skip
    found = sums / total[:, None]
    if GATED:
        top, total, sums = _over(
            own, none, kv, table, listed, head, t, many, first, False, 0, far, lowest, none, empty,
            unit_step, head_step, slot_step, D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
        )  # fmt: skip
        other = sums / tl.where(total > 0, total, 1.0)[:, None]
        share = tl.load(gamma + head * G + group, mask=group < G, other=0).to(kind)
        found = tl.where((total > 0)[:, None], other + share[:, None] * (found - other), found)
    tl.store(out + mine, found.to(out.dtype.element_ty), mask=real)


@triton.jit
def _joined(part, stats, which, at, D: tl.constexpr, piece):
    """[d]: the pieces that `which` names as one; and their divisor, 0 where they hold no key."""
    top = tl.load(stats + piece * 2, mask=which, other=float("-inf"))
    total = tl.load(stats + piece * 2 + 1, mask=which, other=0)
    highest = tl.max(top, 0)
    weight = tl.where(which & (total > 0), tl.exp(top - highest), 0.0)
    inside = which[:, None] & (at < D)[None, :]
    sums = tl.load(part + piece[:, None] * D + at[None, :], mask=inside, other=0)
    divisor = tl.sum(weight * total, 0)
    whole = tl.sum(tl.where(weight[:, None] > 0, sums * weight[:, None], 0.0), 0)
    return whole / tl.where(divisor > 0, divisor, 1.0), divisor


@triton.jit
def _join(
    part, stats, gamma, out,
    HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, NEAR: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """out [N, H, d] of the pieces: those of both branches by gamma, or all in one softmax."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    piece, at = tl.arange(0, PADDED), tl.arange(0, WIDE)
    there = piece < PIECES
    place = (row * HEADS + head) * PIECES
    part += place * D
    stats += place * 2
    if GATED:
        near, _ = _joined(part, stats, piece < NEAR, at, D, piece)
        far, divisor = _joined(part, stats, there & (piece >= NEAR), at, D, piece)
        share = tl.load(gamma + head).to(near.dtype)
        found = tl.where(divisor > 0, far + share * (near - far), near)
    else:
        found, _ = _joined(part, stats, there, at, D, piece)
    tl.store(out + (row * HEADS + head) * D + at, found.to(out.dtype.element_ty), mask=at < D)
