"""A second look of the router, after some tokens of an answer: fitted, held against one look at equal cost, and used only where
that pays.

    prompt ─> first look: an exit ─> `after` tokens of the answer ─> second look: the same exit or a deeper one ─> the rest

Easy and hard answers may begin alike and with prompts that are alike. Who can look again may begin shallow; what it costs is
paid: group 1 runs once more over what has no sums of its pages, and who goes deeper runs prompt and answer through the deeper
groups (`engine/holding.py:look`).

The second look's router is fitted to features of prompt and answer so far, and to the gaps of the rest. Both looks share one
bound: the second takes the first exit whose predicted quantile is within it, the first the one whose is within it and an offset
more. The offset is chosen on the prompts that the weights are fitted to, the bound is calibrated as for one look on others, and
what it is worth is measured on those of the test, which neither has seen.

Letters: M prompts, A early exits, E = A + 1 exits, n tokens of the answer at the second look, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.evaluate.frontier import at_cost, figure, flops, left_out, routing
from shoal.evaluate.prompts import Prompts
from shoal.model import cost
from shoal.model.router import (
    LEAST_PROMPTS,
    TOLERANCES,
    Router,
    dealt,
    fit_weights,
    promised,
    thresholds,
)

AFTER = 8  # tokens of an answer that `refit` looks at again
OFFSETS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 10.0)  # nats a token that a first look may be above the bound
POINTS = 60  # bounds of a curve at most


def fit(
    config: ModelConfig, router: Router, prompts: Prompts, *, seed: int = 0
) -> tuple[Router | None, dict[str, float]]:
    """`fitted`, where it is sure to pay: where the whole interval of its loss less that of one look at the same cost, on the
    prompts of the test, is below 0. And what was found; nothing where there is none."""
    later = fitted(config, router, prompts, seed=seed)
    if later is None:
        return None, {}
    report = later.calibration.report
    return (later if report.get("paid_high", 0.0) < 0 else None), report


def fitted(config: ModelConfig, router: Router, prompts: Prompts, *, seed: int = 0) -> Router | None:
    """The second look for `router`, which was fitted to the same `prompts` with the same `seed`: with tables of both
    looks, for those of `TOLERANCES` at which two lose less than one at the same cost on the prompts that calibrate, and a
    report on those of the test. None where there are none of these, and where too few answers are long enough."""
    rest = prompts.rest
    assert rest is not None, "measured without the rest of the answers"
    order, half, three = dealt(prompts.groups, seed)
    known = order[:half][(prompts.answers > rest.after)[order[:half]]]
    if len(known) < LEAST_PROMPTS or not torch.isfinite(rest.features).all():
        return None
    later = fit_weights(config, rest.features[known].float(), rest.gaps[known].float(), seed=seed)
    table = later.calibration
    table.after, table.default_tolerance = rest.after, router.calibration.default_tolerance
    table.offset = _offset(_Looks.of(config, router, later, prompts.some(order[:half])))
    looks = _Looks.of(config, router, later, prompts.some(order[half:three]))
    groups = prompts.groups[order[half:three]]
    worst = float(looks.losses.max().clamp(min=0))

    def regrets(bounds: Tensor) -> Tensor:
        lost = [looks.lost(*looks.twice(bound, table.offset)) for bound in bounds.tolist()]
        return promised(torch.stack(lost).clamp(min=0), worst, groups)

    found = thresholds({*(looks.first.flatten() - table.offset).tolist(), *looks.second.flatten().tolist()}, regrets)
    _, at = _beside(looks, [bound for _, bound in found], table.offset)
    table.thresholds = [kept for kept, row in zip(found, at, strict=True) if row["twice"] < row["once"]]
    if not table.thresholds:
        return None
    test = prompts.some(order[three:])
    worth = paid(config, router, later, test)
    share, lost = routed(config, router, test, table.default_tolerance, later=later)
    table.report = {
        "tolerance": table.default_tolerance,
        "prompts": float(len(test.lengths)),
        "groups": float(len(test.groups.unique())),
        "depth_share": float(share.mean()),
        "regret": float(lost.mean()),
        "violations": float((lost > table.default_tolerance).float().mean()),
        **{f"paid_{name}": worth[name] for name in ("gap", "low", "high") if worth[name] is not None},
    }
    for tolerance in TOLERANCES:
        share, lost = routed(config, router, test, tolerance, later=later)
        row = (tolerance, float(share.mean()), float(lost.mean()), float((lost > tolerance).float().mean()))
        table.by_tolerance.append(row)
    return later


def routed(
    config: ModelConfig,
    router: Router,
    prompts: Prompts,
    tolerance: float | None,
    budget: float | None = None,
    *,
    later: Router | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of the layers and gap [M] of what the router gives each prompt's answer, with its second look [or `later` as that]
    where it has one and the rest of the answers is known."""
    later, rest = later or router.later, prompts.rest
    twice = (
        later is not None and rest is not None and (tolerance is not None or budget is None) and later.covers(tolerance)
    )
    places = {layers: place for place, layers in enumerate(config.exits)}
    if not twice or later is None or rest is None:
        gaps = torch.cat([prompts.gaps, prompts.gaps.new_zeros(len(prompts.gaps), 1)], dim=1)
        depths = router.choices(prompts.features, tolerance, budget)
        at = torch.tensor([places[depth] for depth in depths])
        return torch.tensor(depths) / config.layers, gaps[torch.arange(len(gaps)), at]
    assert later.after == rest.after, "the rest of the answers begins elsewhere than the second look"
    first = router.choices(prompts.features, tolerance, again=later)
    looks = (prompts.answers > rest.after).tolist()
    second = [
        max(depth, again) if look else depth
        for depth, again, look in zip(first, later.choices(rest.features, tolerance), looks, strict=True)
    ]
    head = prompts.answers.clamp(max=rest.after) / prompts.answers
    share = (head * torch.tensor(first) + (1 - head) * torch.tensor(second)) / config.layers
    picked = [torch.tensor([places[depth] for depth in depths]) for depths in (first, second)]
    return share, losses(prompts)[torch.arange(len(share)), picked[0], picked[1]]


