"""What routing is worth: mean gap against mean compute, of the router and of simpler ways to choose a depth.

A policy is what it believes each prompt's gaps to be; it takes the exit of least believed gap plus price times layers, as
`Router.choose` does, and the price, from 0 up, draws its curve. The router believes its predictions, `length` the mean gap of
prompts as long, `domain` that of prompts of the same task, `random` that of all, so that it mixes fixed exits blindly, `oracle`
the truth, which nobody has. What is billed is what the engine runs of a prompt with its answer: the head for the answer's
tokens alone, and the router's look once. At a budget a policy mixes the two prices on either side of it. So what it costs is
looked at, and never what it loses: a policy of many points of which the luckiest counted would seem better than one of few that
knows as much. Each prompt counts once. Intervals are over the documents and conversations that the prompts are of
(`evaluate.intervals`), by what a policy loses without each; of two policies that are compared, of their difference.

Letters: M prompts, A early exits, E = A + 1 exits, n points of a curve, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.evaluate.intervals import between, jackknifed
from shoal.evaluate.prompts import Prompts
from shoal.model import cost
from shoal.model.router import Router

BINS = 6  # of prompt lengths, equally full
BUDGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the FLOPs of full depth at which policies are compared
PRICES = (0.0, *(1e-3 * 1.35**power for power in range(36)))  # nats for all layers
POLICIES = ("router", "length", "domain", "random", "oracle")
TWICE = "second look"


def frontier(
    config: ModelConfig,
    router: Router,
    fit: Prompts,
    test: Prompts,
    *,
    lost: Tensor | None = None,
    looks: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """For the report. ``fixed``: each exit by name with its `flops_share` and `gap`. ``curves``: policy -> points of a curve.
    ``at``: policy -> for each of `BUDGETS` its gap and the 95 % interval of it, nats a token. ``behind``: of each policy but
    the router how much more it loses than the router, mean over `BUDGETS`, and the 95 % interval of that.

    `fit`: what `length` and `domain` learn from; `test`: what all are measured on, which nothing was fitted to. `lost` [M, A]:
    what the early exits cost a prompt of `test`, where something else than its gaps is to be measured. `looks`: what a router
    that looks twice picks at each price, one-hot [M, E] (`looked_twice`); it is a policy of its own then, `TWICE`.
    """
    bill = flops(config, test)
    shares = (bill / bill[:, -1:]).float()  # [M, E]
    look = (routing(config, test, router.reads_nll) / bill[:, -1]).float()  # [M]
    lost = test.gaps if lost is None else lost
    truth = torch.cat([lost, lost.new_zeros(len(lost), 1)], dim=1)  # [M, E]
    tasks = sorted({*fit.tasks, *test.tasks})  # one of few documents may be on one side alone
    beliefs: dict[str, Tensor] = {
        "router": router(test.features)[0],
        "length": _means(fit, test, _bins(fit.lengths)),
        "domain": _means(fit, test, lambda p: torch.tensor([tasks.index(task) for task in p.tasks])),
        "random": fit.gaps.mean(0).expand(len(test.gaps), -1),
        "oracle": test.gaps,
    }
    sizes = test.groups.unique(return_counts=True)[1]
    curves: dict[str, list[dict[str, float]]] = {}
    at: dict[str, list[dict[str, float | None]]] = {}
    means: dict[str, Tensor] = {}  # of the budgets, [1 + G]
    for name in (*POLICIES, *((TWICE,) if looks else ())):
        picks = list(looks) if name == TWICE else _picks(beliefs[name], layers(config))
        # what each prompt costs and loses at each point of the curve, [M, n], dearest first
        costs = torch.stack([(pick * shares).sum(-1) for pick in picks], dim=1)
        costs += look[:, None] * {"router": 1.0, TWICE: 2.0}.get(name, 0.0)
        gaps = torch.stack([(pick * truth).sum(-1) for pick in picks], dim=1)
        costs, gaps = (left_out(each, test.groups) for each in (costs, gaps))
        points = zip(costs[0].tolist(), gaps[0].tolist(), strict=True)
        curves[name] = [{"flops_share": c, "gap": g} for c, g in sorted(set(points))]
        found = [at_cost(budget, costs, gaps) for budget in BUDGETS]
        at[name] = [{"flops_share": budget, **figure(some, sizes)} for budget, some in zip(BUDGETS, found, strict=True)]
        means[name] = torch.stack(found).mean(0)
    rows = zip(config.exit_names, shares.mean(0).tolist(), truth.mean(0).tolist(), strict=True)
    fixed = [{"exit": exit_name, "flops_share": share, "gap": gap} for exit_name, share, gap in rows]
    behind = {name: figure(some - means["router"], sizes) for name, some in means.items() if name != "router"}
    return {
        "prompts": len(truth),
        "groups": len(test.groups.unique()),
        "fixed": fixed,
        "curves": curves,
        "at": at,
        "behind": behind,
    }


def flops(config: ModelConfig, prompts: Prompts) -> Tensor:
    """Those of each prompt with its answer at each exit, [M, E] in float64, but for routing (`cost.request_flops`)."""
    pairs = zip(prompts.lengths.tolist(), prompts.answers.tolist(), strict=True)
    return torch.tensor(
        [[cost.request_flops(config, *pair, e) for e in config.exits] for pair in pairs], dtype=torch.float64
    )


def routing(config: ModelConfig, prompts: Prompts, nll: bool) -> Tensor:
    """FLOPs of the router's look at each prompt, [M] in float64; `nll` as of `cost.routing_flops`."""
    return torch.tensor([cost.routing_flops(config, n, nll) for n in prompts.lengths.tolist()], dtype=torch.float64)


