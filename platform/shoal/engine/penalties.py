"""What a request asks of logits beside its grammar: bias, least length, penalties and banned runs, each as one sparse update of
a whole batch.

Letters: R rows (requests), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.engine.events import Sampling
from shoal.engine.guided import Grammar
from shoal.model.sending import sent


class Draw(Protocol):
    """What the sampler needs to know of a request (`engine.running.Running` is one)."""

    tokens: list[int]  # the prompt, then the answer
    prompt_len: int
    seed: int
    watched: bool

    @property
    def sampling(self) -> Sampling: ...

    @property
    def grammar(self) -> Grammar | None: ...


def adjust(logits: Tensor, draws: Sequence[Draw], ends: list[int]) -> None:
    """Change `logits` [R, V] in place; `ends`: tokens that end an answer."""
    if all(_plain(draw.sampling) for draw in draws):
        return
    _update(logits, draws, _bias, lambda old, value: old + value)
    _update(logits, draws, lambda draw: too_early(draw, ends), lambda old, value: value)
    _update(logits, draws, _repeated, lambda old, value: torch.where(old > 0, old / value, old * value))
    _update(logits, draws, _used, lambda old, value: old - value)
    _update(logits, draws, banned, lambda old, value: value)


def by_length(draw: Draw) -> bool:
    """Does what `draw` draws from its logits follow from how many tokens it has, and not from which?"""
    s = draw.sampling
    return draw.grammar is None and not (_penalised(s) or s.banned)


def _penalised(s: Sampling) -> bool:
    return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _plain(s: Sampling) -> bool:
    return not (_penalised(s) or s.logit_bias or s.min_tokens or s.banned)


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
        where = sent([rows, tokens], logits.device)
        value = sent(values, logits.device, logits.dtype)
        logits[where[0], where[1]] = change(logits[where[0], where[1]], value)


def _bias(draw: Draw) -> tuple[list[int], list[float]]:
    bias = draw.sampling.logit_bias
    return list(bias), list(bias.values())


def too_early(draw: Draw, ends: list[int]) -> tuple[list[int], list[float]]:
    """What would end the answer, while it is shorter than min_tokens."""
    s = draw.sampling
    if len(draw.tokens) - draw.prompt_len >= s.min_tokens:
        return [], []
    closed = [*ends, *s.stop_token_ids]
    return closed, [-math.inf] * len(closed)


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


def banned(draw: Draw) -> tuple[list[int], list[float]]:
    """What would complete a banned run of tokens within the answer."""
    answer = draw.tokens[draw.prompt_len :] if draw.sampling.banned else []
    ends = [run[-1] for run in draw.sampling.banned if tuple(answer[len(answer) - len(run) + 1 :]) == run[:-1]]
    return ends, [-math.inf] * len(ends)