def paid(config: ModelConfig, router: Router, later: Router, test: Prompts) -> dict[str, Any]:
    """What looking twice loses less one look at the same mean cost, all prices paid, at each tolerance that `later` has a bound
    for: nats a token, mean over them (``gap``), its 95 % interval over groups (``low``, ``high``; None where
    there is none), and by tolerance (``at``)
    the share of the FLOPs of full depth and the loss of both. Below 0 where it pays. One look mixes the two bounds on either
    side of that cost."""
    looks = _Looks.of(config, router, later, test)
    bounds = [bound for _, bound in later.calibration.thresholds]
    less, at = _beside(looks, bounds, later.calibration.offset, test.groups)
    told = zip(later.calibration.thresholds, at, strict=True)
    return {
        **figure(less, test.groups.unique(return_counts=True)[1]),
        "at": [{"tolerance": tolerance, **row} for (tolerance, _), row in told],
    }


def prices(config: ModelConfig, prompts: Prompts, reads: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """What an answer costs with its prompt, as a share of full depth: [M, E] with one look that sends it to an exit, and
    [M, E, E] with two, the second of which does not take less. `reads`: whether the first look and the second read the loss at
    exit 1 (`Router.reads_nll`). See `rows`."""
    rest, c = prompts.rest, config
    assert rest is not None
    layers = torch.tensor([cost.layer_flops(c, c.train_length, e) for e in c.exits], dtype=torch.float64)
    heads = torch.tensor([cost.head_flops(c, e) for e in c.exits], dtype=torch.float64)
    once, route = flops(config, prompts), routing(config, prompts, reads[0])
    seen = prompts.lengths % c.page + rest.after  # tokens that have no sums of their pages
    again = torch.tensor([cost.routing_flops(c, n, reads[1]) for n in seen.tolist()]).double()
    first = prompts.answers.clamp(max=rest.after).double()[:, None, None]
    said = first * heads[:, None] + (prompts.answers[:, None, None] - first) * heads
    may = torch.arange(len(layers))[:, None] < len(layers) - 1
    looks = (prompts.answers > rest.after).double()[:, None, None] * may
    twice = rows(prompts, c.page, layers) + said + route[:, None, None] + looks * again[:, None, None]
    full = once[:, -1:]
    return ((once + route[:, None]) / full).float(), (twice / full[:, None]).float()


def rows(prompts: Prompts, page: int, layers: Tensor) -> Tensor:
    """What the rows of two looks cost, [M, E, E], where a row through an exit costs `layers` [E]: those of prompt and answer;
    of the second look group 1 over what has no sums of its pages, but for the newest row, which runs anyway; of who goes deeper
    all of the rows before that through all of its groups, those of group 1 once."""
    rest = prompts.rest
    assert rest is not None
    n, exits = rest.after, len(layers)
    before = (prompts.lengths + prompts.answers.clamp(max=n) - 1).double()  # rows up to the newest at the second look
    behind = (prompts.answers - n).clamp(min=0).double()
    looks = (behind > 0).double()
    unknown = (prompts.lengths % page + n - 1).double() * layers[0] * looks
    found = before[:, None, None] * layers[:, None] + behind[:, None, None] * layers
    place = torch.arange(exits)
    may, deeper = place[:, None] < exits - 1, place[:, None] < place
    found = found + unknown[:, None, None] * may
    return found + deeper * ((looks * before)[:, None, None] * layers - unknown[:, None, None])


def losses(prompts: Prompts) -> Tensor:
    """What an answer loses, [M, E, E] nats a token, with its first tokens at an exit and the rest at another."""
    rest = prompts.rest
    assert rest is not None
    share = (prompts.answers.clamp(max=rest.after) / prompts.answers)[:, None, None]
    head, behind = (torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1) for gaps in (rest.head, rest.gaps))
    return share * head[:, :, None] + (1 - share) * behind[:, None, :]


