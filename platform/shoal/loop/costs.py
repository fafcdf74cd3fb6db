"""What an answer costs of a candidate, beside the stable version: layers, what the router loses by leaving some out, and time.

The router's loss is measured, not predicted: the nats a token by which the exit that it chooses is worse than full depth on a
question's reference answer. Time is the processor's, of both in turns: what else the machine does disturbs that least. What the
scheduler would spend of it on latency is no model's, and is left out (decision 0026).

A stable version that is shown to lose more than it promises is cheap for that, and the router that mends it runs deeper. What
mends it may cost what the stable version would if it kept its promise without a router: at the shallowest fixed depth that
does, on the same questions (decision 0026).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from shoal.config import AUTO
from shoal.data.batches import spaced
from shoal.data.chats.heldout import Question
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import EngineDeadError
from shoal.evaluate.intervals import Figure, median, of_bounded, of_mean
from shoal.evaluate.prompts import Heldout, measured
from shoal.evaluate.second_look import routed
from shoal.inputs.chat import Encoded
from shoal.loop.margins import of_ratio
from shoal.loop.paired import FAIL, INCONCLUSIVE, PASS, SKIPPED, Check
from shoal.model.model import Model
from shoal.model.router import Calibration

MOST_MORE = 1.10  # layers, and seconds a token, beside the stable version's
LEAST, MOST = 40, 160  # questions of a task that the router is looked at on
TOKENS, BATCH = 32, 8  # of an answer that is timed, and answers at once
LAYERS, TIME = "router, layers", "time a token"
Questions = Mapping[str, Sequence[Question]]  # by task
Depth = str | int  # as of a request: "auto", or layers
ROUNDS = (7, 25)  # turns of both that are timed, at least and at most


def checks(
    model: Model, known: Model, asked: Questions, new: Questions | None = None, *, alone: bool = False
) -> list[Check]:
    """Of the router and of time, on questions with answers by task: `asked` by frozen suites, and `new` ones, at which the
    stable version's costs are no measure where there are others, since it does not know them. `alone`: all that is new of the
    candidate is its router."""
    found, depth = router(model, known, asked, new, alone=alone)
    return [*found, speed(model, known, asked or new or {}, depth)]


def router(
    model: Model, known: Model, asked: Questions, new: Questions | None = None, *, alone: bool = False
) -> tuple[list[Check], Depth]:
    """Whether depth "auto" still keeps its promise, and runs no more layers than it may, and the stable version's depth that
    the candidate's layers, and so its time, are held to; arguments as of `checks`."""
    if model.router is None and known.router is None:
        return [Check("router", SKIPPED, "neither has one")], AUTO
    both = [_looked_at(some) for some in (asked, new or {})]
    old, recent = (sum(map(len, rows.values())) for rows in both)
    count, bar = old + recent, old or recent
    if model.router is None:
        return [Check("router", FAIL, 'it has none, so depth "auto" is full depth', items=count)], AUTO
    if bar < LEAST:
        told = f"{bar} {'frozen ' if old else ''}questions are too few, {LEAST} are needed"
        return [Check("router", INCONCLUSIVE, told, items=count, needed=LEAST)], AUTO
    mine, its = (_routed(each, both) for each in (model, known))
    own, promised = (
        (each.router.calibration if each.router else Calibration()).default_tolerance for each in (model, known)
    )
    limit = min(own, promised)
    found = [_loss(mine, its, bar, limit, promised)]
    if alone:
        found.append(_gain(mine, its))
    check, depth = _layers(mine.first(bar), its.first(bar), known.config.exits, limit, promised)
    return [*found, check], depth


