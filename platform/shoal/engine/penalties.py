"""What a request asks of logits beside its grammar: bias, least length, penalties and banned runs, each as one sparse update of
a whole batch. Of drafts that the host has not read, penalties and banned runs are found where the drafts lie.

Letters: R rows (requests), V vocabulary, U rows with tokens that are unread, D such tokens in all, E banned runs of these rows.
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
    def there(self) -> Sequence[Tensor]:
        """The last tokens, each [], where the host has not read them; `tokens` holds something else in their places."""

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
    _update(logits, draws, lambda draw: ([], []) if draw.there else banned(draw), lambda old, value: value)
    if unread := [
        r for r, draw in enumerate(draws) if draw.there and (_penalised(draw.sampling) or draw.sampling.banned)
    ]:
        at = sent(unread, logits.device)
        logits[at] = _there(logits[at], [draws[r] for r in unread])


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
    if penalty == 1 or draw.there:
        return [], []
    seen = list(set(draw.tokens))
    return seen, [penalty] * len(seen)


def _used(draw: Draw) -> tuple[list[int], list[float]]:
    """Every token of the answer, with its presence and frequency penalties."""
    s = draw.sampling
    if (s.presence_penalty == 0 and s.frequency_penalty == 0) or draw.there:
        return [], []
    tokens, counts = np.unique(draw.tokens[draw.prompt_len :], return_counts=True)
    return tokens.tolist(), (s.presence_penalty + s.frequency_penalty * counts).tolist()


def banned(draw: Draw) -> tuple[list[int], list[float]]:
    """What would complete a banned run of tokens within the answer. Waits for what is unread of it."""
    answer = _known(draw)[draw.prompt_len :] + [int(token) for token in draw.there] if draw.sampling.banned else []
    ends = [run[-1] for run in draw.sampling.banned if tuple(answer[len(answer) - len(run) + 1 :]) == run[:-1]]
    return ends, [-math.inf] * len(ends)


def _known(draw: Draw) -> list[int]:
    return draw.tokens[: len(draw.tokens) - len(draw.there)]


def _there(x: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits `x` [U, V] of `draws`, each with something unread, as `_repeated`, `_used` and `banned` would change them. The
    host waits for nothing."""
    unread = torch.stack([token for draw in draws for token in draw.there])  # [D]
    of = sent([u for u, draw in enumerate(draws) for _ in draw.there], x.device)
    known = [_known(draw) for draw in draws]
    answers = _counted(x, [tokens[draw.prompt_len :] for draw, tokens in zip(draws, known, strict=True)])
    answers.view(-1).index_add_(0, of * x.shape[1] + unread, answers.new_ones(len(unread)))
    asked = [draw.sampling for draw in draws]
    prompts = [draw.tokens[: draw.prompt_len] if draw.sampling.repetition_penalty != 1 else [] for draw in draws]
    seen = answers + _counted(x, [list(set(prompt)) for prompt in prompts])
    penalty = sent([[s.repetition_penalty] for s in asked], x.device, x.dtype)
    x = torch.where(seen > 0, torch.where(x > 0, x / penalty, x * penalty), x)
    once = sent([[s.presence_penalty] for s in asked], x.device, torch.double)
    each = sent([[s.frequency_penalty] for s in asked], x.device, torch.double)
    x = torch.where(answers > 0, x - (once + each * answers).to(x.dtype), x)
    return x.masked_fill(_completed(x, draws, unread) > 0, -math.inf) if any(s.banned for s in asked) else x


def _counted(x: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """How often each token is among `tokens` [U] of each row, fp64 [U, V] beside `x`."""
    flat = [u * x.shape[1] + token for u, some in enumerate(tokens) for token in some]
    found = x.new_zeros(x.shape, dtype=torch.double)
    found.view(-1).index_add_(0, sent(flat, x.device, torch.long), found.new_ones(len(flat)))
    return found


def _completed(x: Tensor, draws: Sequence[Draw], unread: Tensor) -> Tensor:
    """How many banned runs each token would complete, fp64 [U, V] beside `x`, where the tokens `unread` [D] of `draws` are what
    they are."""
    ends, runs, at, needed, first = list[int](), list[int](), list[int](), list[int](), 0
    for u, draw in enumerate(draws):
        first += len(draw.there)  # behind its own
        answer = _known(draw)[draw.prompt_len :]
        for run in draw.sampling.banned:
            before = run[:-1]
            there = before[max(0, len(before) - len(draw.there)) :]
            here = before[: len(before) - len(there)]
            if tuple(answer[len(answer) - len(here) :]) != here:
                continue
            runs += [len(ends)] * len(there)
            at += range(first - len(there), first)
            needed += there
            ends.append(u * x.shape[1] + run[-1])
    wrong = x.new_zeros(len(ends), dtype=torch.double)  # [E]: tokens of the run that are others
    differ = unread[sent(at, x.device, torch.long)] != sent(needed, x.device, torch.long)
    wrong.index_add_(0, sent(runs, x.device, torch.long), differ.double())
    found = x.new_zeros(x.shape, dtype=torch.double)
    found.view(-1).index_add_(0, sent(ends, x.device, torch.long), (wrong == 0).double())
    return found
