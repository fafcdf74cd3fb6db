"""Hybrid attention: a gated sum of a sliding window and of a sparse global branch over the best blocks.

    o_h = gamma_h * softmax_{L_t}(q.k/sqrt d) V + (1 - gamma_h) * softmax_{T_t U R_t}(q.k/sqrt d) V

L_t: the last w tokens. T_t: the tail, the incomplete last block, always read and never scored. R_t: the sink blocks and
the best of the complete blocks, K in all, chosen by `select` from a summary of each block's keys: their mean, or mean and
variance (`mean_var`). With S = 1, no sinks and
one KV head a query head this is the source article's formula with a causal mask. The choice shared within a group of heads
follows NSA (arXiv 2502.11089, eq. 10). `reference.py` writes the same out without any of what makes it fast.

Letters: B rows, T new tokens (queries), X stored tokens (keys), H query heads, Hk KV heads, G = H/Hk, d head dim,
w window, S block, K blocks read, s sinks, N blocks that exist, m values of a summary (d, or 2d with the variance).

Dense layers read all up to the query. Sparse ones, which are made of dense ones, have one softmax over L_t U R_t, with b_h
added to the scores of L_t, and R_t chosen from the blocks that begin before L_t: where those are K or fewer and b_h is 0, this
is dense attention. A query before a given position reads all.

One `select` serves training, prefill and decoding, and one `attend` all but short and long decoding (`paged.py`): they
differ only in the `Layout` they are given. On a CUDA device whole rows go by kernels without masks (`gpu/sparse.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.model.gpu import sparse
from shoal.model.reach import Reach

Summary = Literal["mean", "mean_var"]

CLOSED = 1e30  # taken from the score of a block that may not be read: finite, so that where none may, nothing is NaN
STRIP = 64  # queries of the global branch that are attended together in training


@dataclass
class Layout:
    """Who may see whom; the same for every layer of one forward.

    local, tail, past [B, T, X] bool, `past` of every key up to the query; eligible [B, T, N] bool: complete blocks before the
    query; beyond [B, T, N] bool: those that begin before its window; sink [B, 1 or T, N] bool;
    block_of [B, X]: the block of each key; positions [B, T]: of the queries, in their document (for rope).
    band [B, T/b, b, w + b] bool: `local` again, as each b queries see their own and the previous w keys; None where a row
    does not divide so. It is what makes the local branch cost T w and not T T.
    """

    local: Tensor
    tail: Tensor
    past: Tensor
    eligible: Tensor
    beyond: Tensor
    sink: Tensor
    block_of: Tensor
    positions: Tensor
    block: int
    band: Tensor | None = None

    @classmethod
    def packed(cls, docs: Tensor, *, window: int, block: int, sinks: int) -> Layout:
        """For rows that hold several documents: `docs` [B, T] are document ids, equal ids contiguous. Documents never
        see each other; positions and blocks restart in each."""
        new = torch.ones_like(docs, dtype=torch.bool)
        new[:, 1:] = docs[:, 1:] != docs[:, :-1]
        at = torch.arange(docs.shape[1], device=docs.device).expand_as(docs)
        position = at - torch.where(new, at, 0).cummax(1).values
        block_of = (position % block == 0).cumsum(1) - 1
        count = int(block_of.max()) + 1
        ends = position % block == block - 1
        # per block: its index in its document and the row position of its last token (T where it is incomplete)
        shape = (docs.shape[0], count)
        index = torch.zeros(shape, dtype=torch.long, device=docs.device).scatter_(1, block_of, position // block)
        last = torch.full(shape, docs.shape[1], dtype=torch.long, device=docs.device)
        last.scatter_reduce_(1, block_of, torch.where(ends, at, docs.shape[1]), "amin")
        start = at - position  # row position of the query's document
        block_start = last - (index * block + block - 1)
        eligible = (last[:, None] <= at[..., None]) & (block_start[:, None] == start[..., None])
        same = start[:, :, None] == start[:, None, :]
        back = position[:, :, None] - position[:, None, :]
        complete = (position + 1) // block * block
        past = same & (back >= 0)
        local = past & (back < window)
        return cls(
            local=local,
            tail=past & (position[:, None, :] >= complete[..., None]),
            past=past,
            eligible=eligible,
            beyond=eligible & ((index * block)[:, None] + window <= position[..., None]),
            sink=(index < sinks)[:, None],
            block_of=block_of,
            positions=position,
            block=block,
            band=_band(local, window),
        )

    @classmethod
    def causal(cls, positions: Tensor, keys: int, *, window: int, block: int, sinks: int) -> Layout:
        """For one document a row: queries at `positions` [B, T] over keys 0 .. `keys`-1 (a multiple of `block`)."""
        at = torch.arange(keys, device=positions.device)
        blocks = torch.arange(keys // block, device=positions.device)
        # places are compared as they stand: how far apart each two are would take 8 bytes of each key, and all else 4
        complete, past = (positions + 1) // block, at <= positions[..., None]
        return cls(
            local=past & (at > (positions - window)[..., None]),
            tail=past & (at >= (complete * block)[..., None]),
            past=past,
            eligible=blocks < complete[..., None],
            beyond=(blocks * block + window <= positions[..., None]) & (blocks < complete[..., None]),
            sink=(blocks < sinks)[None, None],
            block_of=(at // block).expand(positions.shape[0], -1),
            positions=positions,
            block=block,
        )


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    sinks: int,
    local_weight: Tensor | float,
    docs: Tensor | None = None,
    summary: Summary = "mean",
) -> Tensor:
    """The attention output [B, T, H, d] for q [B, T, H, d] and k, v [B, T, Hk, d] (after norm and rope).

    `window` and `block` in tokens, `top_k` and `sinks` in blocks; `local_weight` is gamma, a number or [H]. `docs` [B, T]:
    document ids when a row holds several. `summary`: what a block is scored by. Differentiable in q, k, v and local_weight;
    the choice of blocks takes no gradient. Raises ValueError when H is not a multiple of Hk.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads ({q.shape[2]}) must be a multiple of KV heads ({k.shape[2]})")
    ids = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device) if docs is None else docs
    reach = Reach(
        window, top_k, sinks, torch.as_tensor(local_weight, dtype=q.dtype, device=q.device).expand(q.shape[2])
    )
    if sparse.usable(q, block):
        return sparse.attend(q, k, v, sparse.Spans.packed(ids, block), reach, summary == "mean_var")
    layout = Layout.packed(ids, window=window, block=block, sinks=sinks)
    return attend(q, k, v, block_summaries(k, layout, summary), layout, reach)


