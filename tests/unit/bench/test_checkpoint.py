"""`shoal bench checkpoint` and the sizes of `shoal bench data`, tiny: that what they print was measured, and adds up."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from shoal.bench.checkpoint import checkpoint
from shoal.bench.data import data
from shoal.cli import main
from shoal.errors import UsageError
from shoal.train.run import SHARE


def test_checkpoints_beside_training(capsys: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    checkpoint(Console(file=said, width=200), preset="test", tokens=768, every=0.05, rounds=3, threads=1)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1.2e6 < told["bytes"] < 1.6e6, "fp32 weights and two moments of 0.11 M parameters"
    assert told["updates"] >= 2 and told["every_s"] == 0.05
    assert 0 < told["stalled_s"] <= told["took_s"] <= told["with_s"]
    low, high = told["slowed_interval"]
    assert low <= told["slowed"] <= high
    assert told["apart_s"] >= max(0.05, told["stalled_s"] / SHARE)
    assert "a checkpoint every 0.05 s" in said.getvalue() and f"for at most {SHARE:.0%}" in said.getvalue()


def test_no_size_is_begun_that_does_not_fit_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    console = Console(file=said, width=200)
    data(console, preset="test", sizes=(1, 2, 10_000), rounds=1, parts=("size",), seconds=3600)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [round(row["mb"]) for row in told["size"]] == [1, 2] and told.keys() >= {"bench", "size", "machine"}
    assert all(row["s_per_mb"] == row["cpu_seconds"] / row["mb"] > 0 for row in told["size"])
    assert "not begun" in said.getvalue() and "CPU s/MB times" in said.getvalue()
    with pytest.raises(UsageError, match="--parts"):
        data(console, preset="test", sizes=(1,), rounds=1, parts=("sizes",))


@pytest.mark.parametrize("given", ["checkpoint --every 0", "checkpoint --rounds 0", "data --sizes 0", "data --sizes a"])
def test_what_cannot_be_measured_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given.split()]) == 2
    assert "got" in capsys.readouterr().err
