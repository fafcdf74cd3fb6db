"""`shoal bench tolerance` with a random model and few chats: that the rows are what was asked, and that nothing spends more."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import tolerance
from benchmarks.commands import bench
from shoal.data.chats.heldout import Question
from shoal.engine.events import Completion, Finished
from shoal.errors import UsageError
from shoal.evaluate.evaluation import TASKS
from shoal.inputs.chat import Encoded
from tests.unit.engine.lively import lively, with_router


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"and now of {number}, or of {number * number + 100}?"},
                {"role": "assistant", "content": "yes"},
            ],
            "task": "customer service",
            "group": f"g{number}",
        }
        for number in range(24)
    ]
    (tmp_path / "sft-heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.mark.drill
def test_each_way_answers_every_batch_size(
    heldout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_router(lively()).save(heldout / "model")
    said, settled = io.StringIO(), list[int]()
    monkeypatch.setattr(tolerance, "settle", lambda: settled.append(1))
    tolerance.tolerance(
        Console(file=said, width=200), model=heldout / "model", data=heldout, batches=(1, 3), tolerances=(0.0, 1.0), prompts=12,
        rounds=1, temperature=0.0,
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    ways = ["full", "shallow", "middle", "router 1", "verified 0", "verified 1", "auto 1"]
    assert [(row["batch"], row["way"]) for row in rows] == [(batch, way) for batch in (1, 3) for way in ways]
    for row in rows:
        assert row["tokens_per_s"]["customer service"] > 0 and set(row["scores"]) == {"customer service"}
        kind, _, allowed = row["way"].partition(" ")
        looked = row["answers"] - row["by_router"] if kind in ("router", "auto") else 12 * (kind == "verified")
        assert row["answers"] == 12 and (looked == 0 if kind == "router" else 0 <= looked <= 12)
        assert (row["spent"] is not None) == (looked > 0)
        if looked:
            assert 0 <= row["spent"] <= row["most_spent"] <= float(allowed)
        assert [len(rates) for rates in row["turns"].values()] == [1], "of each turn that counts"
        (score,), (ends,) = row["scores"].values(), row["intervals"].values()
        assert ends[0] <= score <= ends[1]
        found, whole = (of["cached_tokens"]["customer service"] for of in (row, rows[0]))
        # depth "auto" drafts by its measured pace: a prompt of the turn before may have been answered at another depth
        assert found == whole > 12 * 8 or (kind == "auto" and 0 < found <= whole), (
            f"each prompt of {row['way']}: {found}"
        )
        counts = row["counts"]["customer service"]
        tokens = 12 * 48  # at most
        assert 12 / row["batch"] <= counts["steps"] <= 2 * tokens and counts["steps"] <= counts["rows"]
        assert 0 <= counts["stood"] <= counts["drafts"] and (counts["drafts"] > 0) <= (kind in ("verified", "auto"))
    assert any(row["counts"]["customer service"]["drafts"] for row in rows)
    assert len(settled) == 2 * 2, "before each turn of each batch size"
    depths = {row["way"]: row["mean_depth"] for row in rows if row["batch"] == 1}
    assert (depths["shallow"], depths["middle"], depths["full"]) == (1, 2, 4)
    assert "1 at once, greedy" in said.getvalue() and " of 12" in said.getvalue()


@pytest.mark.drill
def test_answers_of_one_token_have_no_speed_and_all_else_is_told(
    heldout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of image questions where "yes" is one token: a division by 0 ended the run when all was measured."""
    monkeypatch.setitem(TASKS, "customer service", 1)
    lively().save(heldout / "model")
    said = io.StringIO()
    tolerance.tolerance(
        Console(file=said, width=200), model=heldout / "model", data=heldout, batches=(2,), tolerances=(0.0,), prompts=3,
        rounds=1, temperature=0.0,
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["tokens_per_s"] for row in rows] == 4 * [{"customer service": None}]
    assert {row["answers"] for row in rows} == {3} and "2 at once, greedy: scores" in said.getvalue()


