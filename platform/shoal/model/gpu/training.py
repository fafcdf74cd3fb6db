"""The global branch of training in Triton, forward and backward: each query reads the blocks that `select` chose for it and
its tail, and nothing else, so that time follows K S and not T (NSA's way, arXiv 2502.11089: heads of a group share blocks).
With one softmax over both branches (BEFORE, its window, above 0) it reads what of them lies before the window, and no tail.

    _forward     a query and a KV head a program
    _to_q        the same loop again, for the gradient of q
    _to_pieces   up to PIECE of the queries that chose a block, and a KV head, a program: all queries choose a sink, and one
                 program for it would take as long as T is
    _to_kv       a tile of tokens and a KV head a program: who reads them as their tail, and the pieces, in their order:
                 nothing is added atomically

Letters: B rows, T tokens, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, K blocks read, N complete
blocks that a row may have, P pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.model.gpu.attention import _product


@triton.jit
def _key(e, t, runs, tail, BEFORE, S: tl.constexpr, K: tl.constexpr):
    """Place in the row of the e-th number of keys that the query at t reads, and whether there is one."""
    place = e // S
    run = tl.load(runs + place, mask=place < K, other=0)
    key = tl.where(place < K, run, tail - K * S) + tl.where(place < K, e % S, e)
    until = tl.where(place < K, t - BEFORE, tl.where(BEFORE > 0, tail - 1, t))
    return key, (key <= until) & ((place >= K) | (run >= 0))


@triton.jit
def _forward(
    q, k, v, runs, tails, out, lse,
    T, BEFORE, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, d], and lse [B, T, H]: log of the sum of exp of the scores."""
    at, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    group, dim, step = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    row, t = at // T, (at % T).to(tl.int32)
    heads = (at * HEADS + head * G + group)[:, None] * D + dim[None, :]
    mine = (group < G)[:, None] & (dim < D)[None, :]
    own = tl.load(q + heads, mask=mine, other=0)
    mine_runs = runs + ((row * KV_HEADS + head) * T + t) * K
    tail = tl.load(tails + at)
    top = tl.full([ROWS], float("-inf"), kind)
    total = tl.zeros([ROWS], kind)
    sums = tl.zeros([ROWS, WIDE], kind)
    for begin in range(0, (K + 1) * S, TILE):
        e = begin + step
        key, valid = _key(e, t, mine_runs, tail, BEFORE, S, K)
        valid = valid & (e < (K + 1) * S)
        place = ((row * T + key) * KV_HEADS + head)[:, None] * D + dim[None, :]
        there = valid[:, None] & (dim < D)[None, :]
        s = _product(own, tl.trans(tl.load(k + place, mask=there, other=0)), PRECISION, EXACT) * SCALE
        s = tl.where(valid[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp(s - base[:, None]), tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None]
        sums += _product(p.to(own.dtype), tl.load(v + place, mask=there, other=0), PRECISION, EXACT)
        top = higher
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    tl.store(out + heads, (sums / total[:, None]).to(out.dtype.element_ty), mask=mine)
    tl.store(lse + at * HEADS + head * G + group, tl.where(none, -1e30, top + tl.log(total)), mask=group < G)


@triton.jit
def _to_q(
    q, k, v, runs, tails, lse, delta, gradient, to,
    T, BEFORE, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """to [B, T, H, d]: the gradient of q. delta [B, T, H]: sum of output times its `gradient`."""
    at, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    group, dim, step = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TILE)
    row, t = at // T, (at % T).to(tl.int32)
    heads = (at * HEADS + head * G + group)[:, None] * D + dim[None, :]
    mine = (group < G)[:, None] & (dim < D)[None, :]
    own, given = tl.load(q + heads, mask=mine, other=0), tl.load(gradient + heads, mask=mine, other=0)
    log = tl.load(lse + at * HEADS + head * G + group, mask=group < G, other=0)
    less = tl.load(delta + at * HEADS + head * G + group, mask=group < G, other=0)
    mine_runs = runs + ((row * KV_HEADS + head) * T + t) * K
    tail = tl.load(tails + at)
    sums = tl.zeros([ROWS, WIDE], kind)
    for begin in range(0, (K + 1) * S, TILE):
        e = begin + step
        key, valid = _key(e, t, mine_runs, tail, BEFORE, S, K)
        valid = valid & (e < (K + 1) * S)
        place = ((row * T + key) * KV_HEADS + head)[:, None] * D + dim[None, :]
        there = valid[:, None] & (dim < D)[None, :]
        keys = tl.load(k + place, mask=there, other=0)
        s = _product(own, tl.trans(keys), PRECISION, EXACT) * SCALE
        p = tl.where(valid[None, :], tl.exp(s - log[:, None]), 0.0)
        back = _product(given, tl.trans(tl.load(v + place, mask=there, other=0)), PRECISION, EXACT)
        sums += _product((p * (back - less[:, None]) * SCALE).to(own.dtype), keys, PRECISION, EXACT)
    tl.store(to + heads, sums.to(to.dtype.element_ty), mask=mine)


@triton.jit
def _to_pieces(
    q, k, v, lse, delta, gradient, first, order, offsets, of, begins, to_k, to_v,
    T, N, BEFORE, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """to_k, to_v [P, S, d]: what PIECE of the queries that chose a block give to its keys and values. The block of a piece is
    `of` [P], number (row, KV head, block) of B Hk N; its pieces stand from `begins` on, and its queries in `order` from
    `offsets` on. `first` [B, N]: where blocks begin. A piece beyond all is not written."""
    piece = tl.program_id(0).to(tl.int64)
    list_at = tl.load(of + piece)
    if list_at >= 0:
        kind: tl.constexpr = tl.float64 if EXACT else tl.float32
        head, row = list_at // N % KV_HEADS, (list_at // N // KV_HEADS).to(tl.int64)
        r, dim, slot = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TALL)
        start = tl.load(offsets + list_at) + (piece - tl.load(begins + list_at)).to(tl.int32) * PIECE
        end = tl.minimum(tl.load(offsets + list_at + 1), start + PIECE)
        held = (slot < S)[:, None] & (dim < D)[None, :]
        token = tl.load(first + row * N + list_at % N) + slot
        place = ((row * T + token) * KV_HEADS + head)[:, None] * D + dim[None, :]
        keys, values = tl.load(k + place, mask=held, other=0), tl.load(v + place, mask=held, other=0)
        sum_k, sum_v = tl.zeros([TALL, WIDE], kind), tl.zeros([TALL, WIDE], kind)
        each: tl.constexpr = ROWS // G  # queries at a time
        for i in range(start, end, each):
            n = i + r // G
            there = (n < end) & (r < each * G)
            t = tl.load(order + n, mask=there, other=0)
            at = (row * T + t) * HEADS + head * G + r % G
            mine = there[:, None] & (dim < D)[None, :]
            own = tl.load(q + at[:, None] * D + dim[None, :], mask=mine, other=0)
            given = tl.load(gradient + at[:, None] * D + dim[None, :], mask=mine, other=0)
            log, less = tl.load(lse + at, mask=there, other=0), tl.load(delta + at, mask=there, other=0)
            s = _product(own, tl.trans(keys), PRECISION, EXACT) * SCALE
            reads = there[:, None] & (slot < S)[None, :] & (token[None, :] <= t[:, None] - BEFORE)
            p = tl.where(reads, tl.exp(s - log[:, None]), 0.0)
            back = _product(given, tl.trans(values), PRECISION, EXACT)
            pull = p * (back - less[:, None]) * SCALE
            sum_v += _product(tl.trans(p.to(own.dtype)), given, PRECISION, EXACT)
            sum_k += _product(tl.trans(pull.to(own.dtype)), own, PRECISION, EXACT)
        to = (piece * S + slot)[:, None] * D + dim[None, :]
        tl.store(to_k + to, sum_k, mask=held)
        tl.store(to_v + to, sum_v, mask=held)


@triton.jit
def _to_kv(
    q, k, v, tails, lse, delta, gradient, block_of, first, begins, pieces_k, pieces_v, to_k, to_v,
    T, N, BEFORE, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    S: tl.constexpr, TALL: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """to_k, to_v [B, T, Hk, d]: the gradients of k and v in a tile of tokens: of queries that read them as their tail, then
    of the pieces of the block, in their order. `block_of` [B, T]: the complete block of a token, or -1."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    key, dim, step = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDE), tl.arange(0, TALL)
    held = (key < T)[:, None] & (dim < D)[None, :]
    place = ((row * T + key) * KV_HEADS + head)[:, None] * D + dim[None, :]
    keys, values = tl.load(k + place, mask=held, other=0), tl.load(v + place, mask=held, other=0)
    sum_k, sum_v = tl.zeros([TILE, WIDE], kind), tl.zeros([TILE, WIDE], kind)
    last = tl.minimum(tile * TILE + TILE + S - 2, T)
    if BEFORE > 0:
        last = tile * TILE
    for begin in range(tile * TILE, last, TALL):
        t = begin + step
        tail = tl.load(tails + row * T + t, mask=t < T, other=T)  # no key is read by who is not there
        reads = (key[None, :] <= t[:, None]) & (key[None, :] >= tail[:, None])
        mine = (t < T)[:, None] & (dim < D)[None, :]
        for g in range(G):
            at = (row * T + t) * HEADS + head * G + g
            own = tl.load(q + at[:, None] * D + dim[None, :], mask=mine, other=0)
            given = tl.load(gradient + at[:, None] * D + dim[None, :], mask=mine, other=0)
            log, less = tl.load(lse + at, mask=t < T, other=0), tl.load(delta + at, mask=t < T, other=0)
            s = _product(own, tl.trans(keys), PRECISION, EXACT) * SCALE
            p = tl.where(reads, tl.exp(s - log[:, None]), 0.0)
            back = _product(given, tl.trans(values), PRECISION, EXACT)
            pull = p * (back - less[:, None]) * SCALE
            sum_v += _product(tl.trans(p.to(own.dtype)), given, PRECISION, EXACT)
            sum_k += _product(tl.trans(pull.to(own.dtype)), own, PRECISION, EXACT)
    block = tl.load(block_of + row * T + key, mask=key < T, other=-1)
    slot = key - tl.load(first + row * N + block, mask=block >= 0, other=0)
    list_at = (row * KV_HEADS + head) * N + block
    begin_of = tl.load(begins + list_at, mask=block >= 0, other=0)
    end_of = tl.load(begins + list_at + 1, mask=block >= 0, other=0)
    for i in range(0, tl.max(end_of - begin_of, 0)):
        there = (begin_of + i < end_of)[:, None] & (dim < D)[None, :]
        at = ((begin_of + i).to(tl.int64) * S + slot)[:, None] * D + dim[None, :]
        sum_k += tl.load(pieces_k + at, mask=there, other=0)
        sum_v += tl.load(pieces_v + at, mask=there, other=0)
    tl.store(to_k + place, sum_k.to(to_k.dtype.element_ty), mask=held)
    tl.store(to_v + place, sum_v.to(to_v.dtype.element_ty), mask=held)
