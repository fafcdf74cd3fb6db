"""What routing is worth, on prompts whose gaps are known: each policy knows what it may know, and no more."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.model import cost
from shoal.model.depth import fit_router
from shoal.train import report
from shoal.train.frontier import BUDGETS, frontier, sentence
from shoal.train.prompts import Prompts

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
    return Prompts(features, gaps, lengths, tasks)


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
    assert bool(sentence(found)) == (found["by"] != "features")


def test_fixed_exits_and_the_line_between_them_are_what_arithmetic_says(found: dict) -> None:
    full = cost.flops_per_token(CONFIG, CONFIG.train_length)
    shares = [cost.flops_per_token(CONFIG, CONFIG.train_length, e) / full for e in CONFIG.exits]
    points = [(row["flops_share"], row["gap"]) for row in found["fixed"]]
    assert [x for x, _ in points] == pytest.approx(shares)
    assert [y for _, y in points] == pytest.approx([0.505, 0.205, 0], abs=0.005)
    for row in found["at"]["random"]:
        (a, x), (b, y) = next(pair for pair in pairwise(points) if pair[0][0] <= row["flops_share"] < pair[1][0])
        assert row["gap"] == pytest.approx(x + (y - x) * (row["flops_share"] - a) / (b - a), abs=1e-3)


def test_intervals_hold_what_they_are_of_and_more_compute_is_never_worse(found: dict) -> None:
    for rows in found["at"].values():
        assert all(row["low"] <= row["gap"] + 1e-6 and row["gap"] <= row["high"] + 1e-6 for row in rows)
        assert [row["gap"] for row in rows] == sorted((row["gap"] for row in rows), reverse=True)
    assert all(row["high"] > row["low"] for row in found["at"]["random"])


def test_the_page_has_the_plot_and_the_table(found: dict, tmp_path: Path) -> None:
    report.render({"title": "t", "frontier": found}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "What routing is worth" in text and "95 %" in text
    assert text.count('class="line"') == 1 and text.count('class="dash"') == 1
    for name in ("router", "oracle", "shallow", "full"):
        assert f">{name}</text>" in text
    report.render({"title": "t"}, tmp_path / "none.html")
    assert "What routing is worth" not in (tmp_path / "none.html").read_text(encoding="utf-8")
