"""Hybrid attention of few rows over pages, compiled for the CPU: plain loops over the formulas of `attention` and `paged`. They
take fp32 and fp64 (the tests compare in fp64), and NaN stays NaN. Keys and values may lie in int8: `slots` says how.

Letters: as in `decode`; W numbers in a slot.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba.extending import overload

from shoal.model.cpu.compiled import exp, fast, fill, inverse_rms, largest
from shoal.model.cpu.floats import dots, fetch, fits, weigh
from shoal.model.slots import TOP

KEY, VALUE = 0, 1  # which of the two in a slot


@fast.called
def project_and_store(
    qkv, bias, q_weight, k_weight, eps, half, keep, cross, positions, slots, block, kv, summaries, q
):  # fmt: skip
    """q [N, H, d], normed and its first 2 `half` dims turned by `keep` and `cross` [N, d] (`block.rope_tables`), of `qkv`
    [N, (H + 2 Hk) d], to which `bias` is added in place; k and v to their `slots` [N] (-1: stored already) of kv [U, Hk, P, W],
    and the summary of every block that they complete to `summaries` [U, Hk, P/S, d or 2d]. `bias`, `q_weight` and `k_weight`
    as in `parts.Layer`."""
    rows, heads, dim = q.shape
    kv_heads, page = kv.shape[1:3]
    key, room = np.empty(dim, q.dtype), np.empty((block, 2 * dim), q.dtype)
    for n in range(rows):
        for i in range(len(bias)):
            qkv[n, i] += bias[i]
        first, second = qkv[n, : heads * dim], qkv[n, heads * dim : (heads + kv_heads) * dim]
        for h in range(heads):
            _norm_and_turn(first, h, q_weight, eps, half, keep[n], cross[n], q[n, h])
        if slots[n] < 0:
            continue
        unit, offset = slots[n] // page, slots[n] % page
        for g in range(kv_heads):
            _norm_and_turn(second, g, k_weight, eps, half, keep[n], cross[n], key)
            at = (heads + kv_heads + g) * dim
            _store(key, kv[unit, g, offset], KEY)
            _store(qkv[n, at : at + dim], kv[unit, g, offset], VALUE)
            if (positions[n] + 1) % block == 0:
                keys = _stored(kv, unit, g, offset + 1 - block, block, KEY, room)
                _summarise(keys, summaries[unit, g, offset // block], dim)


@fast.called
def attend(q, kv, summaries, tables, rows, requests, positions, block, window, top_k, sinks, gamma, bias, dense, out):
    """The `rows` of out [N, H, d]: both branches for the query at `positions` [N], over the pages of its request's row of
    `tables` [R, M]; `requests` goes with `rows`. `gamma` [H], or of length 0 for a layer without two branches; `bias` [H],
    or of length 0 but for one softmax over both. A query before position `dense` reads all. The equations stand in
    `attention`."""
    heads, dim = q.shape[1:]
    kv_heads, page = kv.shape[1:3]
    group = heads // kv_heads
    hybrid = len(gamma) > 0
    one, zero = q.dtype.type(1), q.dtype.type(0)
    scale = one / np.sqrt(q.dtype.type(dim))
    most = max(dense, window + (top_k + 1) * block)
    runs = np.empty((most, 3), np.int64)  # of tokens that lie side by side: unit, first slot, how many
    near, far = np.empty(most, q.dtype), np.empty(most, q.dtype)  # 1 where a token is in that branch, else 0
    weight, room = np.empty((group, most), q.dtype), np.empty((page, 2 * dim), q.dtype)
    for n, request in zip(rows, requests):  # noqa: B905, numba has no strict
        position, table = positions[n], tables[request]
        whole, mixed = position < dense, hybrid and position >= dense
        complete = (position + 1) // block
        first = 0 if whole else max(0, position - window + 1)
        eligible = complete if mixed else 0
        if len(bias) and not whole:  # the blocks that begin before the window
            eligible = (first + block - 1) // block
        for g in range(kv_heads):
            mine, result = q[n, g * group : (g + 1) * group], out[n, g * group : (g + 1) * group]
            blocks = _choose(mine, summaries, table, g, eligible, page // block, top_k, sinks, scale)
            count = used = 0
            for b in blocks:
                end = max(b * block, min((b + 1) * block, first))
                used = _place(b * block, end, table, page, runs, used)
                count += end - b * block
            if mixed:
                used = _place(complete * block, first, table, page, runs, used)
                count += max(0, first - complete * block)
            here, before = count - first, count
            used = _place(first, position + 1, table, page, runs, used)
            count += position + 1 - first
            if mixed:
                fill(near[:before], zero)
                fill(near[before:count], one)
                fill(far[:before], one)
                fill(far[before:count], zero)
                for b in blocks:
                    fill(far[here + max(b * block, first) : here + max((b + 1) * block, first)], one)
                fill(far[here + max(complete * block, first) : count], one)
            _score(mine, kv, g, runs[:used], scale, weight, room)
            if len(bias) and not whole:
                for h in range(group):
                    for i in range(before, count):
                        weight[h, i] += bias[g * group + h]
            for h in range(group):
                if mixed:
                    _mix(weight[h, :count], near, far, gamma[g * group + h])
                else:
                    _softmax(weight[h, :count])
            _gather(weight, kv, g, runs[:used], result, room)


@fast
def _score(q, kv, g, runs, scale, weight, room):
    """weight [G, tokens of `runs`] = q [G, d] times their keys in KV head `g`, times `scale`."""
    group, dim = q.shape
    zero, at = q.dtype.type(0), 0
    whole = fits(dim, q.itemsize)
    for r in range(len(runs)):
        unit, slot, size = runs[r]
        fetch(kv[unit, g, slot : slot + size])
    for r in range(len(runs)):
        unit, slot, size = runs[r]
        keys = _stored(kv, unit, g, slot, size, KEY, room)
        if whole:
            dots(q, keys, weight, at, 0)
        else:
            for i in range(size):
                for h in range(group):
                    total = zero
                    for e in range(dim):
                        total += q[h, e] * keys[i, e]
                    weight[h, at + i] = total
        at += size
    for h in range(group):
        for i in range(at):
            weight[h, i] *= scale


@fast
def _gather(weight, kv, g, runs, result, room):
    """result [G, d] = the values of the tokens of `runs` in KV head `g`, each times its weight [G, ...]."""
    group, dim = result.shape
    at = 0
    whole = dim % 2 == 0 and fits(dim // 2, result.itemsize)
    for h in range(group):
        fill(result[h], result.dtype.type(0))
    for r in range(len(runs)):
        unit, slot, size = runs[r]
        values = _stored(kv, unit, g, slot, size, VALUE, room)
        for h in range(group):
            if whole:
                weigh(weight[h, at : at + size], values, dim, result[h])
            else:
                for i in range(size):
                    for e in range(dim):
                        result[h, e] += weight[h, at + i] * values[i, dim + e]
        at += size


def _store(x, slot, which):
    """A key or a value [d] to its place in a slot [W], as `slots.encode` does."""


@overload(_store)
def _store_as(x, slot, which):
    return _store_levels if slot.dtype == nb.int8 else _store_numbers


def _store_numbers(x, slot, which):
    for e in range(len(x)):
        slot[which * len(x) + e] = x[e]


def _store_levels(x, slot, which):
    dim, most, broken = len(x), x.dtype.type(0), False
    for e in range(dim):
        most = max(most, abs(x[e]))
        broken |= x[e] != x[e]
    exact = max(np.float32(most / x.dtype.type(TOP)), np.finfo(np.float32).tiny)
    upper = (np.float32(np.nan if broken else exact).view(np.uint32) + 0xFFFF) >> 16
    scale = x.dtype.type(np.uint32(upper << 16).view(np.float32))
    for e in range(dim):
        slot[which * dim + e] = np.int8(np.rint(x[e] / scale)) if scale < np.inf else 0
    slot[2 * dim + 2 * which], slot[2 * dim + 2 * which + 1] = np.int8(upper & 0xFF), np.int8(upper >> 8)


def _stored(kv, unit, g, slot, size, which, room):
    """Rows [size, 2d] whose first half is the keys, or whose second half is the values, of `size` slots; made in `room`
    [.., 2d] where they lie in int8. The other half is not to be read."""


@overload(_stored)
def _stored_as(kv, unit, g, slot, size, which, room):
    if kv.dtype == nb.int8:
        return _levels
    return lambda kv, unit, g, slot, size, which, room: kv[unit, g, slot : slot + size]


def _levels(kv, unit, g, slot, size, which, room):
    dim = room.shape[1] // 2
    for i in range(size):
        row, out = kv[unit, g, slot + i], room[i, which * dim : (which + 1) * dim]
        upper = np.uint32(np.uint8(row[2 * dim + 2 * which])) | np.uint32(np.uint8(row[2 * dim + 2 * which + 1])) << 8
        scale = room.dtype.type(np.uint32(upper << 16).view(np.float32))
        levels = row[which * dim : (which + 1) * dim]
        for e in range(dim):
            out[e] = room.dtype.type(levels[e]) * scale
    return room[:size]


@fast
def _choose(q, summaries, table, g, complete, per_page, top_k, sinks, scale):
    """The blocks that the heads `q` [G, d] of KV head `g` read, in order: `attention.select`, for one query."""
    if complete <= top_k:
        return np.arange(complete)
    group, dim = q.shape
    zero = q.dtype.type(0)
    z = np.empty((group, complete), q.dtype)
    b = 0
    while b < complete:
        unit = table[b // per_page]
        for j in range(min(per_page, complete - b)):
            summary = summaries[unit, g, j]
            for h in range(group):
                total = zero
                for e in range(dim):
                    total += q[h, e] * summary[e]
                total *= scale
                if len(summary) > dim:
                    spread = zero
                    for e in range(dim):
                        spread += q[h, e] * q[h, e] * summary[dim + e]
                    total += spread / q.dtype.type(2 * dim)
                z[h, b + j] = total
        b += per_page
    score = z[0]
    if group > 1:
        for h in range(group):
            _softmax(z[h])
        for h in range(1, group):
            for b in range(complete):
                score[b] += z[h, b]
    chosen = np.empty(top_k, np.int64)
    best = np.empty(top_k, q.dtype)
    for b in range(sinks):
        chosen[b] = b
    count = sinks
    for b in range(sinks, complete):  # kept falling by score; an equal one that comes later goes behind
        if count == top_k and (sinks == top_k or not score[b] > best[count - 1]):
            continue
        count = min(count + 1, top_k)
        at = count - 1
        while at > sinks and score[b] > best[at - 1]:
            best[at], chosen[at] = best[at - 1], chosen[at - 1]
            at -= 1
        best[at], chosen[at] = score[b], b
    for i in range(sinks + 1, top_k):  # in the order of the text; `np.sort` takes a second to compile
        b, at = chosen[i], i
        while at > sinks and chosen[at - 1] > b:
            chosen[at] = chosen[at - 1]
            at -= 1
        chosen[at] = b
    return chosen


@fast
def _place(start, end, table, page, runs, used):
    """Append the tokens `start` .. `end` - 1 to the `used` runs, one for each page. Returns how many are used then."""
    while start < end:
        slot = start % page
        size = min(end - start, page - slot)
        runs[used, 0], runs[used, 1], runs[used, 2] = table[start // page], slot, size
        used, start = used + 1, start + size
    return used


@fast
def _mix(weight, near, far, share):
    """Scores to the weights of both softmaxes together, in place.

    One exponential serves both branches. Where it would underflow in one of them (their largest scores lie far apart), each
    takes its own.
    """
    zero, one = weight.dtype.type(0), weight.dtype.type(1)
    top_near = top_far = -weight.dtype.type(np.inf)
    for i in range(len(weight)):
        if near[i] > zero and not weight[i] <= top_near:
            top_near = weight[i]
        if far[i] > zero and not weight[i] <= top_far:
            top_far = weight[i]
    if abs(top_near - top_far) > 60:
        _mix_apart(weight, near, far, share, top_near, top_far)
        return
    top = max(top_near, top_far)
    sum_near = sum_far = zero
    for i in range(len(weight)):
        e = exp(weight[i] - top)
        weight[i] = e
        sum_near += e * near[i]
        sum_far += e * far[i]
    a = share / sum_near
    b = (one - share) / sum_far
    for i in range(len(weight)):
        weight[i] *= a * near[i] + b * far[i]


@fast
def _mix_apart(weight, near, far, share, top_near, top_far):
    zero, one = weight.dtype.type(0), weight.dtype.type(1)
    sum_near = sum_far = zero
    for i in range(len(weight)):
        sum_near += exp(weight[i] - top_near) if near[i] > zero else zero
        sum_far += exp(weight[i] - top_far) if far[i] > zero else zero
    for i in range(len(weight)):
        a = share * exp(weight[i] - top_near) / sum_near if near[i] > zero else zero
        b = (one - share) * exp(weight[i] - top_far) / sum_far if far[i] > zero else zero
        weight[i] = a + b


@fast
def _softmax(z):
    top, total = largest(z), z.dtype.type(0)
    for i in range(len(z)):
        z[i] = exp(z[i] - top)
        total += z[i]
    for i in range(len(z)):
        z[i] /= total


@fast
def _summarise(keys, summary, dim):
    """Mean of the stored `keys` [S, 2d], and their variance where `summary` has room for it."""
    size = summary.dtype.type(len(keys))
    for e in range(dim):
        mean = summary.dtype.type(0)
        for j in range(len(keys)):
            mean += keys[j, e]
        summary[e] = mean / size
    if len(summary) > dim:
        for e in range(dim):
            spread = summary.dtype.type(0)
            for j in range(len(keys)):
                spread += (keys[j, e] - summary[e]) ** 2
            summary[dim + e] = spread / size


@fast
def _norm_and_turn(heads, h, weight, eps, half, keep, cross, out):
    """Head h [d] of `heads` [H d], normed as `weight` is long, its first 2 `half` dims turned."""
    dim = len(out)
    x = heads[h * dim : (h + 1) * dim]
    if len(weight) == 0:
        for i in range(half):
            a, b = x[i], x[half + i]
            out[i] = a * keep[i] + b * cross[i]
            out[half + i] = b * keep[half + i] + a * cross[half + i]
        for i in range(2 * half, dim):
            out[i] = x[i]
    elif len(weight) == dim:
        _times_and_turn(x, inverse_rms(x, eps), weight, half, keep, cross, out)
    else:
        own = weight[h * dim : (h + 1) * dim]
        _times_and_turn(x, inverse_rms(heads, eps), own, half, keep, cross, out)


@fast
def _times_and_turn(x, scale, weight, half, keep, cross, out):
    for i in range(half):
        a = x[i] * scale * weight[i]
        b = x[half + i] * scale * weight[half + i]
        out[i] = a * keep[i] + b * cross[i]
        out[half + i] = b * keep[half + i] + a * cross[half + i]
    for i in range(2 * half, len(x)):
        out[i] = x[i] * scale * weight[i]
