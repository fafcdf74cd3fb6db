"""Attention over pages in Triton: score the blocks, choose, attend in pieces, join the pieces. Nothing is gathered, and no row
pays for the length of another. `launch.attend` says what each is given.

    _score     q x summaries of the complete blocks, a tile of blocks a program
    _choose    softmax over blocks, summed over the heads of a group; the K best by their bits, in the order of the text
    _attend    window and chosen blocks, each cut into pieces of equal length, a piece a program
    _join      the pieces of each branch, and the branches by gamma

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
def _score(
    q, summaries, tables, positions, requests, z,
    table_step, unit_step, head_step, block_step, window, dense, count,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, BEYOND: tl.constexpr, VARIANCE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """z [N, H, B]: q.mean / sqrt d (+ q^2.var / 2d) for each block that the row may choose, where it has more than K."""
    row, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row)
    many = _complete(t, window, S, BEYOND)
    if (t >= dense) & (many > K) & (tile * TILE < many):
        group, at, b = tl.arange(0, ROWS), tl.arange(0, WIDE), tile * TILE + tl.arange(0, TILE)
        inside = at < D
        mine = group[:, None] * D + at[None, :] + (row * HEADS + head * G) * D
        own = tl.load(q + mine, mask=(group < G)[:, None] & inside[None, :], other=0).to(kind)
        table = tables + tl.load(requests + row) * table_step
        unit = tl.load(table + b // PAGED, mask=b < many, other=0).to(tl.int64)
        place = unit * unit_step + head * head_step + (b % PAGED) * block_step
        there = (b < many)[None, :] & inside[:, None]
        mean = tl.load(summaries + place[None, :] + at[:, None], mask=there, other=0)
        mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
        found = _product(own, mean, "ieee", EXACT)
        if VARIANCE:
            spread = tl.load(summaries + place[None, :] + D + at[:, None], mask=there, other=0)
            spread = tl.where(tl.abs(spread) < float("inf"), spread, 0.0)
            found += _product(own * own * (SCALE / 2), spread, "ieee", EXACT)
        to = (row * HEADS + head * G + group[:, None]) * count + b[None, :]
        tl.store(z + to, found * SCALE, mask=(group < G)[:, None] & (b < many)[None, :])


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
def _choose(
    z, positions, chosen, window, dense, count,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr,
    BEYOND: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """chosen [N, Hk, K] int32: the sinks and the best of the rest in ascending order; the number of a block, or -1. Of equal
    scores the lower block. TILE: blocks, at least B."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(positions + row)
    many = _complete(t, window, S, BEYOND)
    to = chosen + (row * KV_HEADS + head) * K
    if (t >= dense) & (many > K):
        b = tl.arange(0, TILE)
        there = b < many
        ours = z + (row * HEADS + head * G) * count + b
        if G == 1:
            score = tl.load(ours, mask=there, other=float("-inf"))
        else:
            score = tl.zeros([TILE], tl.float64 if EXACT else tl.float32)
            for g in range(G):
                one = tl.load(ours + g * count, mask=there, other=float("-inf"))
                one = tl.exp(one - tl.max(one, 0))
                score += one / tl.sum(one, 0)
        taken = _best(score, b, many, K, SINKS, EXACT)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(to + place, b, mask=taken)
    else:
        every = tl.arange(0, WIDE)
        tl.store(to + every, tl.where(every < many, every, -1), mask=every < K)


@triton.jit
def _scales(at, mask):
    """The bfloat16 that lies in the two bytes at each place of int8 memory, as fp32."""
    low = tl.load(at, mask=mask, other=0).to(tl.int32) & 0xFF
    high = tl.load(at + 1, mask=mask, other=0).to(tl.int32) & 0xFF
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)


# long: one loop over what either branch reads, with nothing that could be called beside it but at each step
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
    group, at, step = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    heads, inside = group < G, at < D
    mine = (row * HEADS + head * G + group[:, None]) * D + at[None, :]
    own = tl.load(q + mine, mask=heads[:, None] & inside[None, :], other=0)
    table = tables + tl.load(requests + row) * table_step
    early = t < dense
    near = piece < NEAR
    share = tl.where(near, NEAR, PIECES - NEAR)
    index = tl.where(near, piece, piece - NEAR)
    first = tl.where(early, 0, tl.maximum(t - window + 1, 0))
    more = tl.zeros([ROWS], kind)
    many = 0
    if K > 0:
        many = tl.minimum(_complete(t, window, S, BEYOND), K)
    if near:
        length = t + 1 - first
        if BEYOND:
            more += tl.where(early, 0.0, tl.load(bias + head * G + group, mask=heads, other=0).to(kind))
    else:
        if BEYOND:
            length = tl.where(early, 0, many * S)
        else:  # the tail comes after the chosen blocks; where both branches read all, the window's pieces are enough
            length = many * S + (t + 1) % S
            length = tl.where(early | (t + 1 <= tl.minimum(window, K * S)), 0, length)
    each = (length + share * TILE - 1) // (share * TILE) * TILE
    start, end = index * each, tl.minimum((index + 1) * each, length)
    top = tl.full([ROWS], float("-inf"), kind)
    total = tl.zeros([ROWS], kind)
    sums = tl.zeros([ROWS, WIDE], kind)
    for begin in range(start, end, TILE):
        e = begin + step
        valid = e < end
        if near:
            key = first + e
        else:
            place = e // S
            block = tl.load(chosen + (row * KV_HEADS + head) * K + place, mask=valid & (place < many), other=0)
            key = tl.where(place < many, block, (t + 1) // S) * S + e % S
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
    to = (row * HEADS + head * G + group) * PIECES + piece
    tl.store(part + to[:, None] * D + at[None, :], sums, mask=heads[:, None] & inside[None, :])
    tl.store(stats + to * 2, top, mask=heads)
    tl.store(stats + to * 2 + 1, total, mask=heads)


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