def layers(config: ModelConfig) -> Tensor:
    """What a choice is priced by: each exit's share of the layers [E]."""
    return torch.tensor(config.exits) / config.layers


def figure(found: Tensor, sizes: Tensor) -> dict[str, float | None]:
    """Of all prompts, and without each group, [1 + G]: the gap, and the interval of it, None where there is none; groups of
    `sizes` [G]."""
    value, *without = found.double().tolist()
    low, high = jackknifed(value, np.array(without), sizes.double().numpy())
    known = math.isfinite(low) and math.isfinite(high)
    return {"gap": value, "low": low if known else None, "high": high if known else None}


def ends_of(row: Mapping[str, float | None]) -> tuple[float, float] | None:
    """The interval of a `figure`."""
    low, high = row["low"], row["high"]
    return None if low is None or high is None else (low, high)


def left_out(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of values [M, ...], of all of them and without each of their groups [M]: [1 + G, ...] in fp64."""
    kinds, of, sizes = groups.unique(return_inverse=True, return_counts=True)
    exact = values.double()
    sums = exact.new_zeros(len(kinds), *values.shape[1:]).index_add_(0, of, exact)
    rest = (len(values) - sizes).clamp(min=1).reshape(-1, *[1] * (values.dim() - 1))
    return torch.cat([exact.mean(0, keepdim=True), (exact.sum(0) - sums) / rest])


def _picks(belief: Tensor, shares: Tensor) -> list[Tensor]:
    """For each price of `shares` [E], from the lowest, the exit of each prompt, one-hot [M, E]; believed gaps [M, A]."""
    gaps = torch.cat([belief, belief.new_zeros(len(belief), 1)], dim=1)
    return _one_hot([(gaps + price * shares).argmin(1) for price in PRICES], len(shares))


def _one_hot(chosen: Sequence[Tensor], exits: int) -> list[Tensor]:
    """Places of exits [M] at rising prices as one-hot [M, E], without those that are as at the price before. No prompt goes
    deeper at a higher price, so each costs less than the one before."""
    different = [chosen[0], *(places for before, places in pairwise(chosen) if not before.equal(places))]
    return [torch.nn.functional.one_hot(places, exits).float() for places in different]


def looked_twice(config: ModelConfig, first: Tensor, second: Tensor) -> list[Tensor]:
    """For each price, from the lowest, what is picked of each prompt, one-hot [M, E], by a router that may stop at the first
    exit by the gaps that it believes in there (`first` [M, A]), and chooses among the deeper ones by those it believes in after
    the second group (`second` [M, A])."""
    shares = layers(config)
    both = [torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1) for gaps in (first, second)]
    chosen = []
    for price in PRICES:
        stop = (both[0] + price * shares).argmin(1) == 0
        deeper = 1 + (both[1] + price * shares)[:, 1:].argmin(1)
        chosen.append(deeper.masked_fill(stop, 0))
    return _one_hot(chosen, len(shares))


def _bins(lengths: Tensor) -> Callable[[Prompts], Tensor]:
    edges = torch.quantile(lengths.float(), torch.linspace(0, 1, BINS + 1)[1:-1])
    return lambda prompts: torch.bucketize(prompts.lengths.float(), edges)


def _means(fit: Prompts, test: Prompts, kind: Callable[[Prompts], Tensor]) -> Tensor:
    """The mean gap [M, A] of the prompts of `fit` that are of the same kind as each of `test`."""
    kinds, overall = kind(fit), fit.gaps.mean(0)
    means = {k: fit.gaps[kinds == k].mean(0) for k in set(kinds.tolist())}
    return torch.stack([means.get(k, overall) for k in kind(test).tolist()])


def at_cost(budget: float | Tensor, costs: Tensor, gaps: Tensor) -> Tensor:
    """The gap [R] at a mean cost of `budget` [R], by mixing the two points on either side of it; costs and gaps [R, n] of a
    curve, dearest first. Beyond either end, that end's gap."""
    budget = torch.as_tensor(budget, dtype=costs.dtype).expand(len(costs))[:, None]
    dear = (costs > budget).sum(1, keepdim=True)  # how many points are too dear; they come first
    above, below = (dear - 1).clamp(min=0), dear.clamp(max=costs.shape[1] - 1)
    (more, deep), (less, shallow) = ((costs.gather(1, at), gaps.gather(1, at)) for at in (above, below))
    part = ((budget - less) / (more - less).clamp(min=1e-12)).clamp(0, 1)
    return (shallow + (deep - shallow) * part)[:, 0]


def sentence(found: Mapping[str, Any]) -> list[str]:
    """What to say of choosing depth by task or by length alone, over all budgets, where that is not surely worse than the
    router: that it is better where the whole interval of the difference says so, and else that the figures do not tell."""
    mean = {name: sum(row["gap"] for row in rows) / len(rows) for name, rows in found["at"].items()}
    said = []
    for name in ("length", "domain"):
        row = found["behind"][name]
        ends = ends_of(row)
        if ends and ends[0] > 0:
            continue
        figures = (
            f"{mean[name]:.3f} and {mean['router']:.3f} nats a token, mean over the compared budgets; the difference is "
            f"{row['gap']:.3f} (95 %: {between(ends, '.3f', found.get('groups'))})."
        )
        less = ends is not None and ends[1] < 0
        said.append(
            f"Routing by {name} alone loses less than the router does: {figures}"
            if less
            else f"The router does not surely lose less than routing by {name} alone: {figures}"
        )
    return said
