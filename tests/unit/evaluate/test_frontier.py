"""What routing is worth, on prompts whose gaps are known: each policy knows what it may know, and no more."""

import dataclasses
from itertools import pairwise
from typing import cast

import pytest
import torch

from shoal import Engine, Request, Sampling, presets
from shoal.engine.plan import Outcome, Plan
from shoal.evaluate.frontier import (
    BUDGETS,
    TWICE,
    at_cost,
    flops,
    frontier,
    looked_twice,
    sentence,
)
from shoal.evaluate.prompts import Prompts
from shoal.model import cost
from shoal.model.router import Router, fit_router
from tests.unit.engine.test_second_look import MODEL

CONFIG = presets.get("tiny").model
TASKS = ("easy", "hard")


def prompts(seed: int, count: int = 200, by: str = "task") -> Prompts:
    """Half of the prompts lose nothing at any exit, the others 1 nat at the first and 0.4 at the second. Which, their task,
    their length or their features tell; the others of the three are noise."""
    draws = torch.Generator().manual_seed(seed)
    hard = torch.arange(count) % 2 == 1
    noise = torch.rand(count, generator=draws) < 0.5
    gaps = hard[:, None] * torch.tensor([1.0, 0.4]) + 0.01 * torch.rand(count, 2, generator=draws)
    features = 0.1 * torch.randn(count, 2 * CONFIG.width + 3, generator=draws)
    features[:, ::8] += 0.5 * (hard if by == "features" else noise).float()[:, None]
    lengths = 10 + 50 * (hard if by == "length" else noise) + torch.randint(10, (count,), generator=draws)
    tasks = tuple(TASKS[int(flag)] for flag in (hard if by == "task" else noise))
    answers = torch.randint(1, 30, (count,), generator=draws)
    return Prompts(features, gaps, lengths, answers, tasks, torch.arange(count))


def whole(some: Prompts, depth: int | None = None) -> list[float]:
    """FLOPs of each prompt with its answer at full depth [at `depth`]: every token but the last through the layers, and the
    head for what the answer's are drawn from."""
    head = 2 * CONFIG.vocab * CONFIG.width
    layers = cost.flops_per_token(CONFIG, CONFIG.train_length, depth) - head
    pairs = zip(some.lengths.tolist(), some.answers.tolist(), strict=True)
    return [(prompt + answer - 1) * layers + answer * head for prompt, answer in pairs]


def billed(some: Prompts) -> torch.Tensor:
    """Each prompt's share of the FLOPs of full depth at each exit [M, E]."""
    return torch.tensor([whole(some, e) for e in CONFIG.exits]).T / torch.tensor(whole(some))[:, None]


@pytest.fixture(scope="module", params=["task", "length", "features"])
def found(request: pytest.FixtureRequest) -> dict:
    fit, test = prompts(1, by=request.param), prompts(2, by=request.param)
    router = fit_router(CONFIG, fit.features, fit.gaps)
    return {"by": request.param, **frontier(CONFIG, router, fit, test)}


def test_who_knows_the_gaps_is_as_good_as_the_oracle_and_the_others_are_not(found: dict) -> None:
    """The router pays for its own look at the prompt, and errs where it knows nothing."""
    knows = {"task": "domain", "length": "length", "features": "router"}[found["by"]]
    for place, budget in enumerate(BUDGETS):
        gaps = {name: rows[place]["gap"] for name, rows in found["at"].items()}
        assert gaps["oracle"] <= min(gaps.values()) + 1e-4
        if knows != "router" or budget >= 0.6:
            assert gaps[knows] == pytest.approx(gaps["oracle"], abs=0.08 if knows == "router" else 0.04), budget
        for blind in {"domain", "length", "router"} - {knows}:
            assert gaps[blind] > gaps["oracle"] + 0.02, (blind, budget)
    said = " ".join(sentence(found))
    assert bool(said) == (found["by"] != "features")
    if said:
        assert f"Routing by {knows} alone loses less than the router does" in said


def test_how_far_a_policy_is_behind_is_its_mean_less_the_routers_and_its_interval_that_of_the_difference(
    found: dict,
) -> None:
    mean = {name: sum(row["gap"] for row in rows) / len(BUDGETS) for name, rows in found["at"].items()}
    assert set(found["behind"]) == set(mean) - {"router"}
    for name, row in found["behind"].items():
        assert row["gap"] == pytest.approx(mean[name] - mean["router"], abs=1e-6)
        assert row["low"] <= row["gap"] <= row["high"]
    # both see the same prompts: what these have in common is no doubt about which of two policies is better
    apart = [sum(row["high"] - row["low"] for row in found["at"][name]) / len(BUDGETS) for name in ("router", "random")]
    assert found["behind"]["random"]["high"] - found["behind"]["random"]["low"] < sum(apart)


