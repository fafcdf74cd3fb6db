"""Norm, rotation and the writing of keys and values in Triton, with the summaries of the blocks that they complete.

Letters: N rows (a token each), H query heads, Hk KV heads, d head dim, S block, P page, U units, W numbers in a slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.model.gpu.integers import _largest

NONE, HEAD, ALL = 0, 1, 2  # what q and k are normed over


@triton.jit
def _normed(source, bias, weight, at, index, scale, D: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    """The numbers `index` of a head, with bias and norm."""
    x = tl.load(source + index, mask=at < D, other=0).to(KIND)
    if BIASED:
        x += tl.load(bias + index, mask=at < D, other=0).to(KIND)
    if NORM != 0:
        x = x * scale * tl.load(weight + index, mask=at < D, other=0).to(KIND)
    return x


@triton.jit
def _levels(x, at, D: tl.constexpr, EXACT: tl.constexpr):
    """What `slots.encode` stores of x [d]: its levels as fp, and the bfloat16 of its scale as 16 bits."""
    most = _largest(tl.where(at < D, x, 0.0))
    if EXACT:  # noqa: SIM108
        scale = (most / 127).to(tl.float32)
    else:
        scale = tl.div_rn(most, 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # NaN stays
    upper = (scale.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    upper = tl.where(scale == scale, upper, 0x7FC0)  # the NaN of a GPU overflows in the line above
    rounded = (upper << 16).to(tl.float32, bitcast=True)
    if EXACT:
        level = x / rounded
        level = (level + 6755399441055744.0) - 6755399441055744.0  # to the nearest whole number, ties to even
    else:
        level = tl.div_rn(x, rounded + tl.zeros_like(x))
        level = (level + 12582912.0) - 12582912.0
    return tl.where(level == level, level, 0.0), upper


@triton.jit
def _kept(to, x, part, at, D: tl.constexpr, INT8: tl.constexpr, EXACT: tl.constexpr):
    """Store x [d], the key (`part` 0) or the value (1) of the slot `to`; and what of it will be read there."""
    if INT8:
        level, upper = _levels(x, at, D, EXACT)
        tl.store(to + part * D + at, level.to(tl.int8), mask=at < D)
        tl.store(to + 2 * D + 2 * part, (upper & 0xFF).to(tl.int8))
        tl.store(to + 2 * D + 2 * part + 1, ((upper >> 8) & 0xFF).to(tl.int8))
        found = level * (upper << 16).to(tl.float32, bitcast=True).to(x.dtype)
    else:
        tl.store(to + part * D + at, x.to(to.dtype.element_ty), mask=at < D)
        found = x.to(to.dtype.element_ty).to(x.dtype)
    return found


@triton.jit
def _store(
    qkv, bias, q_weight, k_weight, keep, cross, slots, positions, q, kv, summaries,
    unit_step, head_step, slot_step, to_unit, to_head, to_block, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    BIASED: tl.constexpr, NORM: tl.constexpr, TOTAL: tl.constexpr, S: tl.constexpr, TALL: tl.constexpr, VARIANCE: tl.constexpr,
    SINGLE: tl.constexpr, INT8: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """q [N, H, d], normed and turned, and k and v where `slots` [N] say; a head of a row a program. TOTAL: a power of two, at
    least as many numbers as one norm is over. SINGLE: of each request there is one row, so that the other keys of a block
    that it completes are stored already, and the block's summary is written here."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind: tl.constexpr = tl.float64 if EXACT else tl.float32
    at = tl.arange(0, WIDE)
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    source = qkv + row * width
    if head < HEADS + KV_HEADS:
        first = tl.where(head < HEADS, 0, HEADS)  # of those that are normed together
        heads = tl.where(head < HEADS, HEADS, KV_HEADS)
        weight = q_weight
        if head >= HEADS:
            weight = k_weight
        scale = tl.full([], 1.0, kind)
        if NORM != 0:
            begin, numbers = head * D, D
            if NORM == 2:
                begin, numbers = first * D, heads * D
                weight += (head - first) * D
            every = tl.arange(0, TOTAL)
            some = tl.load(source + begin + every, mask=every < numbers, other=0).to(kind)
            if BIASED:
                some += tl.load(bias + begin + every, mask=every < numbers, other=0).to(kind)
            scale = 1.0 / tl.sqrt(tl.sum(some * some, 0) / numbers + eps)
        x = _normed(source + head * D, bias + head * D, weight, at, at, scale, D, kind, BIASED, NORM)
        if HALF > 0:
            other = tl.where(at < HALF, at + HALF, tl.where(at < 2 * HALF, at - HALF, at))
            turned = _normed(source + head * D, bias + head * D, weight, at, other, scale, D, kind, BIASED, NORM)
            x = x * tl.load(keep + row * D + at, mask=at < D, other=0).to(kind)
            x += turned * tl.load(cross + row * D + at, mask=at < D, other=0).to(kind)
        part = 0
    else:
        x = _normed(source + head * D, bias + head * D, bias, at, at, 1.0, D, kind, BIASED, 0)
        part = 1
    if head < HEADS:
        tl.store(q + (row * HEADS + head) * D + at, x.to(q.dtype.element_ty), mask=at < D)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        to = kv + slot // P * unit_step + (head - HEADS - part * KV_HEADS) * head_step + slot % P * slot_step
        if slot >= 0:
            x = _kept(to, x.to(q.dtype.element_ty).to(kind), part, at, D, INT8, EXACT)
            if SINGLE:  # noqa: SIM102  # a constant, and a branch
                if (head < HEADS + KV_HEADS) & ((tl.load(positions + row) + 1) % S == 0):
                    offset = slot % P
                    into = summaries + slot // P * to_unit + (head - HEADS) * to_head + offset // S * to_block
                    _summary(to, x, into, slot_step, D, WIDE, S, TALL, VARIANCE, INT8, True)


