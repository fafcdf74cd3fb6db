"""Temperature, and what top-k, top-p and min-p leave of the tokens. Filters are thresholds on the logit: equal logits are kept
or dropped together.

Letters: R rows (requests), V vocabulary, C candidates looked at by top-k and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.device import sent
from shoal.engine.events import Sampling

CANDIDATES = 128  # how many of the likeliest tokens top-p looks at before it sorts all
CANDIDATES_THERE = 1024  # as many on a device, where to find out that they were not enough takes a copy


def heat(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Temperatures [R]. Less than the least is 0 in fp32, and 0 / 0 would stand for the likeliest token."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return sent([s.temperature for s in samplings], logits.device, exact).clamp(min=torch.finfo(exact).tiny)


def filtered(s: Sampling) -> bool:
    """Does it leave tokens out?"""
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def limits(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row [R], for `logits` [R, V]: how many tokens top-k keeps (V: all), top-p's share, and the logarithm of
    min-p's, both fp64."""
    vocab, device = logits.shape[-1], logits.device
    top_k = sent([min(s.top_k or vocab, vocab) for s in samplings], device)
    top_p, min_p = sent([[s.top_p for s in samplings], [s.min_p for s in samplings]], device, torch.double)
    return top_k, top_p, min_p.log()


def thresholds(z: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The lowest logit that each row keeps, [R], for z [R, V] with its largest at 0.

    top-k keeps the k likeliest; top-p, of those, the fewest with that share of their mass; min-p what is at least that
    share of the likeliest.
    """
    vocab = z.shape[-1]
    count = candidates_of(samplings, vocab, CANDIDATES)
    found, enough = lowest(z, samplings, count)
    # a flat distribution: sort it all
    return found if count == vocab or bool(enough.all()) else lowest(z, samplings, vocab)[0]


def candidates_of(samplings: Sequence[Sampling], vocab: int, candidates: int) -> int:
    """How many of the likeliest tokens to look at: those of the largest top-k, and `candidates` where there is a top-p."""
    wanted = max((s.top_k for s in samplings if 0 < s.top_k < vocab), default=1)
    nucleus = any(s.top_p < 1 for s in samplings)
    return min(vocab, max(wanted, candidates if nucleus else 1))


def lowest(z: Tensor, samplings: Sequence[Sampling], count: int) -> tuple[Tensor, Tensor]:
    """As `thresholds`, of the `count` likeliest tokens of each row; and which rows' filters these tell, [R]."""
    vocab = z.shape[-1]
    k, top_p, floor = limits(z, samplings)
    ordered = z.topk(count, dim=-1).values  # [R, C], falling
    summed = ordered.exp().cumsum(-1)
    of_k = (k.clamp(max=count) - 1)[:, None]
    # top-p's share of what top-k leaves
    goal = top_p * torch.where(k < vocab, summed.gather(-1, of_k)[:, 0], z.exp().sum(-1))
    of_p = (summed < goal[:, None]).sum(-1, keepdim=True).clamp(max=count - 1)
    at_k = ordered.gather(-1, of_k)[:, 0].masked_fill(k == vocab, -math.inf)
    at_p = ordered.gather(-1, of_p)[:, 0].masked_fill(top_p >= 1, -math.inf)
    enough = (summed[:, -1] >= goal) | (top_p >= 1) | (count == vocab)
    return torch.stack([at_k, at_p, floor]).amax(0), enough
