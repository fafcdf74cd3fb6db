"""What an answer costs of a candidate, beside the stable version: layers, what the router loses by leaving some out, and time.

The router's loss is measured, not predicted: the nats a token by which the exit that it chooses is worse than full depth on a
question's reference answer. Time is the processor's, of both in turns: what else the machine does disturbs that least.

Letters: M questions, A early exits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from shoal.data.batches import spaced
from shoal.data.chats.heldout import Question
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.evaluate.intervals import of_mean
from shoal.evaluate.prompts import Heldout, Prompts, measured
from shoal.loop.paired import FAIL, INCONCLUSIVE, PASS, SKIPPED, Check
from shoal.model.model import Model

MOST_MORE = 1.10  # layers, and seconds a token, beside the stable version's
LEAST, MOST = 40, 160  # questions of a task that the router is looked at on
TOKENS, BATCH = 32, 8  # of an answer, and answers at once, that are timed
ROUNDS = (7, 25)  # turns of both that are timed, at least and at most


def router(model: Model, known: Model, asked: Mapping[str, Sequence[Question]]) -> list[Check]:
    """Whether depth "auto" still keeps its promise, and runs no more layers than it did, on questions with answers by task."""
    if known.router is None:
        return [Check("router", SKIPPED, "the stable version has none")]
    rows = {
        task: [Heldout(some[place].row, some[place].group) for place in spaced(len(some), MOST)]
        for task, some in asked.items()
        if some
    }
    count = sum(map(len, rows.values()))
    if model.router is None:
        return [Check("router", FAIL, 'it has none, so depth "auto" is full depth', items=count)]
    if count < LEAST:
        told = f"{count} questions are too few, {LEAST} are needed"
        return [Check("router", INCONCLUSIVE, told, items=count, needed=LEAST)]
    (share, lost, groups), (before, lost_before, _) = (
        _routed(each, measured(each.net, rows)) for each in (model, known)
    )
    limit = max(model.router.calibration.default_tolerance, sum(lost_before) / count)
    loss = of_mean(lost, groups)
    status = kept(loss.value, loss.interval[1], limit)
    told = f"loses {loss.value:.3f} nats a token ({loss.interval[0]:.3f} to {loss.interval[1]:.3f}), promised are {limit:.3f}"
    ratio = sum(share) / sum(before)
    layers = f"{sum(share) / count:.0%} of the layers, {ratio:.2f} times the stable version's, at most {MOST_MORE:.2f}"
    return [
        Check(
            "router, loss", status, told, loss.value, _finite(loss.interval[0]), _finite(loss.interval[1]), limit, count,
            loss.groups, count * 4 if status == INCONCLUSIVE else None,
        ),
        Check("router, layers", PASS if ratio <= MOST_MORE else FAIL, layers, ratio, limit=MOST_MORE, items=count),
    ]  # fmt: skip


def kept(value: float, high: float, limit: float) -> str:
    """Whether a router that loses `value` nats a token, with the upper end `high`, keeps the promise of `limit`."""
    return PASS if high <= limit else FAIL if value > limit else INCONCLUSIVE


def _routed(model: Model, prompts: Prompts) -> tuple[list[float], list[float], list[int]]:
    """Of each prompt [M] the share of the layers that the router gives it, what that loses, and its group."""
    assert model.router is not None
    gaps = torch.cat([prompts.gaps, prompts.gaps.new_zeros(len(prompts.gaps), 1)], dim=1)
    depths = [model.router.choose(x) for x in prompts.features]
    lost = [float(row[model.config.exits.index(depth)]) for row, depth in zip(gaps, depths, strict=True)]
    return [depth / model.config.layers for depth in depths], lost, prompts.groups.tolist()


def speed(model: Model, known: Model, asked: Mapping[str, Sequence[Question]]) -> Check:
    """Whether a token takes no more of the processor than of the stable version's, at depth "auto": the median of pairs of
    turns, with as many as it takes to be sure of it."""
    every = [question for some in asked.values() for question in some]
    prompts = [every[place].prompt for place in spaced(len(every), BATCH)]
    engines = [Engine(each) for each in (model, known)]
    for engine in engines:  # what is made once
        _seconds(engine, prompts)
    ratios: list[float] = []
    for number in range(ROUNDS[1]):
        both = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            both[place] = _seconds(engines[place], prompts)
        ratios.append(both[0] / max(both[1], 1e-9))
        low, high = _about_the_median(ratios)
        if number + 1 >= ROUNDS[0] and (high <= MOST_MORE or low > MOST_MORE):
            break
    middle = statistics.median(ratios)
    told = f"{middle:.2f} times the stable version's ({low:.2f} to {high:.2f}), at most {MOST_MORE:.2f}"
    status = PASS if middle <= MOST_MORE else FAIL
    return Check("time a token", status, told, middle, low, high, MOST_MORE, items=len(ratios))


def _seconds(engine: Engine, prompts: Sequence[object]) -> float:
    """Of the processor, for answers of so many tokens each."""
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    requests = [Request(prompt, sampling, depth="auto") for prompt in prompts]  # type: ignore[arg-type]
    began = time.process_time()
    engine.generate(requests)
    return time.process_time() - began


def _about_the_median(values: Sequence[float]) -> tuple[float, float]:
    """Bounds that hold the true median of 7 values in 98 % of all cases, and of more in 95 % and more."""
    some = sorted(values)
    out = max(0, int((len(some) - 1.96 * len(some) ** 0.5 - 1) / 2))
    return some[out], some[-1 - out]


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
