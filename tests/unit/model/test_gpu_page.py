"""What `make gpu` measures with, on a CPU: that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import measured

CPU = torch.device("cpu")


TOP = {"device": "a device", "bandwidth": 2e12, "products": 9e14, "able": True}


def test_it_measures_and_writes_a_page() -> None:
    decoded = [*measured.decoding("test", 2, (40, 20), CPU, 1e9, rounds=1)]
    trained = [*measured.training("test", 24, CPU, 1)]
    assert [row.split("|")[1:4] for row in decoded] == [[" test ", " 2 ", " 40 "], [" test ", " 2 ", " 20 "]]
    assert [row.split("|")[3].strip() for row in trained] == ["ours", "plain"]
    assert all("%" in row for row in (*decoded, *trained))
    text = measured.page(TOP, "1 passed", {"decoding": decoded, "training": trained}, "old\n## Without a GPU\nkept\n")
    assert "2,000 GB/s" in text and "900 TFLOP/s" in text and all(row in text for row in (*decoded, *trained))
    assert text.endswith("\n\n## Without a GPU\nkept\n") and "old" not in text
    assert measured.KEPT in measured.PAGE.read_text()


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measured, "step_seconds", full)
    assert [*measured.decoding("test", 2, (40,), CPU, 1e9)] == ["| test | 2 | 40 | does not fit | | |"]
    monkeypatch.setattr("shoal.bench.mfu.update", full)
    assert next(measured.training("test", 24, CPU, 1)) == "| test | 24 | ours, recomputed | does not fit | |  |"


def test_a_part_that_fails_or_hangs_leaves_what_it_said() -> None:
    """Also where a process of its own keeps the pipe open; a busy machine may end it before it has said a word."""
    assert measured.part(["-c", "print('| 1 |'); raise SystemExit(3)"], 60.0) == (["| 1 |"], 3)
    hangs = "import subprocess, sys; print('| 2 |', flush=True); subprocess.run([sys.executable, '-c', 'input()'])"
    lines, ended = measured.part(["-c", hangs.replace("input()", "import time; time.sleep(600)")], 3.0)
    assert lines in (["| 2 |"], []) and ended < 0


def test_the_page_is_written_whatever_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests that say nothing, parts that die, and no time left: what was measured stands there, and all that was not."""
    asked = list[str]()

    def part(arguments: list[str], seconds: float) -> tuple[list[str], int]:
        kind = arguments[2] if "tests.gpu.measured" in arguments else "tests"
        asked.append(kind)
        assert seconds > 0
        if kind == "limits":
            return ["a warning", json.dumps(TOP)], 0
        if kind == "training":
            clock[0] += 1e6
        return (["| row |", "Traceback"], -9) if kind in ("decoding", "training") else ([], 4)

    clock = [0.0]
    monkeypatch.setattr(measured, "part", part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(measured, "PAGE", tmp_path / "gpu.md")
    measured.PAGE.write_text("old\n## Without a GPU\nkept\n")
    assert measured.main(60.0) == 1 + 8 + 4
    text = measured.PAGE.read_text()
    assert "Tests: they said nothing (ended 4)" in text and text.count("| row |") == 9 and text.endswith("kept\n")
    assert "| 1b | 256 | ended -9 |" in text and text.count("no time left") == 3
    assert asked == ["limits", "tests", *["decoding"] * 8, "training"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_changes_nothing() -> None:
    before = measured.PAGE.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.measured"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert measured.PAGE.read_text() == before
