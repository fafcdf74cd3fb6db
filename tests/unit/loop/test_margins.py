"""Margins over a line of versions: what each took is added, whoever breaks the line begins anew."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import Model
from shoal.loop.gate import gate
from shoal.loop.margins import of_difference, of_ratio, taken, together
from shoal.loop.paired import FAIL, INCONCLUSIVE, PASS, Check
from shoal.loop.release import Release
from shoal.loop.suites import FROZEN, RECENT, Suite, freeze
from shoal.loop.versions import Version
from tests.unit.loop.test_gate import ASKED, answers, write

SUITES = [Suite("shop", "shop.jsonl", "a" * 64, FROZEN), Suite("recent", "recent.jsonl", "b" * 64, RECENT)]


def line(ratios: list[float]) -> list[str]:
    """The statuses of releases that are each so many times as deep as the one before; who fails is not released."""
    found, before = [], dict[str, float]()
    for ratio in ratios:
        check = Check("layers", PASS if ratio <= 1.1 else FAIL, "", ratio, limit=1.1, used=of_ratio(ratio, 1.1))
        (check,) = together([check], before)
        found.append(check.status)
        if check.status == PASS:
            before = {"layers": check.used or 0.0}
    return found


def test_of_releases_that_are_each_nine_percent_deeper_the_second_is_refused() -> None:
    assert line([1.09] * 3) == [PASS, FAIL, FAIL]
    assert line([1.04, 1.04, 1.04, 1.0, 0.99, 1.01]) == [PASS, PASS, FAIL, PASS, PASS, PASS]
    assert line([0.5, 1.09, 1.09]) == [PASS, PASS, FAIL], "what is gained is what the next are held to"
    assert line([1.1, 1.0, 1.0]) == [PASS] * 3


@pytest.mark.parametrize("seed", range(20))
def test_no_line_is_deeper_than_a_margin_above_its_best(seed: int) -> None:
    deep, least, before = 1.0, 1.0, dict[str, float]()
    for ratio in np.random.default_rng(seed).uniform(0.93, 1.12, 60):
        check = Check("layers", PASS if ratio <= 1.1 else FAIL, "", ratio, used=of_ratio(float(ratio), 1.1))
        (check,) = together([check], before)
        if check.status == PASS:
            deep, before = deep * ratio, {"layers": check.used or 0.0}
            least = min(least, deep)
            assert deep <= 1.1 * least * (1 + 1e-6)


def test_a_task_that_loses_a_point_a_release_is_stopped_after_three_and_what_failed_stays_so() -> None:
    used = of_difference(0.01, 0.03)
    assert used == pytest.approx(1 / 3)
    (check,) = together([Check("shop", PASS, "one", used=used)], {"shop": 2 / 3})
    assert (check.status, check.used) == (PASS, pytest.approx(1.0)) and "67% of what may be given away" in check.told
    (check,) = together([Check("shop", PASS, "one", used=used)], {"shop": 0.7})
    assert check.status == FAIL
    for status in (FAIL, INCONCLUSIVE):
        (check,) = together([Check("shop", status, "", used=-9.0)], {"shop": 0.7})
        assert check.status == status
    other = Check("shape", PASS, "")
    assert together([other], {"shape": 1.0, "shop": 0.5}) == [other], "what has no margin takes none"
    assert of_ratio(float("nan"), 1.1) is None and of_difference(float("inf"), 0.1) is None
    assert (of_ratio(0.0, 1.1) or 0.0) < 0


def verdict(weights: str, used: float = 0.4, passed: bool = True) -> dict[str, Any]:
    checks = [asdict(Check("shop, chat", PASS, "", used=used)), asdict(Check("shape", PASS, ""))]
    told = [{"name": suite.name, "sha256": suite.sha256} for suite in SUITES]
    return {"passed": passed, "checks": checks, "suites": told, "candidate": {"weights_sha256": weights}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "one"
    Model.from_preset("test").save(folder)
    return folder


def version(folder: Path, model: Path, told: Mapping[str, Any] | None) -> Version:
    return Release(folder).add(model, verdict=None if told is None else dict(told))


def test_what_is_taken_is_read_from_the_verdict_of_the_version_and_of_no_other(tmp_path: Path, model: Path) -> None:
    first = version(tmp_path / "first", model, None)
    weights = first.weights
    assert taken(first.served, weights, SUITES) == {}, "nobody judged it"
    known = version(tmp_path / "known", model, verdict(weights))
    assert taken(known.served, weights, SUITES) == {"shop, chat": 0.4}
    assert taken(known.served, weights, [SUITES[0], Suite("recent", "", "c" * 64, RECENT)]) == {"shop, chat": 0.4}
    assert taken(known.served, "other", SUITES) == {}
    assert taken(known.served, weights, [Suite("shop", "shop.jsonl", "c" * 64, FROZEN)]) == {}
    assert taken(known.served, weights, SUITES[1:]) == {}, "of what is new alone nothing is the same"
    assert taken(model, weights, SUITES) == {} and taken(tmp_path / "none" / "served", weights, SUITES) == {}
    forced = version(tmp_path / "forced", model, verdict(weights, passed=False))
    assert taken(forced.served, weights, SUITES) == {}
    bare = version(tmp_path / "bare", model, {"passed": True, "checks": []})
    assert taken(bare.served, weights, SUITES) == {}


@pytest.mark.drill
def test_the_gate_adds_what_the_stable_version_took(
    untimed: None, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.loop.gate.MOST_TOKENS", 8)
    write(tmp_path / "suites" / "shop.jsonl", ASKED[:200], answers(Model.load(model), ASKED[:200]))
    (suite,) = freeze(tmp_path / "suites")
    told = verdict(version(tmp_path / "first", model, None).weights)
    told["suites"] = [{"name": suite.name, "sha256": suite.sha256}]
    stable = version(tmp_path / "known", model, told)
    found = gate(model, stable.served, tmp_path / "suites", need_recent=False)
    used = {check.name: check.used for check in found.checks}
    assert found.passed and used["shop, chat"] == pytest.approx(0.4) and used["tokens an answer"] == pytest.approx(0.0)
    alone = {check.name: check.used for check in gate(model, model, tmp_path / "suites", need_recent=False).checks}
    assert alone["shop, chat"] == pytest.approx(0.0)
