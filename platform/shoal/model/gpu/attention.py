"""Attention over pages in Triton: score the blocks, choose, attend, in one launch (`_attend`). Nothing is gathered, and no row
reads keys for the length of another; who chooses goes over the room for scores that the longest has. `launch.attend` says what
it is given.

A row and a KV head have one program where these are enough to fill a device, else several: pieces of the keys of the window,
and of the chosen blocks. The last of them to arrive joins the pieces. Each piece of the chosen blocks chooses for itself: all
by the same operations on the same numbers, so that they agree to the bit and none waits for another. It scores the blocks
itself where these are few; else it has a team of programs, each of which scores some of them, and the last of a team to arrive
goes on as the piece, alone.

Who joins, and who goes on, depends on who was slow. What they give does not: the one reads every piece from memory, its own
too, and joins them in their order; the other reads every score from memory.

What a program wrote itself it reads after a barrier of its own threads; what others wrote, after it has counted that they are
done (`_last`), and from L2: L1 is not coherent, and may hold a line that came with a neighbour's numbers before these were
written.

A number that is no constant would be handed over in fp32, so SCALE, 1 / sqrt d, is one.
Sums, scores and softmax are fp32; under EXACT (fp64 models, which tests use) all is fp64 and no tensor core is asked.

Letters: N rows (a token each), H query heads, Hk KV heads, G = H/Hk, d head dim, S block, P page, B blocks of the longest
table, K blocks read, w window, U units, M units of a table, Y pieces: A of the window, C of chosen blocks.
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
def _fill(
    own, summaries, table, head, begin, end, many, z, unit_step, head_step, block_step, count,
    G: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr, VARIANCE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The scores `z` [G, B] that `own` [R, d] gives the blocks from number `begin` to `end` of the `many` of a table."""
    group = tl.arange(0, ROWS)
    for first in range(begin, end, TILE):
        some = first + tl.arange(0, TILE)
        found = _rated(
            own, summaries, table, head, some, many, unit_step, head_step, block_step, D, WIDE, PAGED, VARIANCE, SCALE, EXACT,
        )  # fmt: skip
        to = z + group.to(tl.int64)[:, None] * count + some[None, :]
        tl.store(to, found, mask=(group < G)[:, None] & (some < end)[None, :])


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
    z, chosen, rated, many, count,
    G: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """`chosen` [K] int32: where blocks are `rated`, the sinks and the best of the rest by the scores `z` [G, B], else all, in
    ascending order; the number of a block, or -1. Of equal scores the lower block. TILE: blocks, at least B; FULL: at least
    K. SHARED: others wrote them."""
    PAST: tl.constexpr = ".cg" if SHARED else ""
    if rated:
        b = tl.arange(0, TILE)
        there = b < many
        if G == 1:
            score = tl.load(z + b, mask=there, other=float("-inf"), cache_modifier=PAST)
        else:
            score = tl.zeros([TILE], tl.float64 if EXACT else tl.float32)
            for g in range(G):
                one = tl.load(z + g * count + b, mask=there, other=float("-inf"), cache_modifier=PAST)
                one = tl.exp(one - tl.max(one, 0))
                score += one / tl.sum(one, 0)
        taken = _best(score, b, many, K, SINKS, EXACT)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(chosen + place, b, mask=taken)
    else:
        every = tl.arange(0, FULL)
        tl.store(chosen + every, tl.where(every < many, every, -1), mask=every < K)


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
def _last(arrived, others):
    """Is this program the last to arrive of those that count at `arrived`, where `others` are before it?

    The barrier puts the stores of all its threads before the one thread that counts; that releases them to, and acquires what
    was released by, whoever counts at the same place. So the last one may read what all have stored. Nobody waits. The last
    one's count begins anew for the next launch, which the stream orders after this one."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == others
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _pieced(
    part, stats, many,
    G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Largest score [GROUP], divisor [GROUP] and undivided sum of values [GROUP, d] of `many` pieces, EACH at a time in their
    order: part [Y, G, d], stats [Y, G, 2]."""
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    r, at = tl.arange(0, EACH * GROUP), tl.arange(0, WIDE)
    top, total = tl.full([GROUP], float("-inf"), kind), tl.zeros([GROUP], kind)
    sums = tl.zeros([GROUP, WIDE], kind)
    for begin in range(0, many, EACH):
        piece, g = begin + r // GROUP, r % GROUP
        there, place = (piece < many) & (g < G), piece * G + g
        tops = tl.load(stats + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + place * 2 + 1, mask=there, other=0, cache_modifier=".cg")
        where, inside = part + place[:, None] * D + at[None, :], there[:, None] & (at < D)[None, :]
        some = tl.load(where, mask=inside, other=0, cache_modifier=".cg")
        tops, totals = tl.reshape(tops, (EACH, GROUP)), tl.reshape(totals, (EACH, GROUP))
        higher = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp(tops - base[None, :]), tl.exp(top - base)
        total = total * shrink + tl.sum(weight * totals, 0)
        sums = sums * shrink[:, None] + tl.sum(tl.reshape(some, (EACH, GROUP, WIDE)) * weight[:, :, None], 0)
        top = higher
    return top, total, sums


