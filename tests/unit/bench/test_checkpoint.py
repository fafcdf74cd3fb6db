"""`shoal bench checkpoint` and the sizes of `shoal bench data`, tiny: that what they print was measured, and adds up."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from itertools import combinations, cycle, islice

import pytest
from rich.console import Console

from benchmarks import train
from benchmarks.checkpoint import _Turns, checkpoint
from benchmarks.data import _RUNS, STEPS, _drawn, _files, data
from shoal.cli import main
from shoal.data.operators.grams import words
from shoal.data.operators.near import nearly_equal
from shoal.errors import UsageError
from shoal.train.run import SHARE


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the standard library that is trained on; what is prepared of it is none of these."""
    monkeypatch.setattr(train, "SAMPLE", 20_000)
    monkeypatch.setattr(train, "ROWS", 40)


def test_checkpoints_beside_training(capsys: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    checkpoint(Console(file=said, width=200), preset="test", every=0.05, rounds=3, seconds=600, threads=1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rounds"] == 3 <= told["wanted"], "no more than were allowed"
    assert told["batch_tokens"] == 96 and told["load_before"] >= 0, "a row, and what the machine did before"
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("load ") and "before; preparing" in lines[0]
    assert "an update takes" in lines[1] and [line.split(":")[0] for line in lines[2:5]] == [
        "pair 1",
        "pair 2",
        "pair 3",
    ]
    assert 1.2e6 < told["bytes"] < 1.6e6, "fp32 weights and two moments of 0.11 M parameters"
    assert told["updates"] >= 2 and told["every_s"] == 0.05
    assert 0 < told["stalled_s"] <= told["took_s"] <= told["with_s"]
    assert told["slowed_interval"] is None and "too few: 3 groups" in said.getvalue(), "three pairs have none"
    assert told["apart_s"] >= max(0.05, told["stalled_s"] / SHARE)
    assert "a checkpoint every 0.05 s" in said.getvalue() and f"for at most {SHARE:.0%}" in said.getvalue()


def test_checkpoints_are_measured_no_longer_than_they_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    """It had printed nothing in eight minutes: nine pairs and one more, however long a pair took."""
    said = io.StringIO()
    checkpoint(Console(file=said, width=200), preset="test", tokens=768, every=0.05, rounds=9, seconds=1e-3, threads=1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rounds"] == 1 and told["slowed_interval"] is None
    assert "no more pairs: another would not end in time" in said.getvalue()


def test_as_many_pairs_are_measured_as_their_spread_asks_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five where checkpoints cost the same each time; else as many as bring the median's interval to 1 % to either side."""
    whole = cache(_Turns._beside)  # one checkpoint of a run is saved
    monkeypatch.setattr(_Turns, "_train", lambda turns, updates: 1.0)
    for spread, pairs in ((0.0, 5), (0.005, 5), (0.01, 7)):
        costs = cycle([0.0, spread, -spread])

        def beside(turns: _Turns, costs: Iterator[float] = costs) -> tuple[float, object]:
            return 1.0 + turns._every * next(costs), whole(turns)[1]

        monkeypatch.setattr(_Turns, "_beside", beside)
        checkpoint(Console(file=io.StringIO()), preset="test", tokens=768, every=0.5, rounds=9, seconds=600, threads=1)
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["rounds"] == told["wanted"] == pairs, spread


@pytest.mark.drill
@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
def test_no_size_is_begun_that_does_not_fit_the_time(
    apart: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`apart`: of whole megabytes, each in a process of its own; else of halves of one, in this process."""
    if not apart:
        monkeypatch.setattr("benchmarks.data.MB", 500_000)
        monkeypatch.setattr("benchmarks.data._child", lambda what, *given: _RUNS[what](*given))
    said = io.StringIO()
    console = Console(file=said, width=200)
    seconds = 3600 if apart else 60
    data(console, preset="test", sizes=(1, 2, 10_000), rounds=1, parts=("size",), seconds=seconds)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [round(row["mb"]) for row in told["size"]] == [1, 2] and told.keys() >= {"bench", "size", "machine"}
    assert all(row["s_per_mb"] == row["cpu_seconds"] / row["mb"] for row in told["size"])
    assert all(sum(row[step] for step in STEPS) == pytest.approx(row["cpu_seconds"]) for row in told["size"])
    assert all(row[step] > 0 for row in told["size"] for step in STEPS)
    assert all(row["dropped"] < 0.02 for row in told["size"]), "what is dropped is not packed, and costs less"
    lines = said.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["1 MB", "2 MB", "10000 MB"] and "CPU s/MB, peak" in lines[0]
    assert "not begun" in said.getvalue() and "CPU s/MB times" in said.getvalue()
    with pytest.raises(UsageError, match="--parts"):
        data(console, preset="test", sizes=(1,), rounds=1, parts=("sizes",))


@pytest.mark.drill
def test_of_what_is_drawn_from_the_standard_library_no_text_is_nearly_another() -> None:
    some = [words(text) for text in islice(_drawn(list(_files())), 40)]
    assert len(some) == 40 and not any(nearly_equal(one, other) for one, other in combinations(some, 2))


@pytest.mark.parametrize(
    "given",
    [
        "checkpoint --every 0",
        "checkpoint --tokens 0",
        "checkpoint --rounds 0",
        "checkpoint --seconds 0",
        "data --seconds 0",
        "data --sizes 0",
        "data --sizes a",
    ],
)
def test_what_cannot_be_measured_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given.split()]) == 2
    assert "got" in capsys.readouterr().err
