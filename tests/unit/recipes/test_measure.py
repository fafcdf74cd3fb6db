"""What a run's report says of two models does not depend on where they were asked; `shoal bench recipes` reads it back."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from recipes import measure
from recipes.named import named
from recipes.own import begun
from recipes.recipe import SUITES, Recipe
from recipes.run import REPORT
from shoal import cli
from shoal.config import FULL
from shoal.engine.engine import Engine
from shoal.errors import DataError, ResourceError
from shoal.evaluate import pieces
from shoal.evaluate.pieces import Models, Piece
from shoal.loop import suites
from shoal.machine import cores
from shoal.model.model import Model
from tests.unit.evaluate.test_pieces import far


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own recipe, as far as data go, and two models that know nothing."""
    folder = tmp_path_factory.mktemp("own")
    asked = [{"role": "user", "content": f"What is {n}?"} for n in range(80)]
    rows = [{"messages": [one, {"role": "assistant", "content": f"It is {n}."}]} for n, one in enumerate(asked)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun(folder / "rows.jsonl", folder / "mine")
    recipe = named(str(folder / "mine"))
    recipe.write(folder / "run", 0)
    suites.freeze(folder / "run" / SUITES, recipe.most_tokens)
    for label in ("model", "int8"):
        Model.from_preset("test").save(folder / "run" / label)
    return folder / "run"


def recipe_of(run: Path) -> Recipe:
    return named(str(run.parent / "mine"))


def told(run: Path, how: Any) -> dict[str, Any]:
    models = {"fp32": run / "model", "int8": run / "int8"}
    return measure.measured(recipe_of(run), models, run, 0, lambda *_: None, run=how)


@pytest.mark.drill
@pytest.mark.parametrize("apart", [False, True], ids=["pickled", "apart"])
def test_a_report_is_the_same_from_processes_beside(run: Path, apart: bool) -> None:
    """`apart`: from two, which each import torch; else each piece is told and gives what one of them would."""
    there = pieces.beside(2) if apart else far
    one, two = (json.loads(json.dumps(told(run, how))) for how in (pieces.here, there))
    assert list(one["suites"]["asked"]) == ["majority", "keyword rule", "nearest", "fp32", "int8"]
    assert [(row["model"], row["depth"]) for row in one["depths"]] == [
        (model, depth) for model in ("fp32", "int8") for depth in ("shallow", "middle", "full")
    ]
    assert (
        "calibration error" in one["suites"]["asked"]["int8"]
        and "calibration error" not in one["suites"]["asked"]["nearest"]
    )
    differ = {key for key in one if one[key] != two[key]}
    assert differ <= {"machine", "costs"} and one["costs"].keys() == two["costs"].keys() == {"fp32", "int8"}
    assert suites.read(run / SUITES)[0].most_tokens == recipe_of(run).most_tokens


def test_a_recipe_of_one_s_own_stands_in_the_table_of_recipes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever its folder is by now: what leads is in the report."""
    (run / REPORT).write_text(json.dumps(told(run, pieces.here)))
    assert cli.main(["bench", "recipes", "--run", str(run)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| mine, asked: exact; overlap | 0 %; ") and table[3].startswith(
        "| mine: MB; tokens a second"
    )
    assert table[5].endswith(" | model alone | rule alone | both | run |")
    assert table[7].startswith("| mine, asked: exact; overlap | 0 %; ") and "not known" not in table[7]


def test_depths_that_share_what_was_read_say_what_each_says_alone(run: Path) -> None:
    recipe, model = recipe_of(run), Model.load(run / "model")
    asked = [row["messages"][:-1] for row in measure.rows_of(run)["asked"]]
    engine = Engine(model)
    for depth in (FULL, "middle", "shallow"):
        shared, alone = (measure.ByEngine(model, depth, recipe, [], engine=each) for each in (engine, None))
        assert shared(asked) == alone(asked) and shared.sure == pytest.approx(alone.sure), depth


def test_turns_of_a_conversation_are_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn went first, and the others beside it read it again: of thirty answers of SmolLM2 half of all prompts."""
    recipe, model = recipe_of(run), Model.load(run / "model")
    words = [{"role": ("user", "assistant")[at % 2], "content": f"{at} and so on, " * 3} for at in range(5)]
    talks = [[{"role": "system", "content": f"You are {n}."}, *words] for n in range(4)]
    turns = [talk[:end] for talk in talks for end in (2, 4, 6)]
    engine, read = Engine(model, max_batch_tokens=64, max_batch=16), list[int]()
    ran = engine.runner.run

    def counted(plan: Any) -> Any:
        read.append(sum(work.count for work in plan.works if not work.running.decoding))
        return ran(plan)

    monkeypatch.setattr(engine.runner, "run", counted)
    by = measure.ByEngine(model, FULL, recipe, [], engine=engine)
    said = by(turns)
    lengths = [answer.prompt for answer in by.heard if answer is not None]
    longest = sum(lengths[2::3])
    assert len(lengths) == len(turns) and longest <= sum(read) < 1.15 * longest < sum(lengths)
    alone = measure.ByEngine(model, FULL, recipe, [])
    assert [alone([turn])[0] for turn in turns] == said, "each has its own answer"


def _fails(models: Models) -> None:
    raise DataError("it cannot be asked", do="mend it")


def _dies(models: Models) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.drill
@pytest.mark.skipif(cores() < 2, reason="one core")
def test_what_goes_wrong_beside_is_said_here() -> None:
    with pytest.raises(DataError, match="it cannot be asked"):
        list(pieces.beside(2)([Piece(_fails), Piece(_fails)]))
    with pytest.raises(ResourceError, match="a process that measures died"):
        list(pieces.beside(2)([Piece(_dies), Piece(_dies)]))


def _answers(models: Models) -> str:
    return "said"


def _lasts(models: Models, ended: Path) -> None:
    time.sleep(100)  # longer than any process takes to begin: it is ended before
    ended.touch()


@pytest.mark.drill
@pytest.mark.skipif(cores() < 2, reason="one core")
def test_who_waits_no_longer_waits_for_no_piece(tmp_path: Path) -> None:
    """A pool ends what was begun, and begins what lies in its queue: of a recipe minutes, after Ctrl-C as well."""
    lasts = Piece(_lasts, (tmp_path / "ended",))
    with pytest.raises(DataError, match="it cannot be asked"):
        list(pieces.beside(2)([lasts, Piece(_fails), lasts]))  # whose turn comes first
    some = iter(pieces.beside(2)([Piece(_answers), lasts, lasts]))
    assert next(some) == "said"
    with pytest.raises(KeyboardInterrupt):
        some.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert not (tmp_path / "ended").exists()
