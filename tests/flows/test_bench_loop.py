"""The short form of `shoal bench loop`: a candidate's way under traffic, bad canaries, bad candidates, with models that say
nonsense. Detection, retraining and the gate have tests of their own (unit/loop, flows/test_retrain.py)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from shoal import Model, presets
from shoal.bench import loop_refuse, loop_serve, loop_teach
from shoal.bench.loop_service import Crashing
from shoal.bench.loop_shop import NEW_ITEMS, Asked, known, questions
from shoal.cli import main
from shoal.engine.front import AsyncEngine
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.release import Release
from shoal.model.router import fit_router
from tests.corpus import write_corpus
from tests.unit.engine.lively import lively


def silent(line: str) -> None:
    """What a person would read."""


def test_the_right_answers_are_of_the_questions_that_are_asked() -> None:
    for domain in ("old", "catalogue"):
        every = known(domain)
        assert sorted(one.text for one in every) == sorted(questions(domain))
        assert all("{item}" not in one.text + one.answer and "{item}" in one.phrasing for one in every)
    assert all(any(item in one.answer or "colleague" in one.answer or "other one" in one.answer for item in NEW_ITEMS)
               or "item" not in one.phrasing for one in known("catalogue"))  # fmt: skip


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_candidate_goes_up_and_back_and_bad_ones_are_taken_back_and_no_client_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By few requests a step; a busy machine makes no answer slow."""
    for name, value in (("loop.canary.SLOW", 1000.0), ("api.follow.LOOK_SECONDS", 0.05)):
        monkeypatch.setattr(f"shoal.{name}", value)
    for name, value in (("LEAST", 120), ("MOST", 6_000), ("TIMED", 24), ("BACK", 8)):
        monkeypatch.setattr(loop_serve, name, value)
    monkeypatch.setattr("shoal.bench.loop_service.TOKENS", 6)
    lively().save(tmp_path / "model")
    release = Release(tmp_path / "release")
    release.add(tmp_path / "model")
    bad: dict[str, type[AsyncEngine]] = {"NaN": AsyncEngine, "crash": Crashing}
    found = asyncio.run(loop_serve.serve(release, tmp_path, silent, enough=4, bad=bad))
    assert found["promoted"] and found["rolled_back"] and found["faults"] == {}
    assert found["requests"] >= 120 and found["whole"] == found["requests"] and release.state().stable == 1
    assert set(found["bad"]) == {"NaN", "crash"}
    for one in found["bad"].values():
        assert one["taken_back"] and one["not_whole"] == 0, one
        assert one["canary_requests"] is None or one["canary_requests"] <= 20
    what = [entry["what"] for entry in release.audit.entries()]
    assert what.count("promote") == 1 and what.count("rollback") == 3 and found["audit_lines"] <= len(what)
    assert loop_serve.shown(found).row_count == 5


def few(domain: str, seed: int = 0) -> list[Asked]:
    """Questions that fit a row of the smallest model."""
    of = "old" if domain == "old" else "new"
    return [Asked(f"{of} {number}?", f"shelf {number % 7}", f"{of} {number % 9}") for number in range(70)]


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_each_of_ten_bad_candidates_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model that is right in nothing: it says so of what is broken or of another kind, and of all that they are no
    better; of none that it is without a router."""
    preset = presets.get("test")
    data = write_corpus(tmp_path / "data", preset)
    model = Model.from_preset("test")
    model.tokenizer = Tokenizer.load(data / "tokenizer.json")
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(40, 2 * model.config.width + 3, generator=draws)
    model.router = fit_router(model.config, features, torch.rand(40, 2, generator=draws))
    model.save(tmp_path / "model")
    monkeypatch.setattr(loop_refuse, "shuffled", few)
    for name, value in (("NEW", 20), ("OLD", 20), ("FROZEN", 45), ("RECENT", 20)):
        monkeypatch.setattr(loop_refuse, name, value)
    monkeypatch.setattr("shoal.loop.gate.MOST_TOKENS", 4)
    monkeypatch.setattr("shoal.loop.gate.TASKS", {})
    monkeypatch.setattr("shoal.loop.costs.ROUNDS", (1, 1))
    found = loop_refuse.refuse(tmp_path / "model", data, tmp_path / "work", silent, steps=1)
    assert len(found) == 10 and not any(one["passed"] for one in found.values())
    kinds = ("another tokenizer", "another shape", "another chat template")
    assert all(found[kind] == {"verdict": "refused", "passed": False, "not_passed": ["shape"]} for kind in kinds)
    assert "bits per byte, text" in found["broken weights"]["not_passed"]
    assert any(name.startswith("recent") for name in found["no better at anything"]["not_passed"])
    assert not any("router" in one["not_passed"] for one in found.values()), (
        "each has one: it is refused for what it is"
    )
    assert loop_refuse.shown(found).row_count == 10


def test_wrong_labels_are_of_other_questions_and_as_many_as_asked_for() -> None:
    rows = few("old")
    wrong = loop_refuse._wrong(rows, 0.5)
    changed = sum(one.answer != other.answer for one, other in zip(rows, wrong, strict=True))
    assert [one.text for one in wrong] == [one.text for one in rows] and 15 < changed < 45
    assert sorted(one.answer for one in wrong) == sorted(one.answer for one in rows)


def test_a_score_is_the_share_that_is_exactly_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.from_preset("test")
    monkeypatch.setattr(loop_teach, "ANSWER", 4)
    loop_teach.write(tmp_path / "held.jsonl", few("old")[:12])
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert loop_teach.score(model, tmp_path / "held.jsonl") == {
        "exact": 0.0,
        "interval": [0.0, pytest.approx(0.3, abs=0.2)],
        "questions": 12,
    }
    assert {row["group"] for row in rows} == {one.phrasing for one in few("old")[:12]}


@pytest.mark.parametrize(
    ("more", "said"), [(["--parts", "all"], "--parts"), (["--parts", ","], "--parts"), (["--parts", "teach"], "--fp32")]
)
def test_parts_that_cannot_be_are_refused(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "loop", "--model", str(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err
