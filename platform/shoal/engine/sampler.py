"""Logits to tokens, for a whole batch at once: penalties, bias, temperature, top-k, top-p, min-p, seeds, logprobs.

Two promises. Control tokens other than ``<|end|>``, and ids that the tokenizer does not have, are never chosen: their
logits are set to -inf here, before anything else, and nothing raises them again. And a token depends on its request
alone: the random number comes from (seed, position), every operation works on rows, and filters are thresholds on the
logit (equal logits are kept or dropped together), so neither batch mates nor a preemption can change it.

Letters: R rows (requests), V vocabulary, C candidates looked at by top-k and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.engine.events import Sampling, TokenLogprob
from shoal.engine.plan import Sampled
from shoal.inputs.tokenizer import END_ID

CANDIDATES = 128  # how many of the likeliest tokens top-p looks at before it sorts all
NOT_FINITE = "the model gave logits that are not finite"


class Draw(Protocol):
    """What the sampler needs to know of a request (`engine.sequence.Sequence` is one)."""

    tokens: list[int]  # the prompt, then the answer
    prompt_len: int
    seed: int

    @property
    def sampling(self) -> Sampling: ...


class Sampler:
    def __init__(self, forbidden: Tensor) -> None:
        """`forbidden` bool [V]: tokens that are never chosen (`Model.forbidden`)."""
        self._closed = forbidden.nonzero().flatten()

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
        """One token for each row of `logits` [R, V] (changed in place)."""
        logits.index_fill_(-1, self._closed, -math.inf)
        reported = {r: logits[r].clone() for r, draw in enumerate(draws) if draw.sampling.logprobs is not None}
        _adjust(logits, draws)
        best, choice = logits.max(-1)  # NaN wins a max, so one look at `best` finds every bad row
        fine = best.isfinite().tolist()
        random = [r for r, draw in enumerate(draws) if draw.sampling.temperature > 0 and fine[r]]
        if random:
            at = torch.tensor(random, device=logits.device)
            choice[at] = _draw(logits[at], [draws[r] for r in random])
        tokens = choice.tolist()
        logprobs = _logprobs(reported, draws, tokens)
        return [
            Sampled(token, logprobs.get(r)) if fine[r] else Sampled(token, error=NOT_FINITE)
            for r, token in enumerate(tokens)
        ]


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each (seed, position): splitmix64 of the two, so that it needs no state."""
    mixed = _mix(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))
    return (_mix(mixed + np.array(positions, dtype=np.uint64)) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _adjust(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Bias, least length and penalties, in place, each as one sparse update of the whole batch."""
    _update(logits, draws, _bias, lambda old, value: old + value)
    _update(logits, draws, _too_early, lambda old, value: value)
    _update(logits, draws, _repeated, lambda old, value: torch.where(old > 0, old / value, old * value))
    _update(logits, draws, _used, lambda old, value: old - value)


def _update(
    logits: Tensor,
    draws: Sequence[Draw],
    entries: Callable[[Draw], tuple[Sequence[int], Sequence[float]]],
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    values: list[float] = []
    for r, draw in enumerate(draws):
        ids, amounts = entries(draw)
        rows += [r] * len(ids)
        tokens += ids
        values += amounts
    if rows:
        where = torch.tensor([rows, tokens], device=logits.device)
        value = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits[where[0], where[1]] = change(logits[where[0], where[1]], value)


def _bias(draw: Draw) -> tuple[list[int], list[float]]:
    bias = draw.sampling.logit_bias
    return list(bias), list(bias.values())


def _too_early(draw: Draw) -> tuple[list[int], list[float]]:
    """What would end the answer, while it is shorter than min_tokens."""
    s = draw.sampling
    if len(draw.tokens) - draw.prompt_len >= s.min_tokens:
        return [], []
    ends = [END_ID, *s.stop_token_ids]
    return ends, [-math.inf] * len(ends)


def _repeated(draw: Draw) -> tuple[list[int], list[float]]:
    """Every token of the prompt and the answer, with the repetition penalty."""
    penalty = draw.sampling.repetition_penalty
    if penalty == 1:
        return [], []
    seen = list(set(draw.tokens))
    return seen, [penalty] * len(seen)


def _used(draw: Draw) -> tuple[list[int], list[float]]:
    """Every token of the answer, with its presence and frequency penalties."""
    s = draw.sampling
    if (s.presence_penalty == 0 and s.frequency_penalty == 0) or len(draw.tokens) == draw.prompt_len:
        return [], []
    tokens, counts = np.unique(draw.tokens[draw.prompt_len :], return_counts=True)
    return tokens.tolist(), (s.presence_penalty + s.frequency_penalty * counts).tolist()


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Sampled tokens [R]: each row's filters, then the inverse of its cumulative distribution at its own number."""
    device = logits.device
    heat = torch.tensor([draw.sampling.temperature for draw in draws], dtype=torch.float64, device=device)
    z = (logits.double() - logits.double().amax(-1, keepdim=True)) / heat[:, None]  # the likeliest token is at 0
    filtered = [r for r, draw in enumerate(draws) if _filters(draw.sampling)]
    if filtered:
        at = torch.tensor(filtered, device=device)
        lowest = _thresholds(z[at], [draws[r].sampling for r in filtered])
        z[at] = z[at].masked_fill(z[at] < lowest[:, None], -math.inf)
    total = z.exp().cumsum(-1)
    number = uniform([draw.seed for draw in draws], [len(draw.tokens) for draw in draws])
    goal = torch.from_numpy(number).to(device)[:, None] * total[:, -1:]
    # right: the first place above the goal, which is one where the total rises; min: in case the product rounded up
    last = (total < total[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(total, goal, right=True).minimum(last).squeeze(-1)


def _filters(s: Sampling) -> bool:
    return s.top_k > 0 or s.top_p < 1 or s.min_p > 0


def _thresholds(z: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """The lowest logit that each row keeps, [R], for z [R, V] with its largest at 0.

    top-k keeps the k likeliest; top-p, of those, the fewest with that share of their mass; min-p what is at least that
    share of the likeliest.
    """
    vocab, device = z.shape[-1], z.device
    top_k = [min(s.top_k or vocab, vocab) for s in samplings]
    k = torch.tensor(top_k, device=device)
    top_p = torch.tensor([s.top_p for s in samplings], dtype=z.dtype, device=device)
    min_p = torch.tensor([s.min_p for s in samplings], dtype=z.dtype, device=device)
    mass = z.exp().sum(-1)
    wanted = max((kk for kk, s in zip(top_k, samplings, strict=True) if kk < vocab), default=1)
    nucleus = any(s.top_p < 1 for s in samplings)
    count = min(vocab, max(wanted, CANDIDATES if nucleus else 1))
    while True:
        ordered = z.topk(count, dim=-1).values  # [R, C], falling
        summed = ordered.exp().cumsum(-1)
        of_k = (k.clamp(max=count) - 1)[:, None]
        goal = top_p * torch.where(k < vocab, summed.gather(-1, of_k)[:, 0], mass)  # top-p's share of what top-k leaves
        if count == vocab or bool(((summed[:, -1] >= goal) | (top_p >= 1)).all()):
            break
        count = vocab  # a flat distribution: sort it all
    of_p = (summed < goal[:, None]).sum(-1, keepdim=True).clamp(max=count - 1)
    at_k = ordered.gather(-1, of_k)[:, 0].masked_fill(k == vocab, -math.inf)
    at_p = ordered.gather(-1, of_p)[:, 0].masked_fill(top_p >= 1, -math.inf)
    return torch.stack([at_k, at_p, min_p.log()]).amax(0)


def _logprobs(reported: dict[int, Tensor], draws: Sequence[Draw], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """Row -> the chosen token's logprob and its best alternatives, of the model's own distribution over the tokens it may
    choose: before bias, penalties, temperature and filters."""
    if not reported:
        return {}
    rows = list(reported)
    logprobs = torch.log_softmax(torch.stack([reported[r] for r in rows]).double(), -1)
    wanted = [draws[r].sampling.logprobs or 0 for r in rows]
    best = logprobs.topk(max(1, *wanted), dim=-1)
    chosen = logprobs.gather(-1, torch.tensor([[tokens[r]] for r in rows], device=logprobs.device)).tolist()
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        r: TokenLogprob(tokens[r], chosen[i][0], tuple(zip(ids[i][: wanted[i]], values[i][: wanted[i]], strict=True)))
        for i, r in enumerate(rows)
    }
