"""The drafts of a step: group 1 and its exit over one row of each request that drafts, again and again.

What these rows are is not known before, but where they stand is. So on a CPU all that follows from their places is made once
(`fused.Stretch`), and a draft costs its layers and the head, and little more. Where the compiled loops cannot be used, or a
request has an adapter, the runner drafts by steps of its own instead.

On a device a draft is embedded, and verified, where it was drawn: the host starts all of a step's launches and reads drafts and
tokens in one copy (`Rounds`). It must know each draft before the next where a grammar says which tokens may follow: that is
found on the host.

None of these rows is a patch of an image: a prompt ends with none, and no answer holds any.

Letters: R requests, K rows of the one that drafts most, M pages of the longest, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from shoal.engine.device import Unread
from shoal.engine.plan import Work
from shoal.engine.running import Running
from shoal.engine.sampler import Sampler
from shoal.engine.speculative import verification
from shoal.engine.tolerance import Chain
from shoal.model.cache import GroupCache
from shoal.model.cpu.fused import Stretch
from shoal.model.net import Net
from shoal.model.sending import sent


@dataclass
class Drafted:
    """What a request drafted in a step: tokens [K - 1], and the logits [V] that each was drawn from. The last token may be one
    that ends the answer. Kept of a request with a tolerance alone. Of tokens that the host has not read yet, those `there` [],
    some may come to nothing: one that ends the answer is the last."""

    tokens: list[int] = field(default_factory=list)
    exits: list[Tensor] = field(default_factory=list)

    def chain(self, first: int, work: Work) -> Chain:
        """To be settled in the rows from `first` on of what is sampled, those of the verification `work`."""
        running = work.running
        answered = work.start + 1 - running.prompt_len
        return Chain(first, self.tokens, self.exits, running.tolerance or 0.0, running.spent, answered, running.there)


@dataclass
class Drafter:
    """One request that drafts: its `work`, at a `place` in the step, and `ahead`, the copy of it that gets the drafts and the
    states after group 1 (`speculative.ahead_of`). One that drafts nothing is run through group 1 beside others."""

    work: Work
    ahead: Running
    place: int
    drafted: Drafted | None = None  # filled in where it has a tolerance
    over: bool = False  # nothing more is drafted: its last draft ends the answer, or none could be drawn

    @property
    def more(self) -> bool:
        """Is a token drafted after the row that runs through group 1 next?"""
        return len(self.ahead.holding.states) < self.work.drafts

    def take(self, token: int, drawn: bool, law: Tensor | None) -> None:
        """The next draft, from the logits `law` [V], None where these are kept already, or by nobody; unless `drawn` there is
        none."""
        if drawn and self.drafted is not None:
            self.drafted.tokens.append(token)
            if law is not None:
                self.drafted.exits.append(law)
        if drawn and not self.ahead.ends(token):
            self.ahead.tokens.append(token)
        else:
            self.over = True

    def rest(self) -> Work:
        """What is left of its work."""
        if self.work.drafts:
            return verification(self.work, self.ahead)
        return replace(self.work, running=self.ahead, first=1)


# of drafters [N], how many of them draft on, and their tokens [N] where the host knows none: states after group 1 [N, D] of the
# newest row of each, and logits [more, V] at the first exit of the first ones, None of none
First = Callable[[Sequence[Drafter], int, Tensor | None], tuple[Tensor, Tensor | None]]


class Rounds:
    """Drafts of a step that the host has not read yet, one of each request that drafts on in each round. It goes on as if none
    of them ended an answer: rows behind one that does are verified for nothing."""

    UNKNOWN = 0  # stands for a token of a request until it is read

    def __init__(self) -> None:
        # who drafted, tokens [R], and largest logits [R, 1]
        self._rounds: list[tuple[list[Drafter], Tensor, Tensor]] = []

    @classmethod
    def of(cls, works: Sequence[Work], device: torch.device) -> Rounds | None:
        """For what `works` draft; None where the host must know each draft before the next."""
        if device.type == "cpu":
            return None
        return cls() if all(work.running.grammar is None for work in works if work.drafts) else None

    @property
    def newest(self) -> Tensor | None:
        """Tokens [R] of the last round, in the order of its drafters; None before the first."""
        return self._rounds[-1][1] if self._rounds else None

    def add(self, drafters: list[Drafter], logits: Tensor, tokens: Tensor, highest: Tensor) -> None:
        """A round: `tokens` [R] of `drafters` [R], drawn from `logits` [R, V], in whose memory the next round's may lie, and
        the `highest` of these [R, 1]."""
        self._rounds.append((drafters, tokens, highest))
        kept = [(row, each.drafted) for row, each in enumerate(drafters) if each.drafted is not None]
        if kept:
            laws = logits[sent([row for row, _ in kept], logits.device)]
            for law, (_, drafted) in zip(laws, kept, strict=True):
                drafted.exits.append(law)
        for row, each in enumerate(drafters):
            each.ahead.tokens.append(self.UNKNOWN)
            each.ahead.there = [*each.ahead.there, tokens[row]]

    def wait_in(self, unread: Unread) -> None:
        """When what is `unread` comes, all who drafted get their drafts, each up to one that ends its answer or could not be
        drawn."""
        unread.add([each for _, *two in self._rounds for each in two], self._came)

    def _came(self, numbers: list[list[float]]) -> None:
        for each in self._rounds[0][0]:  # there is one where somebody drafts, and whoever does so does in the first
            del each.ahead.tokens[each.work.start + 1 :]
            each.ahead.there = ()
        for (drafters, *_), tokens, highest in zip(self._rounds, numbers[::2], numbers[1::2], strict=True):
            for row, each in enumerate(drafters):
                if not each.over:
                    each.take(int(tokens[row]), math.isfinite(highest[row]), None)


@torch.inference_mode()
def draft(net: Net, cache: GroupCache, sampler: Sampler, drafters: Sequence[Drafter]) -> bool:
    """Let each of `drafters` draft what its work says. False, and nothing is done, where that takes another way."""
    if any(each.work.running.adapter is not None for each in drafters):
        return False
    # those that draft most come first: whoever is done is behind all that go on
    order = sorted(drafters, key=lambda each: -each.work.drafts)
    stretch = _stretch(net, cache, order)
    if stretch is None:
        return False
    first = net.config.exits[0]
    head, states = net.head_of(first, len(order)), [list[np.ndarray]() for _ in order]
    newest, going = [each.ahead.tokens[-1] for each in order], len(order)
    for time in range(order[0].work.drafts + 1):
        state = stretch.after(net.embed_few(newest[:going]), time)
        for r in range(going):
            if not order[r].over:  # of those that are over a row may run on, which nobody reads
                states[r].append(state[r : r + 1])
        while going and (order[going - 1].over or order[going - 1].work.drafts <= time):
            going -= 1
        if not going:
            break
        if head is not None:
            logits = torch.from_numpy(head.logits(state[:going]))
        else:
            logits = net.head(torch.from_numpy(state[:going]), first)
        for r, sampled in enumerate(sampler.sample(logits, [each.ahead for each in order[:going]])):
            if not order[r].over:
                newest[r] = sampled.token
                order[r].take(sampled.token, sampled.error is None, logits[r])
    for each, found in zip(order, states, strict=True):
        each.ahead.holding.states = [torch.from_numpy(np.concatenate(found))]
    return True


def by_steps(first: First, sampler: Sampler, going: list[Drafter], rounds: Rounds | None) -> None:
    """As `draft`, wherever that cannot be used: by a step of group 1 for each draft. The host waits for each, or keeps all in
    `rounds` to be read."""
    while going:
        # those that draft on come first, and in `rounds` in the order in which their tokens lie there
        going.sort(key=lambda each: not each.more if rounds is None else -each.work.drafts)
        more = sum(each.more for each in going)
        x, logits = first(going, more, None if rounds is None else rounds.newest)
        for at, each in enumerate(going):
            each.ahead.holding.states.append(x[at : at + 1])
        if logits is None:
            return
        going = going[:more]
        if rounds is not None:
            rounds.add(going, logits, *sampler.propose(logits, [each.ahead for each in going]))
            continue
        samples = sampler.sample(logits, [each.ahead for each in going])
        for row, (each, sampled) in enumerate(zip(going, samples, strict=True)):
            # what is kept is a copy: in the memory of a graph the next draft's will lie there
            law = None if each.drafted is None else logits[row].clone()
            each.take(sampled.token, sampled.error is None, law)
        going = [each for each in going if not each.over]


def _stretch(net: Net, cache: GroupCache, order: Sequence[Drafter]) -> Stretch | None:
    """The rows of `order` [R] at group 1; None where they take another way."""
    if cache.kv.device.type != "cpu":
        return None
    page = cache.kv.shape[3]
    holdings = [each.ahead.holding for each in order]
    pages = max(-(-each.work.reach // page) for each in order)
    tables = np.zeros((len(order), pages), dtype=np.int64)
    for r, holding in enumerate(holdings):
        own = holding.tables[0, :pages]
        tables[r, : len(own)] = own
    starts = np.array([each.work.start for each in order])
    positions = starts + np.arange(order[0].work.drafts + 1)[:, None]
    # past its own drafts a request runs no row: that may be beyond all pages
    units = tables[np.arange(len(order)), np.minimum(positions // page, pages - 1)]
    slots = units * page + positions % page
    slots[positions < [holding.computed[0] for holding in holdings]] = -1  # stored already
    found: Stretch | None = net.groups[0].stretch(positions, slots, tables, cache, net.dtype)  # type: ignore[operator]
    return found
