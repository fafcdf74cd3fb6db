"""Temperature, and what top-k, top-p and min-p leave of the tokens. Filters are thresholds on the logit: equal logits are kept
or dropped together.

Letters: R rows (requests), V vocabulary, C candidates looked at by top-k and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.events import Sampling
from shoal.model.sending import sent

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
    found, enough = lowest(z, samplings, [CANDIDATES] * len(samplings))
    # a flat distribution: sort it all
    return found if bool(enough.all()) else lowest(z, samplings, [z.shape[-1]] * len(samplings))[0]


def lowest(z: Tensor, samplings: Sequence[Sampling], candidates: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As `thresholds`, where a row's top-p is looked for among so many `candidates` [R], or its top-k where that is more; and
    which rows' filters these tell, [R]. It depends on no other row, whether they tell or not."""
    vocab = z.shape[-1]
    k, top_p, floor = limits(z, samplings)
    looked = [
        min(vocab, max(s.top_k if s.top_k < vocab else 1, most if s.top_p < 1 else 1))
        for s, most in zip(samplings, candidates, strict=True)
    ]
    count, last = max(looked), sent([most - 1 for most in looked], z.device)[:, None]
    ordered = z.topk(count, dim=-1).values  # [R, C], falling
    summed = ordered.exp().cumsum(-1)
    of_k = (k.clamp(max=count) - 1)[:, None]
    # top-p's share of what top-k leaves
    goal = top_p * torch.where(k < vocab, summed.gather(-1, of_k)[:, 0], z.exp().sum(-1))
    of_p = torch.minimum((summed < goal[:, None]).sum(-1, keepdim=True), last)
    at_k = ordered.gather(-1, of_k)[:, 0].masked_fill(k == vocab, -math.inf)
    at_p = ordered.gather(-1, of_p)[:, 0].masked_fill(top_p >= 1, -math.inf)
    enough = (summed.gather(-1, last)[:, 0] >= goal) | (top_p >= 1) | (last[:, 0] == vocab - 1)
    return torch.stack([at_k, at_p, floor]).amax(0), enough
