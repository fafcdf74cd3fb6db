"""The pick is the shallowest depth that is as good as full; how sure a model is, is held against how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from recipes.picks import Picks
from recipes.recipe import Answerer, Recipe, Row
from recipes.sure import calibration
from shoal.evaluate.intervals import Figure, of_share


class Exact(Recipe):
    name, told, lessons, most_tokens = "exact", "", (), 8
    measures = ("right", "wrong")
    served = "right"

    def write(self, folder: Path, seed: int) -> None: ...

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        return {}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        hits = [row["right"] == answer for row, answer in zip(rows, answers, strict=True)]
        groups = list(range(len(hits)))
        return {"right": of_share(hits, groups), "wrong": of_share([not hit for hit in hits], groups)}

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [row["right"] == answer for row, answer in zip(rows, answers, strict=True)]

    def workload(self, row: Row) -> str:
        return str(row["of"])


def rows(of: str, count: int) -> list[Row]:
    return [{"right": "a", "of": of, "group": f"{of}{n}"} for n in range(count)]


def answers(right: int, count: int) -> list[str]:
    return ["a"] * right + ["b"] * (count - right)


def picked(recipe: Recipe, by: Mapping[str, Mapping[str, int]]) -> dict[str, str | None]:
    """`by`: workload -> depth -> how many of 100 are right."""
    picks = Picks(recipe)
    for of, depths in by.items():
        for depth, right in depths.items():
            picks.saw(rows(of, 100), answers(right, 100), depth, [(0.5, 1)] * 100)
    return {row["workload"]: row["pick"] for row in picks.all()}


def test_the_shallowest_that_is_as_good_as_full_is_picked() -> None:
    by = {
        "even": {"shallow": 90, "middle": 90, "full": 90, "auto": 90},
        "near": {"shallow": 87, "middle": 88, "full": 90, "auto": 90},  # two points are allowed
        "deep": {"shallow": 10, "middle": 50, "full": 90, "auto": 90},
        "better": {"shallow": 95, "middle": 10, "full": 90, "auto": 90},
    }
    assert picked(Exact(), by) == {"even": "shallow", "near": "middle", "deep": "full", "better": "shallow"}


def test_of_a_measure_that_is_to_be_small_the_sign_turns() -> None:
    recipe = Exact()
    recipe.served, recipe.least_is_best = "wrong", ("wrong",)
    by = {
        "deep": {"shallow": 10, "middle": 50, "full": 90}, "even": {"shallow": 90, "full": 90},
        "nothing": {"shallow": 0, "full": 1},
    }  # fmt: skip
    assert picked(recipe, by) == {"deep": "full", "even": "shallow", "nothing": None}


def test_where_next_to_nothing_is_right_at_any_depth_none_is_picked() -> None:
    """The shallowest of four that all fail is no advice; of few that are right none is shown to do it."""
    by = {
        "find": {"shallow": 0, "middle": 0, "full": 0, "auto": 0},
        "by chance": {"shallow": 2, "middle": 4, "full": 3, "auto": 4},
        "some": {"shallow": 0, "middle": 12, "full": 12, "auto": 0},
    }
    assert picked(Exact(), by) == {"find": None, "by chance": None, "some": "middle"}
    recipe = Exact()
    recipe.always_full = ("find",)
    assert picked(recipe, by)["find"] == "full", "whatever is measured"


def test_a_recipe_may_say_that_a_workload_is_always_full() -> None:
    recipe = Exact()
    recipe.always_full = ("even",)
    assert picked(recipe, {"even": {"shallow": 90, "full": 90}}) == {"even": "full"}


def test_rows_of_two_suites_are_one_workload_and_layers_a_mean_over_them() -> None:
    picks = Picks(Exact())
    for count, share in ((100, 0.25), (300, 0.75)):
        for depth in ("full", "auto"):
            picks.saw(rows("one", count), answers(count // 2, count), depth, [(share, 1)] * count)
    (found,) = picks.all()
    assert found["rows"] == 400 and found["depths"] == {"full": 0.5, "auto": 0.5} and found["auto_layers"] == 0.625
    low, high = found["intervals"]["full"]
    assert (low, high) == pytest.approx((0.4499, 0.5501), abs=1e-4)


def test_layers_at_auto_are_those_of_the_workload_s_own_answers() -> None:
    """A token is a token: of "two" one answer of ten tokens ran a quarter, one of thirty all. Each had the mean of both."""
    picks = Picks(Exact())
    both, ran = [*rows("one", 2), *rows("two", 2)], [(0.25, 10), (0.25, 30), (0.25, 10), (1.0, 30)]
    for depth in ("full", "auto"):
        picks.saw(both, answers(4, 4), depth, ran)
    assert {row["workload"]: row["auto_layers"] for row in picks.all()} == {"one": 0.25, "two": 0.8125}


@pytest.mark.parametrize(
    ("sure", "right", "error"),
    [
        ([0.95] * 20, 19, 0.0),
        ([0.95] * 20, 0, 0.95),
        ([0.05] * 20, 20, 0.95),
        ([0.75] * 10 + [0.25] * 10, 10, 0.25),  # right and less sure than it may be, wrong and surer: no balance
        ([1.0] * 20, 20, 0.0),
        ([0.0] * 20, 0, 0.0),
    ],
)
def test_calibration_by_hand(sure: list[float], right: int, error: float) -> None:
    some = rows("one", 20)
    found = calibration(Exact(), some, answers(right, 20), sure)
    assert found.value == pytest.approx(error) and found.groups == 20
    assert found.interval[0] <= found.value + 0.05
