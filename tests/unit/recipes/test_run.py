"""A recipe's folder is of the data that it was begun with, and says of its time what it knows."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from recipes import report, run
from recipes.customer_service.conversations import conversations, seed_of
from recipes.law import RECIPE as LAW
from recipes.named import named
from recipes.own import begun
from recipes.recipe import SUITES, Recipe
from recipes.run import Asked
from recipes.splits import SUITE
from shoal import presets
from shoal.errors import DataError, UsageError
from shoal.loop.suites import freeze
from shoal.machine import sha256_of

LEARN = run._learn  # as it is, before `breaks`


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A recipe of a user's own, that has the name of one of ours."""
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(80)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun(tmp_path / "rows.jsonl", tmp_path / "law")
    return tmp_path / "law"


@pytest.fixture(autouse=True)
def breaks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that leave their results alone; those of its names are broken off, once each."""
    left: list[str] = []

    def step(name: str, result: str, more: dict[str, Any] | None = None) -> Any:
        def made(recipe: Recipe, folder: Path, *_: Any) -> None:
            if name in left:
                left.remove(name)
                raise KeyboardInterrupt
            path = folder / result
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(run._took(folder, 1.0) if name == "_evaluate" else {}))

        return made

    results = {"_data": f"{SUITES}/suites.json", "_learn": "model/config.json", "_quantize": "int8/config.json"}
    for name, result in {**results, "_evaluate": run.REPORT}.items():
        monkeypatch.setattr(run, name, step(name, result))
    monkeypatch.setattr("shoal.on_ray.resources.local_ray", contextlib.nullcontext)
    return left


def told(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return run.run(recipe, folder, Asked(1.0), lambda *_: None, lambda _: None)


def test_other_rows_or_settings_of_one_s_own_are_another_run(mine: Path, tmp_path: Path) -> None:
    """The rows that were added were in no model, and the old report was shown as theirs."""
    assert told(named(str(mine)), tmp_path / "out") == told(named(str(mine)), tmp_path / "out")
    for name, text in (
        ("learn.jsonl", (mine / "learn.jsonl").read_text() * 2),
        ("recipe.yaml", (mine / "recipe.yaml").read_text() + "# x\n"),
    ):
        before = (mine / name).read_text()
        (mine / name).write_text(text)
        with pytest.raises(DataError, match="begun with other settings"):
            told(named(str(mine)), tmp_path / "out")
        (mine / name).write_text(before)
    assert told(named(str(mine)), tmp_path / "out")["seconds"]
    with pytest.raises(DataError, match="begun with other settings"):
        told(LAW, tmp_path / "out")


def test_a_run_in_the_folder_of_one_s_own_data_is_refused_before_it_writes_there(mine: Path) -> None:
    before = sorted(path.name for path in mine.iterdir())
    with pytest.raises(UsageError, match="own data lie"):
        told(named(str(mine)), mine)
    assert sorted(path.name for path in mine.iterdir()) == before


@pytest.mark.parametrize(
    ("broken", "known"),
    [([], True), (["_data", "_evaluate"], True), (["_learn"], False), (["_quantize", "_learn"], False)],
)
def test_what_was_broken_off_has_no_time_from_an_empty_folder(
    breaks: list[str], tmp_path: Path, broken: list[str], known: bool
) -> None:
    """What learning took before is lost, and the rest of it was told as all. Data and evaluation begin anew."""
    breaks += broken
    for _ in broken:
        with pytest.raises(KeyboardInterrupt):
            told(LAW, tmp_path)
    found = told(LAW, tmp_path)
    (sentence,) = report._took(found)
    assert ("From an empty folder" in sentence) == known and list(found["seconds"])[-1] == "evaluate"
    assert found["broken_off"] == [name.strip("_") for name in ("_learn", "_quantize") if name in broken]
    assert all(name in sentence for name in found["broken_off"])


def test_a_folder_in_which_something_else_lies_is_left_as_it_is(tmp_path: Path) -> None:
    """Its learn.jsonl was written over, and its model reported as the recipe's."""
    for name, text in (("learn.jsonl", "mine\n"), ("model/config.json", "{}")):
        there = tmp_path / name.partition(".")[0].replace("/", "-") / name
        there.parent.mkdir(parents=True)
        there.write_text(text)
        folder = tmp_path / name.partition(".")[0].replace("/", "-")
        with pytest.raises(UsageError, match=r"in which (learn.jsonl|model) lies.*empty folder"):
            told(LAW, folder)
        assert there.read_text() == text and [path.name for path in folder.iterdir()] == [name.partition("/")[0]]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".nfs").write_text("")  # of a file system, and nobody's
    assert told(LAW, tmp_path / "new")["seconds"]