def _layers(mine: _Routed, its: _Routed, exits: Sequence[int], limit: float, promised: float) -> tuple[Check, Depth]:
    """Whether a candidate runs at most a tenth more layers than the stable version; or, beside one that is shown to lose more
    than it `promised`, whether it keeps the promise of `limit` and runs at most a tenth more than the shallowest of the `exits`
    at which the stable version would have kept its own. Also that exit, or "auto" where the router is what it was held to."""
    share, count = of_bounded(mine.share, mine.groups, 1.0), len(mine.share)
    its_share = sum(its.share) / count
    ratio, before = share.value / its_share, its.loss()
    told = f"{share.value:.0%} of the layers, {ratio:.2f} times the stable version's, at most {MOST_MORE:.2f}"
    as_now = Check(LAYERS, PASS if ratio <= MOST_MORE else FAIL, told, ratio, limit=MOST_MORE, items=count)
    as_now = replace(as_now, used=of_ratio(ratio, MOST_MORE))
    if not before.interval[0] > promised:
        return as_now, AUTO
    told += f", or what mends it: it loses {before.value:.3f} where {promised:.3f} are promised"
    if min(mine.share) == 1:
        told = f"full depth for every question, as without a router; {told}"
        return replace(as_now, status=FAIL, told=told), AUTO
    if as_now.status == PASS:
        return as_now, AUTO
    may, sure = _shallowest(its, exits, promised)
    most = [min(MOST_MORE * max(depth / exits[-1], its_share), 1.0) for depth in (may, sure)]
    # shown to run less than all layers, where all are allowed
    limits = [min(each, math.nextafter(1.0, 0.0)) for each in most]
    beside, lost = [kept(share.value, share.interval[1], each) for each in limits], mine.loss()
    status = PASS if beside[0] == PASS else FAIL if beside[1] == FAIL else INCONCLUSIVE
    keeps = kept(lost.value, lost.interval[1], limit)
    status = min(status, keeps, key=(FAIL, INCONCLUSIVE, PASS).index)
    told += f"; at {may} of {exits[-1]} layers for all it may not, " if may < sure else "; "
    told += (
        f"at {sure} of {exits[-1]} layers for all it does not"
        if sure < exits[-1]
        else "at full depth alone it does not"
    )
    told += f": at most {most[0]:.0%} of the layers"
    if keeps != PASS:
        told += f", of a candidate that is shown to keep its promise; this one loses {lost.value:.3f}"
    low, high = (end / its_share for end in share.interval)
    needed = count * 4 if status == INCONCLUSIVE else None
    return Check(LAYERS, status, told, ratio, low, high, most[0] / its_share, count, share.groups, needed), may


def _shallowest(its: _Routed, exits: Sequence[int], promised: float) -> tuple[int, int]:
    """The shallowest fixed depth that is not shown to lose more than what is `promised`, and the shallowest that is shown not
    to: 95 %, on the same questions. Full depth loses nothing."""
    found = [
        of_bounded([row[place] for row in its.gaps], its.groups, its.worst).interval for place in range(len(exits))
    ]
    may = next(depth for depth, (low, _) in zip(exits, found, strict=True) if not low > promised)
    return may, next((depth for depth, (_, high) in zip(exits, found, strict=True) if high <= promised), exits[-1])


def _loss(mine: _Routed, its: _Routed, bar: int, limit: float, promised: float) -> Check:
    """Whether no more than `limit` is lost, or, where the stable version loses more than it `promised` on the first `bar` of
    the questions, at most a tenth above that: one by one on these, in the mean on the others, which it does not know."""
    loss, count = mine.loss(), len(mine.lost)
    before, used = its.first(bar).loss(), None
    status = kept(loss.value, loss.interval[1], limit)
    told = f"loses {loss.value:.3f} nats a token ({loss.between()}), promised are {limit:.3f}"
    if status != PASS and before.value > promised:
        known = [*its.lost[:bar], *[before.value] * (count - bar)]
        above = of_mean([one - MOST_MORE * other for one, other in zip(mine.lost, known, strict=True)], mine.groups)
        status = kept(above.value, above.interval[1], 0.0)
        limit, used = MOST_MORE * before.value, of_ratio(loss.value / before.value, MOST_MORE)
        told += f"; the stable version loses {before.value:.3f}, at most {MOST_MORE:.2f} times that"
    return Check(
        "router, loss", status, told, _finite(loss.value), _finite(loss.interval[0]), _finite(loss.interval[1]),
        _finite(limit), count, loss.groups, count * 4 if status == INCONCLUSIVE else None, used,
    )  # fmt: skip


def _gain(mine: _Routed, its: _Routed) -> Check:
    """Whether less is lost than by the stable version, which is the reason to release a router alone."""
    less = of_mean([one - other for one, other in zip(mine.lost, its.lost, strict=True)], mine.groups)
    (low, high), count = less.interval, len(mine.lost)
    status = PASS if high < 0 else INCONCLUSIVE if less.value < 0 else FAIL
    told = f"loses {less.value:+.3f} nats a token more ({less.between('+.3f')}), must be below 0"
    return Check(
        "router, better", status, told, _finite(less.value), _finite(low), _finite(high), 0.0, count, less.groups
    )


def kept(value: float, high: float, limit: float) -> str:
    """Whether a router that loses `value` nats a token, with the upper end `high`, keeps the promise of `limit`; one whose loss
    is no number does not."""
    return PASS if high <= limit else INCONCLUSIVE if value <= limit else FAIL


def _some(asked: Questions) -> dict[str, list[Question]]:
    """The questions that are looked at, of each task."""
    return {task: [some[place] for place in spaced(len(some), MOST)] for task, some in asked.items() if some}


def _looked_at(asked: Questions) -> dict[str, list[Heldout]]:
    return {task: [Heldout(one.row, one.group) for one in some] for task, some in _some(asked).items()}