@dataclass(frozen=True)
class _Looks:
    """Prompts with what two looks believe of them, what they cost and what they lose."""

    first: Tensor  # [M, A] quantiles of the gap, predicted by the first look
    second: Tensor  # [M, A] of the rest's, by the second
    once: Tensor  # [M, E] cost of one look
    twice_: Tensor  # [M, E, E] of two
    losses: Tensor  # [M, E, E]

    @classmethod
    def of(cls, config: ModelConfig, router: Router, later: Router, prompts: Prompts) -> _Looks:
        assert prompts.rest is not None
        seen = router(prompts.features)[1], later(prompts.rest.features)[1]
        return cls(*seen, *prices(config, prompts, (router.reads_nll, later.reads_nll)), losses(prompts))

    def twice(self, bound: float, offset: float) -> tuple[Tensor, Tensor]:
        """Places of the exits [M] that the two looks take."""
        first = _within(self.first, bound + offset)
        return first, torch.maximum(first, _within(self.second, bound))

    def lost(self, first: Tensor, second: Tensor) -> Tensor:
        return self.losses[torch.arange(len(first)), first, second]

    def cost(self, first: Tensor, second: Tensor) -> Tensor:
        return self.twice_[torch.arange(len(first)), first, second]


def _within(quantiles: Tensor, bound: float) -> Tensor:
    """Place of the first exit [M] whose predicted quantile [M, A] is within `bound`, else of full depth."""
    within = torch.cat([quantiles <= bound, torch.ones(len(quantiles), 1, dtype=torch.bool)], dim=1)
    return within.float().argmax(1)


def _beside(
    looks: _Looks, bounds: list[float], offset: float, groups: Tensor | None = None
) -> tuple[Tensor, list[dict[str, float]]]:
    """Loss of two looks at `bounds` less that of one look at the same cost, mean over them, of all prompts, and with
    their `groups` also without each, [1 + G]; and of all by bound cost and both losses."""

    def means(values: Tensor) -> Tensor:
        return values.double().mean(0, keepdim=True) if groups is None else left_out(values, groups)

    curve = torch.quantile(looks.first.flatten(), torch.linspace(0, 1, POINTS)).tolist()
    picks = [_within(looks.first, bound) for bound in (-torch.inf, *curve)]  # dearest first
    at = torch.arange(len(looks.first))
    costs = means(torch.stack([looks.once[at, pick] for pick in picks], dim=1))
    gaps = means(torch.stack([looks.losses[at, pick, pick] for pick in picks], dim=1))
    total, told = torch.zeros(len(costs), dtype=torch.float64), []
    for bound in bounds:
        first, second = looks.twice(bound, offset)
        spent, lost = means(looks.cost(first, second)), means(looks.lost(first, second))
        one = at_cost(spent, costs, gaps)
        total += (lost - one) / len(bounds)
        told.append({"flops_share": float(spent[0]), "twice": float(lost[0]), "once": float(one[0])})
    return total, told


def _offset(looks: _Looks) -> float:
    """That of `OFFSETS` with which two looks lose least beside one, over bounds as they come."""
    bounds = torch.quantile(looks.second.flatten(), torch.linspace(0, 1, 12)).tolist()
    return min(OFFSETS, key=lambda offset: float(_beside(looks, bounds, offset)[0][0]))