@triton.jit
def _both(top, total, sums, other_top, other_total, other_sums, gamma, g, G: tl.constexpr, GATED: tl.constexpr):
    """[R, d]: window and chosen blocks of the heads `g` [R] of a group by gamma, or as one softmax. A branch without a key has
    the divisor 0; that of one which holds a NaN is NaN, and so is what comes of it."""
    if GATED:
        near = sums / total[:, None]
        far = other_sums / tl.where(other_total == 0, 1.0, other_total)[:, None]
        share = tl.load(gamma + g, mask=g < G, other=0).to(near.dtype)
        found = tl.where((other_total == 0)[:, None], near, far + share[:, None] * (near - far))
    else:
        higher = tl.maximum(top, other_top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        one, other = tl.exp(top - base), tl.exp(other_top - base)
        found = (sums * one[:, None] + other_sums * other[:, None]) / (total * one + other_total * other)[:, None]
    return found


@triton.jit
def _join(
    part, stats, gamma, out, nears, pieces,
    G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr, GATED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out [G, d] of the pieces of a row and a KV head."""
    g, at = tl.arange(0, GROUP), tl.arange(0, WIDE)
    top, total, sums = _pieced(part, stats, nears, G, D, WIDE, GROUP, EACH, EXACT)
    others = pieces - nears
    other_top, other_total, other_sums = _pieced(
        part + nears * G * D, stats + nears * G * 2, others, G, D, WIDE, GROUP, EACH, EXACT
    )
    found = _both(top, total, sums, other_top, other_total, other_sums, gamma, g, G, GATED)
    to = out + g[:, None] * D + at[None, :]
    tl.store(to, found.to(out.dtype.element_ty), mask=(g < G)[:, None] & (at < D)[None, :])


# long: one launch, of which half is what it is given
@triton.jit(
    do_not_specialize=["nears", "pieces", "crew"],
    # they begin at any row of a step, and are read a number at a time
    do_not_specialize_on_alignment=["positions", "requests"],
)
def _attend(
    q, kv, summaries, tables, positions, requests, z, chosen, bias, gamma, part, stats, arrived, out,
    table_step, unit_step, head_step, slot_step, to_unit, to_head, to_block, window, dense, count, nears, pieces, crew,
    G: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr,
    PAGED: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SINKS: tl.constexpr, BEYOND: tl.constexpr, GATED: tl.constexpr,
    VARIANCE: tl.constexpr, INT8: tl.constexpr, SHARED: tl.constexpr, ALONE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [N, H, d]: both branches. Of the `pieces` of a row and a KV head the first `nears` are of the window, the others of
    the chosen blocks (and the tail, where the branches are two). ALONE: one program reads both. SHARED: of each other piece
    `crew` programs, who share its scores; the last to arrive is the piece.

    z [N, Hk, C, G, B] and chosen [N, Hk, C, K]: memory of each piece. A piece leaves part [N, Hk, Y, G, d], a sum of values
    that is not yet divided, and stats [N, Hk, Y, G, 2], its largest score and its divisor, which is 0 without a key. arrived
    [N, Hk], and behind it, under SHARED, [N, Hk, C]: 0 before and after. BLOCKS is at least B, FULL at least K, GROUP at least
    G."""
    row, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t = tl.load(positions + row).to(tl.int32)
    group, at = tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = (group < G)[:, None] & (at < D)[None, :]
    own = tl.load(q + (row * HEADS + head * G + group[:, None]) * D + at[None, :], mask=real, other=0)
    table, whose = tables + tl.load(requests + row) * table_step, row * KV_HEADS + head
    near, chooses, goes_on, member, share, index = True, True, True, 0, 1, whose
    if not ALONE:
        if SHARED:
            member = tl.maximum(piece - nears, 0) % crew
            piece = tl.where(piece < nears, piece, nears + (piece - nears) // crew)
        near = piece < nears
        share, index = tl.where(near, nears, pieces - nears), tl.where(near, piece, piece - nears)
    many = 0
    if K > 0:
        many = _complete(t, window, S, BEYOND)
    first, length, far = _reads(t, many, window, dense, S, K, BEYOND)
    start, end = 0, length
    if not ALONE:
        end = tl.where(near, length, far)
        each = (end + share * TILE - 1) // (share * TILE) * TILE
        start, end = index * each, tl.minimum((index + 1) * each, end)
        chooses = (piece >= nears) & (start < end)
        index += whose * share
    listed, scores = chosen + index * K, z + index * G * count
    if K > 0:
        rated, until = (t >= dense) & (many > K), many
        if SHARED:
            until = (many + crew * TILE - 1) // (crew * TILE) * TILE
        if rated & chooses:
            _fill(
                own.to(kind), summaries, table, head, member * until, tl.minimum((member + 1) * until, many), many, scores,
                to_unit, to_head, to_block, count, G, D, PAGED, VARIANCE, TILE, WIDE, ROWS, SCALE, EXACT,
            )  # fmt: skip
        if SHARED:
            goes_on = member == 0
            if rated & chooses:
                goes_on = _last(arrived + tl.num_programs(0) * KV_HEADS + index, crew - 1)
        else:
            tl.debug_barrier()
    if goes_on:
        if K > 0:  # noqa: SIM102  # a constant, and a branch
            if chooses:
                _list(scores, listed, rated, many, count, G, K, SINKS, SHARED, BLOCKS, FULL, EXACT)
                tl.debug_barrier()
        none, more = tl.zeros([ROWS], kind), tl.zeros([ROWS], kind)
        if BEYOND:
            lift = tl.load(bias + head * G + group, mask=group < G, other=0).to(kind)
            more += tl.where((t >= dense) & near, lift, 0.0)
        lowest, empty = tl.full([ROWS], float("-inf"), kind), tl.zeros([ROWS, WIDE], kind)
        top, total, sums = _over(
            own, more, kv, table, listed, head, t, many, first, near, start, end, lowest, none, empty,
            unit_step, head_step, slot_step, D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
        )  # fmt: skip
        if ALONE:
            if K > 0:
                lowest, none, empty = _over(
                    own, none, kv, table, listed, head, t, many, first, False, 0, far, lowest, none, empty,
                    unit_step, head_step, slot_step, D, WIDE, P, S, K, BEYOND, INT8, TILE, PRECISION, SCALE, EXACT,
                )  # fmt: skip
            found = _both(top, total, sums, lowest, none, empty, gamma + head * G, group, G, GATED)
            to = out + (row * HEADS + head * G + group[:, None]) * D + at[None, :]
            tl.store(to, found.to(out.dtype.element_ty), mask=real)
        else:
            parts, several = part + whose * pieces * G * D, stats + whose * pieces * G * 2
            place = piece * G + group
            tl.store(parts + place[:, None] * D + at[None, :], sums, mask=real)
            tl.store(several + place * 2, top, mask=group < G)
            tl.store(several + place * 2 + 1, total, mask=group < G)
            if _last(arrived + whose, pieces - 1):
                _join(
                    parts, several, gamma + head * G, out + (row * HEADS + head * G) * D, nears, pieces,
                    G, D, WIDE, GROUP, EACH, GATED, EXACT,
                )  # fmt: skip