def attend(q: Tensor, k: Tensor, v: Tensor, summaries: Tensor | None, layout: Layout, reach: Reach) -> Tensor:
    """[B, T, H, d]: what a layer of this `reach` reads, by masked attention. `layout` is of its window, sinks and blocks.

    q [B, T, H, d]; k, v [B, X, Hk, d]; summaries [B, N, Hk, m], which the window alone and dense layers do without.
    """
    if layout.past.shape[-1] <= reach.dense:
        return _masked(q, k, v, layout.past[:, None])
    if reach.bias is not None and summaries is not None:
        return _one_softmax(q, k, v, summaries, layout, reach, reach.bias)
    local = _banded(q, k, v, layout.band) if layout.band is not None else _masked(q, k, v, layout.local[:, None])
    if reach.gamma is None or summaries is None:
        return local
    far = _by_strips(q, k, v, _chosen(q, summaries, layout.eligible, layout, reach), layout, layout.tail)
    return torch.addcmul(far, reach.gamma[:, None], local - far)


def _one_softmax(
    q: Tensor, k: Tensor, v: Tensor, summaries: Tensor, layout: Layout, reach: Reach, bias: Tensor
) -> Tensor:
    """A sparse layer's, [B, T, H, d]."""
    chosen = _chosen(q, summaries, layout.beyond, layout, reach)
    early = (layout.positions < reach.dense)[..., None]
    always = layout.local | (layout.past & early)
    return _by_strips(q, k, v, chosen, layout, always, (bias, layout.local & ~early))


def _chosen(q: Tensor, summaries: Tensor, among: Tensor, layout: Layout, reach: Reach) -> Tensor:
    """`select` among some blocks, by their scores."""
    with torch.autocast(q.device.type, enabled=False):  # scored in bf16, training would choose otherwise than decoding
        return select(block_scores(q, summaries, among), among, layout.sink, reach.top_k)


@torch.no_grad()
def block_summaries(k: Tensor, layout: Layout, summary: Summary) -> Tensor:
    """What each block is scored by, [B, N, Hk, m] in fp32 or better: the mean of its keys, followed for `mean_var` by their
    variance. An incomplete block's value is never read."""
    exact = k.to(torch.promote_types(k.dtype, torch.float32))
    index = layout.block_of[:, :, None, None].expand_as(exact)
    none = exact.new_zeros(k.shape[0], layout.eligible.shape[-1], *k.shape[2:])
    mean = none.scatter_add(1, index, exact) / layout.block
    if summary == "mean":
        return mean
    spread = (exact - mean.gather(1, index)).square()
    return torch.cat([mean, none.scatter_add(1, index, spread) / layout.block], dim=-1)


@torch.no_grad()
def block_scores(q: Tensor, summaries: Tensor, eligible: Tensor) -> Tensor:
    """How much each query wants each block, [B, Hk, T, N]; q [B, T, H, d], summaries [B, N, Hk, m].

    z = q.mean/sqrt d, and with the variance + q^2.var/2d: the second-order estimate of log mean exp(q.k/sqrt d) over the
    block. With one query head a KV head that is the score; else it is the softmax of z over blocks, summed over the group,
    so that the heads of a group choose together (its log orders alike and costs a third more of the scoring)."""
    kv_heads, scale = summaries.shape[2], 1 / math.sqrt(q.shape[-1])
    exact = q.to(summaries.dtype)
    summaries = summaries.nan_to_num(0, 0, 0)  # a stale one may be anything, and would stay so
    if summaries.shape[-1] > q.shape[-1]:
        exact = torch.cat([exact, exact.square() * (scale / 2)], dim=-1)
    grouped = exact.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, Hk, G, T, m]
    z = grouped @ summaries.permute(0, 2, 3, 1)[:, :, None] * scale  # [B, Hk, G, T, N]
    if grouped.shape[2] == 1:
        return z[:, :, 0]
    z += (eligible.to(z.dtype) - 1)[:, None, None] * CLOSED
    return torch.softmax(z, dim=-1).sum(2)


