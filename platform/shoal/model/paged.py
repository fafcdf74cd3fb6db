"""Hybrid attention over pages: the one function that writes K/V, and reading them for prefill, decoding, verification.

The sum is `attention.attend`'s; what differs is where the keys lie. Requests with one new token decode together, a chunk
of several is attended for itself, each in the cheapest way that its length allows (`reach`).

Letters: N new tokens, R requests, T new tokens a request, X stored tokens (M pages of P slots), B blocks that exist,
H query heads, Hk KV heads, G = H/Hk, d head dim, m values of a summary, U units, S block, K blocks read, w window,
E rows that complete a block, Y tokens that a branch reads, W numbers in a slot (`slots`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.model import slots
from shoal.model.attention import Layout, attend, block_scores, select
from shoal.model.cache import PagedStep, Rows
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.reach import Reach


def write_kv(k: Tensor, v: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep) -> None:
    """Store the new keys and values, k and v [N, Hk, d], and the summary of every block that they complete.

    Every path that writes K/V goes through here, so a summary is valid exactly when its block lies within the length.
    kv [U, Hk, P, W] and summaries [U, Hk, P/S, m] are changed in place; m = 2d when the variance follows the mean.
    """
    wide, size = kv.shape[-1], k.shape[-1]
    kv.view(-1, wide).index_copy_(0, step.written(kv.shape[1]), slots.encode(k, v, kv.dtype).view(-1, wide))
    ends = step.rows.block_ends
    if len(ends):
        units, offsets = step.units[ends], step.rows.offsets[ends]
        inside = offsets[:, None] - torch.arange(step.block - 1, -1, -1, device=offsets.device)
        keys = slots.decode(kv[units[:, None], :, inside], summaries.dtype)[0]  # [E, S, Hk, d]
        mean = keys.mean(1)
        if summaries.shape[-1] > size:
            mean = torch.cat([mean, (keys - mean[:, None]).square().mean(1)], dim=-1)
        summaries[units, :, offsets // step.block] = mean


def paged_attention(q: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep, reach: Reach) -> Tensor:
    """[N, H, d] for q [N, H, d] over pages: kv [U, Hk, P, W], summaries [U, Hk, P/S, m] as `write_kv` left them."""
    rows = step.rows
    if fused.usable(q):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        fused.attend(q, kv, summaries, step, reach, out)
        return _chunks(q, kv, summaries, step, reach, out, rows.of_at_least(fused.SHORT + 1))
    if launch.usable(q) and launch.attends(step, reach):
        out = launch.attend(q, kv, summaries, step, reach)
        return _chunks(q, kv, summaries, step, reach, out, launch.shared(step, reach))
    reads = step.read(kv.shape[1])
    if not rows.chunks:
        return _alone(q, kv, summaries, reads, rows, reach)
    out = torch.empty_like(q)
    if rows.singles:
        at = rows.single_rows
        out[at] = _alone(q[at], kv, summaries, reads[rows.single_requests], rows.single, reach)
    return _chunks(q, kv, summaries, step, reach, out, rows.of_at_least(2))


def _alone(q: Tensor, kv: Tensor, summaries: Tensor, reads: Tensor, rows: Rows, reach: Reach) -> Tensor:
    """[R, H, d] for one query a request. Those that read all by their position go apart from the others, so that a long request
    beside them costs them nothing, nor they that one."""
    if not 0 < reach.dense < reads.shape[-1] * rows.page:
        return _attend(q[:, None], kv, summaries, reads, rows, reach)[:, 0]
    out = torch.empty_like(q)
    early, late = rows.once(("parted", reach.dense), lambda: rows.parted(reach.dense))
    for at, some, pages in ((*early, reach.dense // rows.page), (*late, reads.shape[-1])):
        if len(at):
            out[at] = _attend(q[at][:, None], kv, summaries, reads[at, :, :pages], some, reach)[:, 0]
    return out


def _chunks(
    q: Tensor,
    kv: Tensor,
    summaries: Tensor,
    step: PagedStep,
    reach: Reach,
    out: Tensor,
    chunks: Sequence[tuple[int, int]],
) -> Tensor:
    """`out` [N, H, d] with the rows of `chunks` filled in, a request at a time: which, and how many of its first rows."""
    for r, count in chunks:
        chunk, span = step.rows.of(r, count), slice(step.starts[r], step.starts[r] + count)
        end = step.rows.end(r) + span.stop - step.starts[r + 1]
        reads = step.read(kv.shape[1])[r : r + 1, :, : end // step.page + 1]
        out[span] = _attend(q[span][None], kv, summaries, reads, chunk, reach)[0]
    return out


def _attend(q: Tensor, kv: Tensor, summaries: Tensor, reads: Tensor, rows: Rows, reach: Reach) -> Tensor:
    """[R, T, H, d] for q [R, T, H, d] at the positions of `rows`, over the pages `reads` [R, Hk, M]."""
    keys = reads.shape[-1] * rows.page
    positions = rows.positions.view(q.shape[:2])
    how = reach.way(keys, rows.block)
    if how == "whole":
        k, v = _all(kv, reads, rows, q.dtype)
        bias = rows.once(("causal", keys), lambda: _causal(positions, keys, q.shape[2] // kv.shape[1], q.dtype))
        return _softmax(q, k, v, bias)
    if how == "chosen" and q.shape[1] == 1:
        return _sparse(q[:, 0], kv, summaries, reads, rows, reach)[:, None]
    k, v = _all(kv, reads, rows, q.dtype)
    layout = rows.once(
        ("layout", keys, reach.window, reach.sinks),
        lambda: Layout.causal(positions, keys, window=reach.window, block=rows.block, sinks=reach.sinks),
    )
    found = _summaries(summaries, reads) if reach.chooses else None
    return attend(q, k.transpose(1, 2), v.transpose(1, 2), found, layout, reach)


def _all(kv: Tensor, reads: Tensor, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v [R, Hk, X, d] in `dtype` of all pages of `reads` [R, Hk, M]."""
    requests, kv_heads, pages = reads.shape
    wide, keys = kv.shape[-1], pages * rows.page
    stored = kv.view(-1, rows.page, wide).index_select(0, reads.flatten()).view(requests, kv_heads, keys, wide)
    # a stale slot may hold NaN, and 0 * NaN is NaN: what lies past the length is read as zero
    if stored.device.type == "cpu":
        stale = rows.once(("stale", kv_heads, keys), lambda: _stale(rows.last, kv_heads, keys))
        stored.view(-1, wide).index_fill_(0, stale, 0)
    else:
        past = rows.once(("past", keys), lambda: _past(rows.last, keys))
        stored.masked_fill_(past[:, None, :, None], 0)
    return slots.decode(stored, dtype)