@triton.jit
def _scale(at):
    """The bfloat16 that lies in the two bytes at each place of int8 memory, as fp32."""
    low = tl.load(at).to(tl.int32) & 0xFF
    high = tl.load(at + 1).to(tl.int32) & 0xFF
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _summary(
    key, own, into, slot_step,
    D: tl.constexpr, WIDE: tl.constexpr, S: tl.constexpr, TALL: tl.constexpr, VARIANCE: tl.constexpr, INT8: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """`into` [m]: mean (and variance) of the S stored keys of a block. The last stands at `key`; under OWN it is `own` [d],
    which was just stored, and is not read back."""
    kind = into.dtype.element_ty
    at, back = tl.arange(0, WIDE), tl.arange(0, TALL)
    place = key + tl.where(back < S, 0 - back, 0) * slot_step
    there = (back < S)[:, None] & (at < D)[None, :]
    k = tl.load(place[:, None] + at[None, :], mask=there, other=0).to(kind)
    if INT8:  # a scale that is not of the block, and may be anything, is multiplied by nothing that counts
        k = tl.where(there, k * _scale(place + 2 * D)[:, None].to(kind), 0.0)
    if OWN:
        k = tl.where((back == 0)[:, None], own[None, :].to(kind), k)
    mean = tl.sum(k, 0) / S
    tl.store(into + at, mean, mask=at < D)
    if VARIANCE:
        off = tl.where(there, k - mean[None, :], 0.0)
        tl.store(into + D + at, tl.sum(off * off, 0) / S, mask=at < D)


@triton.jit
def _summarise(
    kv, summaries, positions, slots,
    unit_step, head_step, slot_step, to_unit, to_head, to_block,
    D: tl.constexpr, WIDE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, TALL: tl.constexpr, VARIANCE: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """Mean (and variance) of the stored keys of each block that a row completes; after `_store`, as the keys of a block may be
    of several rows."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if (slot >= 0) & ((tl.load(positions + row) + 1) % S == 0):
        offset = slot % P
        key = kv + slot // P * unit_step + head * head_step + offset * slot_step
        into = summaries + slot // P * to_unit + head * to_head + offset // S * to_block
        _summary(key, 0.0, into, slot_step, D, WIDE, S, TALL, VARIANCE, INT8, False)