def test_another_loss_can_be_measured_and_the_policies_stay(found: dict) -> None:
    """Twice the loss at every exit, for the same choices, is twice the gap."""
    fit, test = prompts(1, by=found["by"]), prompts(2, by=found["by"])
    router = fit_router(CONFIG, fit.features, fit.gaps)
    twice = frontier(CONFIG, router, fit, test, lost=2 * test.gaps)
    for name, rows in twice["at"].items():
        for row, once in zip(rows, found["at"][name], strict=True):
            assert row["gap"] == pytest.approx(2 * once["gap"], abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.001, 0.02, ""),
        (-0.01, 0.02, "does not surely lose less than routing by domain"),
        (-0.02, -0.001, "loses less"),
        (0.0, 0.02, "does not surely lose less than routing by domain"),
        (-0.02, 0.0, "does not surely lose less than routing by domain"),
    ],
)
def test_what_is_said_follows_from_the_interval(low: float, high: float, says: str) -> None:
    """A difference whose interval holds 0 is no claim that one of the two is better."""
    behind = {
        "length": {"gap": 1.0, "low": 0.9, "high": 1.1},
        "domain": {"gap": (low + high) / 2, "low": low, "high": high},
    }
    middle = (low + high) / 2
    at = {
        "router": [{"gap": 0.06}, {"gap": 0.04}],
        "domain": [{"gap": 0.08 + middle}, {"gap": 0.02 + middle}],
        "length": [{"gap": 1.05}] * 2,
    }
    said = sentence({"at": at, "behind": behind})
    assert len(said) == bool(says) and all(says in one for one in said)
    assert not said or f"95 %: {low:.3f} to {high:.3f}" in said[0]
    assert not said or f"{0.05 + middle:.3f} and 0.050 nats a token, mean over the compared budgets" in said[0]


def test_without_an_interval_nothing_is_said_to_be_better() -> None:
    behind = {key: {"gap": -0.5, "low": None, "high": None} for key in ("length", "domain")}
    at = {key: [{"gap": 0.5}] for key in ("router", "length", "domain")}
    said = sentence({"at": at, "behind": behind, "groups": 4})
    assert len(said) == 2 and all("does not surely" in one and "too few: 4 groups" in one for one in said)


def test_fixed_exits_and_the_line_between_them_are_what_arithmetic_says(found: dict) -> None:
    shares = billed(prompts(2, by=found["by"])).mean(0).tolist()
    points = [(row["flops_share"], row["gap"]) for row in found["fixed"]]
    assert [x for x, _ in points] == pytest.approx(shares)
    assert [y for _, y in points] == pytest.approx([0.505, 0.205, 0], abs=0.005)
    for row in found["at"]["random"]:
        (a, x), (b, y) = next(pair for pair in pairwise(points) if pair[0][0] <= row["flops_share"] < pair[1][0])
        assert row["gap"] == pytest.approx(x + (y - x) * (row["flops_share"] - a) / (b - a), abs=1e-3)


@pytest.mark.parametrize("nll", [False, True])
def test_the_router_pays_for_reading_each_prompt(found: dict, nll: bool) -> None:
    """Its cheapest point is the first exit's share and, over the prompts, what routing one of that length adds to a request."""
    test = prompts(2, by=found["by"])
    if nll:
        fit = prompts(1, by=found["by"])
        router = fit_router(CONFIG, fit.features, fit.gaps, steps=20, nll=True)
        found = {**found, **frontier(CONFIG, router, fit, test)}
    looks = [cost.routing_flops(CONFIG, n, nll) for n in test.lengths.tolist()]
    look = sum(a / b for a, b in zip(looks, whole(test), strict=True)) / len(looks)
    least = {name: min(point["flops_share"] for point in points) for name, points in found["curves"].items()}
    assert (look > 0.01) == nll and least["router"] == pytest.approx(found["fixed"][0]["flops_share"] + look)
    for name in ("length", "oracle"):
        assert least[name] == pytest.approx(found["fixed"][0]["flops_share"])