def test_a_mean_is_over_the_same_tasks_in_every_way_or_there_is_none() -> None:
    ways = {"full": ([2.0], [0.0], [4.0]), "shallow": ([4.0], [0.0], [4.0]), "mute": ([4.0], [3.0], [0.0])}
    tasks = ["images", "signs", "code"]
    rows = [
        {
            "way": name,
            "turns": dict(zip(tasks, rates, strict=True)),
            "mean_depth": 1.0,
            "spent": None,
            "most_spent": None,
        }
        | {"tokens_per_s": {task: rate or None for task, (rate,) in zip(tasks, rates, strict=True)}, "by_router": None}
        | {"scores": dict.fromkeys(tasks, 0.5), "intervals": dict.fromkeys(tasks)}
        for name, rates in ways.items()
    ]
    speed, _ = tolerance._tables(rows, 1, tasks, 0.0)
    said = list(zip(*(column.cells for column in speed.columns), strict=True))
    assert [cells[1:6] for cells in said] == [
        ("1.00", "-", "1.00", "1.00", "1.00 to 1.00"),
        ("2.00", "-", "1.00", "1.50", "1.50 to 1.50"),
        ("2.00", "-", "-", "-", "-"),
    ]


def test_of_answers_of_depth_auto_it_is_said_how_many_the_router_decided_and_what_the_others_spent() -> None:
    way = tolerance.Way("auto 0.5", "auto", 0.5, None, rates={"customer service": [3.0, 1.0, 2.0]})
    ends = [
        Finished(str(spent), "stop", depth=4, completion_tokens=count, spent=spent, mean_depth=depth)
        for spent, count, depth in ((1.0, 4, 3.0), (None, 10, 1.0), (0.0, 6, 2.0))
    ]
    way.answers["customer service"] = [Completion([7] * end.completion_tokens, "yes", finished=end) for end in ends]
    asked = [Question(Encoded([7]), Encoded([7]), "yes", "customer service", group) for group in (0, 1, 2)]
    row = tolerance._row(way, 1, {"customer service": asked})
    assert (row["answers"], row["by_router"], row["spent"], row["most_spent"]) == (3, 1, 0.1, 0.25)
    assert row["mean_depth"] == pytest.approx((4 * 3 + 10 * 1 + 6 * 2) / 20)
    assert row["tokens_per_s"] == {"customer service": 2.0}
    full = {"turns": {"customer service": [2.0, 1.0, 1.0]}}
    assert tolerance._spread(row, full, ["customer service"]) == (1.0, 2.0)


def test_what_cannot_be_measured_is_said_in_a_line(tmp_path: Path) -> None:
    lively().save(tmp_path / "model")
    with pytest.raises(UsageError, match="--data"):
        tolerance.tolerance(
            Console(), model=tmp_path / "model", data=tmp_path, batches=(1,), tolerances=(0.1,), prompts=4, rounds=1,
            temperature=0.0,
        )  # fmt: skip


@pytest.mark.parametrize("option", ["--rounds", "--prompts"])
def test_nothing_is_run_where_nothing_would_be_counted(option: str, tmp_path: Path) -> None:
    """Else a run of a quarter of an hour ends without a figure."""
    for value in ("0", "-1"):
        found = CliRunner().invoke(bench, ["tolerance", "--model", "none", "--data", str(tmp_path), option, value])
        assert isinstance(found.exception, UsageError), found.output
        assert str(found.exception) == f"{option}: got {value}; allowed: 1 or more"


def test_memory_follows_from_what_is_asked_and_not_from_the_context() -> None:
    """Fourteen engines live side by side, and of a context of 8,192 tokens they would not fit a laptop."""
    asked: Any = {"code": [SimpleNamespace(prompt=Encoded([9] * 10))] * 2, "customer service": []}
    assert TASKS["code"] == 110
    for context in (128, 8192):
        model: Any = SimpleNamespace(config=SimpleNamespace(page=16, context=context))
        # a page of each prompt, seven of an answer in each of two turns; three at once, of eight each; in four groups
        assert tolerance._units(model, asked, 3, 1) == 1 + 4 * (2 * (1 + 2 * 7) + 3 * 8)
