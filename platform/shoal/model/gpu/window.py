"""The local branch of training in Triton, forward and backward: flash attention whose loops begin at the window or at the
document of a tile's queries, so that time follows w and not T, and no mask is made. With a window of T it is causal attention
within documents, for layers that read all.

    _near         a tile of queries and a query head a program
    _near_to_q    the same loop again, for the gradient of q
    _near_to_kv   a tile of keys and a KV head a program, over the queries whose window holds one of them: no atomics

Letters: B rows, T tokens, H query heads, Hk KV heads, G = H/Hk, d head dim, w window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.model.gpu.attention import _product


@triton.jit
def _near(
    q, k, v, starts, out, lse,
    T, WINDOW, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, d], and lse [B, T, H]: log of the sum of exp of the scores. starts [B, T]: where documents begin."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t, dim, step = tile * TALL + tl.arange(0, TALL), tl.arange(0, WIDE), tl.arange(0, TILE)
    mine = (t < T)[:, None] & (dim < D)[None, :]
    places = ((row * T + t) * HEADS + head)[:, None] * D + dim[None, :]
    own = tl.load(q + places, mask=mine, other=0)
    low = tl.maximum(tl.load(starts + row * T + t, mask=t < T, other=T), t - WINDOW + 1)
    top = tl.full([TALL], float("-inf"), kind)
    total = tl.zeros([TALL], kind)
    sums = tl.zeros([TALL, WIDE], kind)
    for begin in range(tl.min(low, 0), tl.minimum(tile * TALL + TALL, T), TILE):
        key = begin + step
        there = (key < T)[:, None] & (dim < D)[None, :]
        place = ((row * T + key) * KV_HEADS + head // G)[:, None] * D + dim[None, :]
        s = _product(own, tl.trans(tl.load(k + place, mask=there, other=0)), PRECISION, EXACT) * SCALE
        s = tl.where((key[None, :] <= t[:, None]) & (key[None, :] >= low[:, None]), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp(s - base[:, None]), tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        sums = sums * shrink[:, None]
        sums += _product(p.to(own.dtype), tl.load(v + place, mask=there, other=0), PRECISION, EXACT)
        top = higher
    total = tl.where(t < T, total, 1.0)
    tl.store(out + places, (sums / total[:, None]).to(out.dtype.element_ty), mask=mine)
    tl.store(lse + (row * T + t) * HEADS + head, top + tl.log(total), mask=t < T)


@triton.jit
def _near_to_q(
    q, k, v, starts, lse, delta, gradient, to,
    T, WINDOW, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """to [B, T, H, d]: the gradient of q. delta [B, T, H]: sum of output times its `gradient`."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    t, dim, step = tile * TALL + tl.arange(0, TALL), tl.arange(0, WIDE), tl.arange(0, TILE)
    mine = (t < T)[:, None] & (dim < D)[None, :]
    places = ((row * T + t) * HEADS + head)[:, None] * D + dim[None, :]
    own, given = tl.load(q + places, mask=mine, other=0), tl.load(gradient + places, mask=mine, other=0)
    log = tl.load(lse + (row * T + t) * HEADS + head, mask=t < T, other=0)
    less = tl.load(delta + (row * T + t) * HEADS + head, mask=t < T, other=0)
    low = tl.maximum(tl.load(starts + row * T + t, mask=t < T, other=T), t - WINDOW + 1)
    sums = tl.zeros([TALL, WIDE], kind)
    for begin in range(tl.min(low, 0), tl.minimum(tile * TALL + TALL, T), TILE):
        key = begin + step
        there = (key < T)[:, None] & (dim < D)[None, :]
        place = ((row * T + key) * KV_HEADS + head // G)[:, None] * D + dim[None, :]
        keys = tl.load(k + place, mask=there, other=0)
        s = _product(own, tl.trans(keys), PRECISION, EXACT) * SCALE
        reads = (key[None, :] <= t[:, None]) & (key[None, :] >= low[:, None])
        p = tl.where(reads, tl.exp(s - log[:, None]), 0.0)
        back = _product(given, tl.trans(tl.load(v + place, mask=there, other=0)), PRECISION, EXACT)
        sums += _product((p * (back - less[:, None]) * SCALE).to(own.dtype), keys, PRECISION, EXACT)
    tl.store(to + places, sums.to(to.dtype.element_ty), mask=mine)


@triton.jit
def _near_to_kv(
    q, k, v, starts, lse, delta, gradient, to_k, to_v,
    T, WINDOW, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    TALL: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """to_k, to_v [B, T, Hk, d]: the gradients of k and v."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    key, dim, step = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDE), tl.arange(0, TALL)
    held = (key < T)[:, None] & (dim < D)[None, :]
    place = ((row * T + key) * KV_HEADS + head)[:, None] * D + dim[None, :]
    keys, values = tl.load(k + place, mask=held, other=0), tl.load(v + place, mask=held, other=0)
    sum_k, sum_v = tl.zeros([TILE, WIDE], kind), tl.zeros([TILE, WIDE], kind)
    for begin in range(tile * TILE, tl.minimum(tile * TILE + TILE - 1 + WINDOW, T), TALL):
        t = begin + step
        low = tl.maximum(tl.load(starts + row * T + t, mask=t < T, other=T), t - WINDOW + 1)
        reads = (key[None, :] <= t[:, None]) & (key[None, :] >= low[:, None]) & (t < T)[:, None]
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
    tl.store(to_k + place, sum_k.to(to_k.dtype.element_ty), mask=held)
    tl.store(to_v + place, sum_v.to(to_v.dtype.element_ty), mask=held)