@torch.no_grad()
def select(score: Tensor, eligible: Tensor, sink: Tensor, top_k: int) -> Tensor:
    """Which blocks are read: bool [B, Hk, T, N] with at most `top_k` true a query, sinks first, then by score, ties to
    the lower block. score [B, Hk, T, N]; eligible [B, T, N]; sink broadcasts to it."""
    eligible = eligible[:, None]
    if score.shape[-1] <= top_k:
        return eligible.expand_as(score)
    score = score + _bias(eligible, score.dtype) - _bias(~(sink[:, None] & eligible), score.dtype)
    kth = score.topk(top_k, dim=-1).values[..., -1:]
    above = score > kth
    tied = (score == kth) & eligible
    room = top_k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _by_strips(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    layout: Layout,
    always: Tensor,
    favour: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention [B, T, H, d] to the `chosen` blocks [B, Hk, T, N] and to what is `always` read [B, T, X]; `favour`: [H], added
    to the scores of [B, T, X]. Where the queries are the keys (training), each STRIP of queries is spared the keys after
    it."""
    queries, keys = q.shape[1], k.shape[1]
    out, end = [], 0
    # scores of each head need as many biases, so that these are made for few queries at a time
    for strip in q.split(STRIP, dim=1) if queries == keys or favour else (q,):
        start, end = end, end + strip.shape[1]
        read = end if queries == keys else keys
        block_of = layout.block_of[:, None, None, :read].expand(*chosen.shape[:2], end - start, -1)
        mask = chosen[:, :, start:end].gather(-1, block_of) | always[:, None, start:end, :read]
        more = favour[0][:, None, None] * favour[1][:, None, start:end, :read] if favour else None
        out.append(_masked(strip, k[:, :read], v[:, :read], mask, more))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, more: Tensor | None = None) -> Tensor:
    """Softmax attention [B, T, H, d] under `mask` [B, 1 or Hk, T, X], with `more` [B, H, T, X] added to the scores; q
    [B, T, H, d], k and v [B, X, Hk, d].

    A row and a KV head are one element of the batch, so that its query heads share k, v and the mask without a copy for each.
    """
    rows, kv_heads = q.shape[0], k.shape[2]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B * Hk, G, T, d]
    k, v = (x.transpose(1, 2).flatten(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    bias = _bias(mask, q.dtype).expand(-1, kv_heads, -1, -1).flatten(0, 1)[:, None]
    if more is not None:
        bias = bias + more.to(q.dtype).unflatten(1, (kv_heads, -1)).flatten(0, 1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
    return out.unflatten(0, (rows, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `mask` is true, -inf elsewhere. By arithmetic, as torch fills under a mask one number at
    a time on a CPU: 0.35 ms in place of 1.7 for half a million."""
    return mask.to(dtype).reciprocal_().neg_().add_(1)


def _banded(q: Tensor, k: Tensor, v: Tensor, band: Tensor) -> Tensor:
    """The local branch, [B, T, H, d], by bands of b queries over the w + b keys up to their last; `band` [B, T/b, b, w + b]."""
    rows, bands, size, reach = band.shape
    pieces = reach // size

    def windows(x: Tensor) -> Tensor:  # [B, T, Hk, d] -> [B * T/b, w + b, Hk, d]
        cut = F.pad(x, (0, 0, 0, 0, reach - size, 0)).unflatten(1, (bands + pieces - 1, size))
        return torch.cat([cut[:, i : i + bands] for i in range(pieces)], dim=2).flatten(0, 1)

    queries = q.unflatten(1, (bands, size)).flatten(0, 1)
    out = _masked(queries, windows(k), windows(v), band.flatten(0, 1)[:, None])
    return out.unflatten(0, (rows, bands)).flatten(1, 2)


def _band(local: Tensor, window: int) -> Tensor | None:
    """`local` [B, T, T] cut to bands [B, T/b, b, w + b] of b = w/2 queries (w, where w is odd): of their keys two thirds are in
    a query's window. None when b does not divide T, or when bands would not be less."""
    length, size = local.shape[-1], window // 2 if window % 2 == 0 else window
    if length % size or length <= 2 * window:
        return None
    tall = F.pad(local, (window, 0)).unflatten(1, (length // size, size))  # [B, T/b, b, w + T]
    return torch.stack([tall[:, i, :, i * size : i * size + window + size] for i in range(tall.shape[1])], dim=1)