@dataclass(frozen=True)
class _Routed:
    """Of each question the share of the layers that a router gives it, what that loses, and its group."""

    share: list[float]
    lost: list[float]
    groups: list[int]
    gaps: list[list[float]]  # what each exit loses, full depth the last

    @property
    def worst(self) -> float:
        """What any exit loses on any of the questions."""
        return max((gap for row in self.gaps for gap in row), default=0.0)

    def loss(self) -> Figure:
        """What is lost in the mean; at full depth for all nothing, whatever is asked."""
        if min(self.share, default=0.0) == 1.0:
            return Figure(0.0, (0.0, 0.0), len(self.lost), len(set(self.groups)))
        return of_bounded(self.lost, self.groups, self.worst)

    def first(self, count: int) -> _Routed:
        return _Routed(self.share[:count], self.lost[:count], self.groups[:count], self.gaps[:count])


def _routed(model: Model, parts: Sequence[Mapping[str, Sequence[Heldout]]]) -> _Routed:
    """Of the questions of all `parts`, one after the other; without a router all run at full depth."""
    found = _Routed([], [], [], [])
    for rows in parts:
        if not rows:
            continue
        router = model.router
        prompts = measured(
            model.net, rows, router.later.after if router is not None and router.later is not None else None
        )
        gaps = torch.cat([prompts.gaps, prompts.gaps.new_zeros(len(prompts.gaps), 1)], dim=1)
        whole = torch.ones(len(gaps)), torch.zeros(len(gaps))
        share, lost = whole if router is None else routed(model.config, router, prompts, None)
        found.share.extend(share.tolist())
        found.lost.extend(lost.tolist())
        found.groups.extend(prompts.groups.tolist())
        found.gaps.extend(gaps.tolist())
    return found


def speed(model: Model, known: Model, asked: Questions, beside: Depth = AUTO) -> Check:
    """Whether a token takes no more of the processor at depth "auto" than of the stable version at the depth `beside`: the
    median of pairs of turns, with as many as it takes to be sure of it. A turn answers up to `MOST` of the questions that
    layers are counted on, some of each task at once: of a few the depths would be others (decision 0026). Prompts are read anew
    in each turn, no step runs the shallow alone, and one thread computes (decision 0026). Raises EngineDeadError for a model
    that gives no token."""
    counted = [question.prompt for some in _some(asked).values() for question in some]
    every = [counted[place] for place in spaced(len(counted), MOST)]
    batches = -(-len(every) // BATCH)
    prompts = [every[first::batches] for first in range(batches)]
    with _one_thread():
        ratios, low, high = _ratios(model, known, prompts, beside)
    middle = statistics.median(ratios)
    at = "" if beside == AUTO else f" at {beside} of {known.config.layers} layers"
    told = f"{middle:.2f} times the stable version's{at} ({low:.2f} to {high:.2f}), at most {MOST_MORE:.2f}"
    status = PASS if middle <= MOST_MORE else FAIL
    return Check(TIME, status, told, middle, low, high, MOST_MORE, items=len(ratios))


def _ratios(
    model: Model, known: Model, prompts: Sequence[Sequence[Encoded]], beside: Depth
) -> tuple[list[float], float, float]:
    """Of each pair of turns the time of `model` at depth "auto" in those of `known` at `beside`, and bounds of their median."""
    engines = [(Engine(model, clock=_still), AUTO), (Engine(known, clock=_still), beside)]
    for engine, depth in engines:  # what is made once
        _seconds(engine, prompts, depth)
    ratios: list[float] = []
    for number in range(ROUNDS[1]):
        both = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            both[place] = _seconds(engines[place][0], prompts, engines[place][1])
        ratios.append(both[0] / max(both[1], 1e-9))
        low, high = median(ratios)
        if number + 1 >= ROUNDS[0] and (high <= MOST_MORE or low > MOST_MORE):
            break
    return ratios, low, high


def _seconds(engine: Engine, prompts: Sequence[Sequence[Encoded]], depth: Depth) -> float:
    """Of the processor a token, in answers of `TOKENS` each, or of what the context leaves, to each of `prompts` together."""

    def request(prompt: Encoded) -> Request:
        most = min(TOKENS, engine.config.context - len(prompt.ids))
        return Request(prompt, Sampling(temperature=0.0, max_tokens=most, ignore_eos=True), depth=depth)

    batches = [[request(prompt) for prompt in some] for some in prompts]
    engine.forget_prompts()
    began, tokens = time.process_time(), 0
    for batch in batches:
        # one that broke off took no time for what it did not say
        tokens += sum(len(answer.tokens) for answer in engine.generate(batch))
    if not tokens:
        raise EngineDeadError("no answer has a token", do="look at the model's weights")
    return (time.process_time() - began) / tokens


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other spin: two that share busy cores were seen to take ten times what one takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _still() -> float:
    """A clock by which no step takes time, so that the scheduler sees none that it could save by another."""
    return 0.0


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