def _past(last: Tensor, keys: int) -> Tensor:
    """bool [R, X]: what stands after a request's last token, `last` [R]."""
    return torch.arange(keys, device=last.device) > last[:, None]


def _stale(last: Tensor, kv_heads: int, keys: int) -> Tensor:
    """The same as numbers of rows of [R * Hk * X]: on a CPU these are fewer. A device would be waited for, to count them."""
    request, at = _past(last, keys).nonzero(as_tuple=True)
    heads = torch.arange(kv_heads, device=last.device)[:, None]
    return ((request * kv_heads + heads) * keys + at).flatten()


def _summaries(summaries: Tensor, reads: Tensor) -> Tensor:
    """[R, B, Hk, m] of the pages `reads` [R, Hk, M]."""
    found = summaries.flatten(0, 1).index_select(0, reads.flatten())
    return found.view(*reads.shape[:2], -1, summaries.shape[-1]).transpose(1, 2)


def _causal(positions: Tensor, keys: int, group: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores, [R, 1, G T, X]: -inf for keys after the query at `positions` [R, T]."""
    if positions.shape[1] > 1:  # else a query is one row of its heads
        positions = positions.repeat(1, group)  # and not what is added: both would be there at once
    past = torch.arange(keys, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(past.shape, dtype=dtype, device=past.device).masked_fill_(past, -math.inf)


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention [R, T, H, d] under `bias` [R, 1, G T or 1, X]; q [R, T, H, d], k and v [R, Hk, X, d]. The query
    heads of a KV head are laid one after the other along T, so that k and v are not copied for them."""
    requests, queries, _, size = q.shape
    if queries == 1:
        grouped = q.view(requests, k.shape[1], -1, size)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias).view(q.shape)
    folded = q.unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
    return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _sparse(q: Tensor, kv: Tensor, summaries: Tensor, reads: Tensor, rows: Rows, reach: Reach) -> Tensor:
    """[R, H, d] for one query a request, q [R, H, d], reading w + (K+1) S stored tokens and the summaries, whatever the length;
    with the window alone w tokens."""
    kv_heads, page, wide = kv.shape[1:]
    positions = rows.positions
    grouped = q.view(len(q), kv_heads, -1, q.shape[-1])  # [R, Hk, G, d]
    memory = kv.view(-1, wide)

    def branch(at: Tensor, more: Tensor | None = None) -> Tensor:
        """Attention to the tokens at positions `at` [R, Hk, Y]; those before the first or after the query are left out. `more`
        [Hk, G, Y] is added to their scores."""
        valid = (at >= 0) & (at <= positions[:, None, None])
        at = at.clamp(min=0).minimum(positions[:, None, None])
        stored = memory[reads.gather(2, at // page) * page + at % page]  # [R, Hk, Y, W]
        k, v = slots.decode(stored.masked_fill_(~valid[..., None], 0), q.dtype)
        mask = valid[:, :, None]
        if more is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf) + more
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)

    near = positions[:, None] - torch.arange(reach.window - 1, -1, -1, device=kv.device)
    near = near[:, None].expand(-1, kv_heads, -1)
    far = _chosen_tokens(q, _summaries(summaries, reads), rows, reach) if reach.chooses else None
    if reach.bias is not None and far is not None:
        far = torch.where(far < near[..., :1], far, -1)
        bias = reach.bias.to(q.dtype).view(kv_heads, -1, 1)
        more = torch.cat(
            [bias.new_zeros(1, 1, far.shape[-1]).expand(*bias.shape[:2], -1), bias.expand(-1, -1, near.shape[-1])], -1
        )
        return branch(torch.cat([far, near], dim=-1), more).flatten(1, 2)
    local = branch(near)
    if reach.gamma is None or far is None:
        return local.flatten(1, 2)
    far = branch(far)
    return torch.lerp(far, local, reach.gamma.view(kv_heads, -1, 1)).flatten(1, 2)


def _chosen_tokens(q: Tensor, summaries: Tensor, rows: Rows, reach: Reach) -> Tensor:
    """Positions of the tokens that the global branch reads, [R, Hk, (K+1) S]: the chosen blocks in order, then the tail, which
    is in the window where there is one softmax; an empty place holds positions after the query's. q [R, H, d], summaries
    [R, B, Hk, m]."""
    blocks = torch.arange(summaries.shape[1], device=q.device)
    complete = (rows.positions + 1) // rows.block
    if reach.bias is not None:  # those that begin before the window
        complete = (rows.positions - reach.window + rows.block).clamp(min=0) // rows.block
    eligible = (blocks < complete[:, None])[:, None]  # [R, 1, B]
    scores = block_scores(q[:, None], summaries, eligible)
    chosen = select(scores, eligible, (blocks < reach.sinks)[None, None], reach.top_k)[:, :, 0]  # [R, Hk, B]
    order = torch.where(chosen, blocks, len(blocks)).topk(reach.top_k, dim=-1, largest=False).values
    picked = torch.cat([order, complete[:, None, None].expand(-1, order.shape[1], 1)], dim=-1)
    return (picked[..., None] * rows.block + torch.arange(rows.block, device=q.device)).flatten(2)
