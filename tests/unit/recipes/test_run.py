"""A recipe's folder is of the data that it was begun with, and says of its time what it knows."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from shoal.bench.augment import recipe_of
from shoal.errors import DataError, UsageError
from shoal.recipes import report, run
from shoal.recipes.law import RECIPE as LAW
from shoal.recipes.named import named
from shoal.recipes.own import begun
from shoal.recipes.recipe import SUITES, Recipe
from shoal.recipes.run import Asked


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


def test_of_one_s_own_no_synonyms_of_ours_are_taken_whatever_its_name(mine: Path, tmp_path: Path) -> None:
    told(named(str(mine)), tmp_path / "out")
    with pytest.raises(DataError, match="no run of a recipe of ours"):
        recipe_of(tmp_path / "out")
    told(LAW, tmp_path / "ours")
    assert recipe_of(tmp_path / "ours").name == "law"


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
