"""Lossless self-speculation: a deep request drafts with its own first layer group, and its other groups verify.

    draft     group 1 runs the newest token, its exit proposes the next, group 1 runs that, ... : k drafts, and the states
              and K/V of k+1 rows after group 1, which are the real ones
    verify    groups 2.. take the k+1 states as one causal chunk; the sampler draws a token from each row
    accept    drafts are right as far as they equal those tokens; the first token after them is good as well: 1 to k+1 tokens

Drawing is a race with noise that depends on (seed, position, token) alone (`sampler.py`), for a draft and for the token that
verifies it alike. So what comes out is the token that plain decoding would have drawn at that place, in greedy decoding and
in sampling: not only the distribution is kept but the tokens are, whatever was drafted, and whether it was (decision 0008).
An answer that has a tolerance may keep drafts that differ, too, and then depends on what was drafted (`tolerance.py`).

Nothing else ever sees a draft: the step's commit appends what was accepted, moves the lengths, and gives back the units
beyond them. Penalties, grammars, stop strings and logprobs are functions of the tokens, so there is nothing to roll back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from shoal.engine.events import Sampling
from shoal.engine.guided import Grammar
from shoal.engine.plan import Sampled, Work
from shoal.engine.running import Running


def ahead_of(running: Running, tokens: list[int]) -> Running:
    """A copy of `running` as it would be if its tokens were `tokens`, for the runner and the sampler."""
    ahead = copy.copy(running)
    ahead.tokens, ahead.holding = tokens, running.holding.ahead(tokens)
    return ahead


@dataclass(eq=False, slots=True)
class Place:
    """What the sampler reads of a request that has the first `tokens` of its own alone: a copy of all of it takes ten times as
    long, for each row that is verified."""

    tokens: list[int]
    there: Sequence[Tensor]
    prompt_len: int
    seed: int
    watched: bool
    sampling: Sampling
    grammar: Grammar | None

    @classmethod
    def of(cls, running: Running, count: int) -> Place:
        """`running` with `count` tokens."""
        tokens, grammar = running.tokens[:count], running.grammar
        there = running.there[: max(0, count - len(running.tokens) + len(running.there))]
        return cls(tokens, there, running.prompt_len, running.seed, running.watched, running.sampling, grammar)


def verification(work: Work, ahead: Running) -> Work:
    """What is left of `work` when the drafts stand in `ahead`: all its rows through groups 2.., each with a sample."""
    return replace(work, running=ahead, count=len(ahead.tokens) - work.start, first=1, drafts=0, verify=True)


def accept(drafts: Sequence[int], verified: Sequence[Sampled]) -> Sampled:
    """The tokens that stand, the first with the others `after` it; `verified` [k+1] are those of the rows of the newest
    token and of `drafts` [k]."""
    good = 0
    while good < len(drafts) and verified[good].error is None and verified[good].token == drafts[good]:
        good += 1
    return replace(verified[0], after=tuple(verified[1 : good + 1]), drafted=len(drafts))