def test_what_is_made_anew_is_not_shown_with_the_figures_of_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model that was learned anew had the INT8 one and the report of the one before."""
    told(LAW, tmp_path)
    for gone, anew, kept in (
        ("int8", ["quantize", "evaluate"], []),
        ("model", ["learn", "quantize", "evaluate"], []),
        (SUITES, ["data", "evaluate"], ["model", "int8"]),
        ("report.json", ["evaluate"], [SUITES, "model", "int8"]),
    ):
        made = {name: (tmp_path / name).stat().st_ino for name in kept}
        run._take_away(tmp_path / gone)
        said: list[str] = []
        run.run(LAW, tmp_path, Asked(1.0), lambda *_: None, said.append)
        assert [line.partition(":")[0] for line in said if "done before" not in line] == anew
        assert {name: (tmp_path / name).stat().st_ino for name in kept} == made


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run from fresh weights that is done, and an imported model."""
    told(LAW, tmp_path / "done")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "source.json").write_text("{}")
    for name in ("model", "int8"):
        (tmp_path / "done" / name / "model.safetensors").write_bytes(name.encode())
    monkeypatch.setattr("shoal.model.described.read_config", lambda _: ("smol", presets.get("test").model))
    monkeypatch.setattr(run, "_evaluate", _reports)
    return tmp_path / "done"


def _reports(_: Recipe, folder: Path, asked: Asked, *__: Any) -> None:
    told = {"asked": {"beside": asked.beside}, "beside_sha256": run._beside(asked)}
    (folder / run.REPORT).write_text(json.dumps(told))


def test_a_run_beside_it_that_is_another_one_by_now_has_a_new_report(beside: Path, tmp_path: Path) -> None:
    """The folder's name was all that was looked at: the figures of the run that had been there stood as this one's."""
    asked = Asked(1.0, model=str(tmp_path / "open"), beside=str(beside))

    def again() -> list[str]:
        said: list[str] = []
        run.run(LAW, tmp_path / "out", asked, lambda *_: None, said.append)
        return [line for line in said if line.startswith("evaluate: done before")]

    assert not again() and again()
    (beside / "int8" / "model.safetensors").write_bytes(b"another")
    assert not again() and again()


def test_what_cannot_stand_beside_is_refused_before_it_is_learned_from(
    beside: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Suites were compared after minutes of learning, rows to learn from never; without its model it ended in a traceback."""
    told(named(str(mine)), tmp_path / "own")
    with (mine / "learn.jsonl").open("a") as rows:
        rows.write(json.dumps({"messages": []}) + "\n")
    asked = Asked(1.0, model=str(tmp_path / "open"), beside=str(tmp_path / "own"))
    with pytest.raises(UsageError, match="these data"):
        run.run(named(str(mine)), tmp_path / "x", asked, lambda *_: None, lambda _: None)
    asked = Asked(1.0, model=str(tmp_path / "open"), beside=str(beside))
    monkeypatch.setattr(run, "_fit", lambda *_: pytest.fail("it learned"))
    for folder, text in ((tmp_path / "y", "a"), (beside, "b")):
        run._take_away(folder / SUITES)
        (folder / SUITES).mkdir(parents=True)
        (folder / SUITES / "asked.jsonl").write_text(text)
        freeze(folder / SUITES)
    with pytest.raises(DataError, match="asks other suites"):
        LEARN(LAW, tmp_path / "y", asked, lambda *_: None, lambda _: None)
    run._take_away(beside / "model")
    with pytest.raises(UsageError, match="that is done"):
        run.run(LAW, tmp_path / "z", asked, lambda *_: None, lambda _: None)


def test_the_report_has_the_digests_of_what_was_learned_from_and_not_of_what_lies_there_by_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data that were made anew by a later version were told as those of the model."""

    def fit(plan: Any, *_: Any) -> None:
        model = Path(plan) / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")

    monkeypatch.setattr(run, "_fit", fit)
    monkeypatch.setattr(run, "_plan", lambda base, data, out, *_, **__: out)
    monkeypatch.setattr(run, "_fresh", lambda *_: tmp_path)
    monkeypatch.setattr("shoal.evaluate.routing.finish", lambda *_: None)
    for lesson in LAW.lessons:
        (tmp_path / lesson.file).write_text(f"{lesson.file}\n")
    LEARN(LAW, tmp_path, Asked(1.0), lambda *_: None, lambda _: None)
    wanted = {lesson.file: sha256_of(tmp_path / lesson.file) for lesson in LAW.lessons}
    for lesson in LAW.lessons:
        (tmp_path / lesson.file).write_text("others\n")
    assert json.loads((tmp_path / run.LEARNED).read_text()) == wanted


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_names_no_conversation_is_refused_before_anything_is_made(tmp_path: Path, seed: int) -> None:
    """Of -1 the conversations were learned, and at the end not played: their names do not say it."""
    with pytest.raises(UsageError, match="--seed"):
        run.run(LAW, tmp_path / "x", Asked(1.0, seed=seed), lambda *_: None, lambda _: None)
    assert not (tmp_path / "x").exists()
    (one,) = conversations(SUITE, SUITE, 1, 2**63 - 1)
    assert seed_of(one.name) == 2**63 - 1
