"""Hybrid attention written out from its definition, in float64: the oracle that every fast form is held against.

    o_h = gamma_h * softmax_{L_t}(q.k/sqrt d) V + (1 - gamma_h) * softmax_{T_t U R_t}(q.k/sqrt d) V

and sparse attention, which has one softmax over L_t U R_t.

One document at a time, every mask a dense matrix of 0 and 1, every choice a sorted list. Slow on purpose, and shares
nothing with the forms that run: no layout, no pages, no strips. The sets are defined in `attention.py`.

Letters: B rows, T tokens, n tokens of one document, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, N = n // S
complete blocks.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor


def reference_attention(
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
    summary: Literal["mean", "mean_var"] = "mean",
) -> Tensor:
    """float64 [B, T, H, d]; arguments as `hybrid_attention`. Each run of equal `docs` is attended as if it stood alone."""
    q, k, v = q.double(), k.double(), v.double()
    gamma = torch.as_tensor(local_weight, dtype=torch.float64).expand(q.shape[2])[:, None, None]
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for start, end in documents(docs[row].tolist() if docs is not None else [0] * q.shape[1]):
            one_q, one_k, one_v = (x[row, start:end].transpose(0, 1) for x in (q, k, v))  # [heads, n, d]
            chosen = chosen_blocks(block_scores(one_q, one_k, block, summary), block, top_k, sinks)
            near = masked_softmax(one_q, one_k, one_v, local_mask(end - start, window).expand(k.shape[2], -1, -1))
            far = masked_softmax(one_q, one_k, one_v, global_mask(chosen, block, end - start))
            out[row, start:end] = (gamma * near + (1 - gamma) * far).transpose(0, 1)
    return out


def reference_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    sinks: int,
    bias: Tensor,
    dense_length: int,
    docs: Tensor | None = None,
    summary: Literal["mean", "mean_var"] = "mean",
) -> Tensor:
    """float64 [B, T, H, d]: one softmax over the window, to whose scores `bias` [H] is added, and the blocks chosen from those
    that begin before it; over all before them for queries at positions before `dense_length`."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for start, end in documents(docs[row].tolist() if docs is not None else [0] * q.shape[1]):
            n = end - start
            one_q, one_k, one_v = (x[row, start:end].transpose(0, 1) for x in (q, k, v))
            counts = [max(0, math.ceil((t - window + 1) / block)) for t in range(n)]
            chosen = chosen_blocks(block_scores(one_q, one_k, block, summary, counts), block, top_k, sinks, counts)
            near = local_mask(n, window)
            early = torch.tensor([[t < dense_length] for t in range(n)])
            mask = global_mask(chosen, block, n) & ~tail_mask(n, block) | near | early & local_mask(n, n)
            more = bias.double()[:, None, None] * (near & ~early)
            out[row, start:end] = masked_softmax(one_q, one_k, one_v, mask, more).transpose(0, 1)
    return out


def documents(ids: list[int]) -> list[tuple[int, int]]:
    """Start and end of each run of equal ids."""
    cuts = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1]), len(ids)]
    return list(pairwise(cuts))


def local_mask(n: int, window: int) -> Tensor:
    """bool [n, n]: L_t, the last `window` tokens of each query."""
    return torch.tensor([[t - window < j <= t for j in range(n)] for t in range(n)])


def tail_mask(n: int, block: int) -> Tensor:
    """bool [n, n]: T_t, the tokens after the last complete block of each query."""
    return torch.tensor([[(t + 1) // block * block <= j <= t for j in range(n)] for t in range(n)])


def block_scores(
    q: Tensor, k: Tensor, block: int, summary: Literal["mean", "mean_var"], counts: list[int] | None = None
) -> Tensor:
    """[Hk, n, N]: what each query gives each block that it may choose, of q [H, n, d] and k [Hk, n, d]; else -inf. `counts`
    [n]: how many those are, from the first on; without it those that are complete."""
    heads, n, d = q.shape
    groups, count = heads // k.shape[0], n // block
    scores = torch.full((k.shape[0], n, count), -math.inf, dtype=torch.float64)
    for g in range(k.shape[0]):
        for t in range(n):
            visible = counts[t] if counts else (t + 1) // block
            if not visible:
                continue
            keys = k[g, : visible * block].unflatten(0, (visible, block))
            mean, var = keys.mean(1), ((keys - keys.mean(1, keepdim=True)) ** 2).mean(1)
            mine = q[g * groups : (g + 1) * groups, t]  # [G, d]
            z = mine @ mean.T / math.sqrt(d)
            if summary == "mean_var":
                z = z + 0.5 / d * mine**2 @ var.T
            scores[g, t, :visible] = z[0] if groups == 1 else z.softmax(-1).sum(0).log()
    return scores


def chosen_blocks(scores: Tensor, block: int, top_k: int, sinks: int, counts: list[int] | None = None) -> Tensor:
    """bool [Hk, n, N]: R_t, the sinks and the best of the rest, `top_k` in all; ties go to the lower block. `counts` as in
    `block_scores`."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for g in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            visible = range(counts[t] if counts else (t + 1) // block)
            rest = sorted(visible[sinks:], key=lambda b: (-float(scores[g, t, b]), b))
            for b in [*visible[:sinks], *rest][:top_k]:
                chosen[g, t, b] = True
    return chosen


def global_mask(chosen: Tensor, block: int, n: int) -> Tensor:
    """bool [Hk, n, n]: T_t and every token of R_t."""
    mask = tail_mask(n, block).repeat(chosen.shape[0], 1, 1)
    whole = chosen.repeat_interleave(block, dim=-1)
    mask[..., : whole.shape[-1]] |= whole
    return mask


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, more: Tensor | float = 0.0) -> Tensor:
    """[H, n, d]: attention of q [H, n, d] to the keys that `mask` [Hk, n, n] allows, with `more` [H, n, n] added."""
    k, v, mask = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v, mask))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + more).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v
