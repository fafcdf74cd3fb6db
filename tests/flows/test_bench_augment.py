"""`shoal bench augment` from two runs to its last line: three arms, each with its seeds, and a teacher served and asked.
Its jobs are done here, one after another, so that what is made smaller is so in them too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal import cli, presets
from shoal.bench import augment
from shoal.bench.augment import Hits, Job
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.suites import freeze
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.recipes import law, medicine
from shoal.recipes.law.licences import Law
from shoal.recipes.medicine.assessments import Medicine
from shoal.recipes.recipe import SUITES, Recipe
from shoal.train.loop import fit
from shoal.train.plan import finetune_plan

# a drill: it serves a teacher twice, in processes that import torch
pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
SMALL = {
    "medicine.assessments": {"LEARNED": 30, "FITTED": 4, "ASKED": 4, "OPEN": 4, "FLAGGED": 4, "REFUSED": 4},
    "law.licences": {"LEARNED": 30, "FITTED": 4, "ASKED": 4, "UNSAID": 2},
}
SEEDS = 3


class Here:
    """In place of a pool of processes."""

    def __init__(self, *given: object, **more: object) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *given: object) -> None: ...

    def map(self, do: Callable[[Job], Hits], jobs: Sequence[Job]) -> Iterator[Hits]:
        return map(do, jobs)


def model(folder: Path, seed: int) -> Path:
    """A model that knows nothing, which reads a letter a token."""
    config = dataclasses.replace(presets.get("test").model, train_length=1280, max_length=2560, image_size=0)
    Model(config, Net(config).init_(seed), Tokenizer.bytes_only(), name="test").save(folder)
    return folder


def begun(recipe: Recipe, folder: Path) -> Path:
    """A run of a recipe with data of a test's size, and a model in place of the one that learns from them."""
    recipe.write(folder, 0)
    freeze(folder / SUITES)
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe.name, "model": ""}))
    model(folder / "model", 0)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned to say "ok" to everything."""
    folder = tmp_path_factory.mktemp("teacher")
    base = model(folder / "base", 1)
    asked = [str(row) for row in range(40)]
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]} for text in asked]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, out = str(folder / "rows.jsonl"), folder / "out"
    fit(
        finetune_plan(
            str(base), data, str(out), steps=80, learning_rate=1e-2, batch_tokens=1280, accumulate=1, eval_every=0
        )
    )
    return out / "model"


def test_of_medicine_and_law_with_a_teacher_it_says_what_each_arm_adds(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for where, counts in SMALL.items():
        for name, count in counts.items():
            monkeypatch.setattr(f"shoal.recipes.{where}.{name}", count)
    monkeypatch.setattr(augment, "TAUGHT_ROWS", 3)
    monkeypatch.setattr(augment, "ProcessPoolExecutor", Here)
    for recipe in (Medicine, Law):
        monkeypatch.setattr(recipe, "most_tokens", 6)
    runs = [begun(recipe, tmp_path / recipe.name) for recipe in (medicine.RECIPE, law.RECIPE)]
    given = [word for run in runs for word in ("--run", str(run), "--teacher", str(teacher))]
    assert cli.main(["bench", "augment", *given, "--seeds", str(SEEDS), "--steps", "1"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told["recipes"]) == ["medicine", "law"] and told["seeds"] == SEEDS
    for one in told["recipes"].values():
        assert one["teacher"] == str(teacher) and one["rows"]["plain"] == 30 and one["rows"]["copies"] > 10
        assert one["rows"]["taught"] == 3, "all questions were answered"
        for suite, arms in one["suites"].items():
            assert "safety" not in suite and arms["answers"] == 4 and 0 <= arms["plain"]["right"] <= 1
            for arm in ("augmented", "taught"):
                low, high = arms[arm]["interval"]
                assert len(arms[arm]["each"]) == SEEDS and low <= arms[arm]["added"] <= high