@pytest.mark.parametrize(("length", "answer"), [(3, 1), (21, 6)])
@pytest.mark.parametrize("depth", MODEL.config.exits)
def test_what_is_billed_is_what_the_engine_runs(
    depth: int, length: int, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows through the layers and rows of the head, counted; the head ran for every token of a prompt by the bill of before."""
    engine, config, ran, heads = Engine(MODEL, units=400), MODEL.config, 0, 0
    ends, commit, logits = (0, *config.ends), engine.scheduler.commit, engine.runner.net.logits

    def counted(plan: Plan, outcome: Outcome) -> object:
        nonlocal ran
        ran += sum(work.count * (ends[work.last] - ends[work.first]) for work in plan.works)
        return commit(plan, outcome)

    def head(x: torch.Tensor) -> torch.Tensor:
        nonlocal heads
        heads += len(x)
        return logits(x)

    monkeypatch.setattr(engine.scheduler, "commit", counted)
    monkeypatch.setattr(engine.runner.net, "logits", head)
    sampling = Sampling(max_tokens=answer, ignore_eos=True, speculative=0)
    engine.generate([Request([20 + 7 * i % 200 for i in range(length)], sampling, depth=depth)])
    assert ran == depth * (length + answer - 1) and heads == answer
    tokens, zero = torch.tensor([[length], [answer]]), torch.zeros(1, 2)
    one = Prompts(zero, zero, tokens[0], tokens[1], ("a",), torch.tensor([0]))
    row, last = cost.layer_flops(config, config.train_length, depth), cost.head_flops(config, depth)
    assert flops(config, one)[0, config.exits.index(depth)] == ran // depth * row + heads * last


def test_who_looks_twice_stops_at_the_first_exit_or_goes_as_deep_as_the_second_look_says() -> None:
    first = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[9.0, 9.0], [-9.0, 1.0], [-9.0, 0.0]])
    picks = [tuple(pick.argmax(1).tolist()) for pick in looked_twice(CONFIG, first, second)]
    assert (0, 2, 1) in picks, "what the second look believes in the first exit is too late"
    assert all(pick[1] == 0 or pick[1] >= pick[2] for pick in picks)
    assert picks[0] == picks[-1] or (0, 0, 0) in picks, "at the highest price all stop"
    # a second look at 0.4 nats goes less deep once the price is more than that, and long before 50 nats let it stop
    rising = looked_twice(CONFIG, torch.full((1, 2), 50.0), torch.tensor([[9.0, 0.4]]))
    assert [int(pick.argmax(1)) for pick in rising[:2]] == [2, 1]


def test_a_second_look_that_knows_more_loses_less_than_the_first_alone() -> None:
    """Of what loses at the first exit the first look cannot tell what loses at the second, too; the second can."""
    fit, test = prompts(1, by="features"), prompts(2, by="features")
    twice = [dataclasses.replace(some, gaps=some.gaps.clone()) for some in (fit, test)]
    for some in twice:
        some.gaps[1::4, 1], some.gaps[3::4, 1] = 1.0, 0.0
    router = fit_router(CONFIG, twice[0].features, twice[0].gaps)
    looks = looked_twice(CONFIG, router(test.features)[0], twice[1].gaps)
    found = frontier(CONFIG, router, *twice, looks=looks)
    once, again = (found["at"][name] for name in ("router", TWICE))
    assert again[2]["gap"] < once[2]["gap"] - 0.03 and found["behind"][TWICE]["high"] < 0, "at 60 % of the FLOPs"
    assert again[-1]["gap"] < 0.01 and len(again) == len(BUDGETS)
    assert TWICE not in frontier(CONFIG, router, *twice)["at"]


def test_intervals_hold_what_they_are_of_and_more_compute_is_never_worse(found: dict) -> None:
    for rows in found["at"].values():
        assert all(row["low"] <= row["gap"] + 1e-6 and row["gap"] <= row["high"] + 1e-6 for row in rows)
        assert [row["gap"] for row in rows] == sorted((row["gap"] for row in rows), reverse=True)
    assert all(row["high"] > row["low"] for row in found["at"]["random"])


def test_intervals_are_those_of_a_mean_over_the_prompts() -> None:
    """`random` mixes two exits alike for every prompt, so that its gap is a mean of 200: plus and minus 1.97 standard errors,
    and a little more for their skew."""
    fit, test = prompts(1), prompts(2)
    found = frontier(CONFIG, fit_router(CONFIG, fit.features, fit.gaps, steps=1), fit, test)
    shares = torch.tensor([row["flops_share"] for row in found["fixed"]])
    truth = torch.cat([test.gaps, torch.zeros(200, 1)], dim=1)
    for row in found["at"]["random"]:
        at = int((shares <= row["flops_share"]).sum()) - 1
        part = (row["flops_share"] - shares[at]) / (shares[at + 1] - shares[at])
        mixed = truth[:, at] + part * (truth[:, at + 1] - truth[:, at])
        error = float(mixed.std()) / 200**0.5
        assert row["gap"] == pytest.approx(float(mixed.mean()), abs=1e-4)
        ends = (row["gap"] - 1.97 * error, row["gap"] + 1.97 * error)
        assert (row["low"], row["high"]) == pytest.approx(ends, abs=0.25 * error)


class Known:
    """Its features are what it predicts."""

    reads_nll = True

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def known(knows: bool, seed: int) -> tuple[dict, float]:
    """What is found with a router whose loss is known, and by how much domain really lies behind it. Of each prompt that is
    hard, half of them where the router `knows` which, an exit loses as much as it saves of the FLOPs, and noise about it; so
    who knows nothing loses 1 less the budget, however he mixes exits, and who knows all spends everything on the hard ones."""
    draws, length, answer = torch.Generator().manual_seed(seed), 64, 8
    full = cost.request_flops(CONFIG, length, answer)
    shares = torch.tensor([cost.request_flops(CONFIG, length, answer, e) / full for e in CONFIG.exits])

    def some(count: int) -> Prompts:
        hard = (torch.rand(count, 1, generator=draws) < (0.5 if knows else 1.0)).float()
        clean, noise = hard * (1 - shares[:-1]), torch.randn(count, 2, generator=draws)
        seen = clean if knows else clean + 0.2 * torch.randn(count, 2, generator=draws)
        gaps, (lengths, answers) = clean + 0.6 * noise, torch.tensor([[length], [answer]]).expand(2, count)
        return Prompts(seen, gaps, lengths, answers, ("one",) * count, torch.arange(count))

    found = frontier(CONFIG, cast("Router", Known()), some(240), some(400))
    look = cost.routing_flops(CONFIG, length, nll=True) / full
    behind = 0.0
    for budget in BUDGETS:
        left = max(budget - look, float(shares[0]))
        mine = 0.5 * max(0.0, 1 - (2 * left - float(shares[0]))) if knows else 1 - left
        behind += (1 - max(budget, float(shares[0]))) * (0.5 if knows else 1.0) - mine
    return found, behind / len(BUDGETS)


@pytest.mark.parametrize("knows", [pytest.param(False, marks=pytest.mark.drill), True])
def test_a_router_is_found_to_gain_what_it_gains_by_arithmetic(knows: bool) -> None:
    """One that knows nothing loses what its look costs. It has many points where domain has few; when the luckiest pair of
    them counted, it gained by that, and 9 intervals of 24 did not hold the truth, all on the same side."""
    rows = [(found["behind"]["domain"], truth) for found, truth in (known(knows, seed) for seed in range(20))]
    (truth,) = {round(truth, 9) for _, truth in rows}
    off = torch.tensor([row["gap"] - truth for row, _ in rows])
    assert abs(float(off.mean())) < 2.6 * float(off.std()) / 20**0.5
    assert sum(row["low"] <= truth <= row["high"] for row, _ in rows) >= 17
    assert (truth > 0) == knows


def test_at_a_cost_two_points_are_mixed_and_beyond_the_ends_none() -> None:
    """Of two sums at once, each with a curve and a budget of its own; in float64 to the last digits."""
    costs = torch.tensor([[1.0, 0.6, 0.2], [0.9, 0.5, 0.1]], dtype=torch.float64)
    gaps = torch.tensor([[0.0, 0.1, 0.5], [0.2, 0.3, 0.7]], dtype=torch.float64)
    for budget, found in (
        (0.4, (0.3, 0.4)),
        (0.7, (0.075, 0.25)),
        (0.6, (0.1, 0.275)),
        (2.0, (0.0, 0.2)),
        (0.05, (0.5, 0.7)),
    ):
        assert at_cost(budget, costs, gaps).tolist() == pytest.approx(found, abs=1e-15)
    own = torch.tensor([0.8, 0.3], dtype=torch.float64)
    assert at_cost(own, costs, gaps).tolist() == pytest.approx((0.05, 0.5), abs=1e-15)
    assert at_cost(0.5, costs[:, :1], gaps[:, :1]).tolist() == [0.0, 0.2], "one point is all there is"
