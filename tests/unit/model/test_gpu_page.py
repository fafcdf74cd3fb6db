"""What `make gpu` measures with, on a CPU: that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.clocks import tells
from tests.gpu import measured

CPU = torch.device("cpu")


TOP = {"device": "a device", "bandwidth": 2e12, "products": 9e14, "able": True}


@pytest.mark.drill
def test_it_measures_and_writes_a_page() -> None:
    decoded = [
        row for model in ("ours", "plain") for row in measured.decoding("test", 2, (40, 20), CPU, 1e9, model, rounds=1)
    ]
    trained = [*measured.training("test", 24, CPU, 1)]
    decoded = measured.beside(decoded)
    assert [[cell.strip() for cell in row.split("|")[1:5]] for row in decoded] == [
        ["test", "2", length, model] for length in ("40", "20") for model in ("ours", "plain")
    ]
    assert [row.split("|")[3].strip() for row in trained] == ["ours", "plain"]
    assert all("%" in row for row in (*decoded, *trained))
    text = measured.page(
        TOP, "1 passed", {"decoding": decoded, "training": trained}, "old\n## Without a GPU\nkept\n", {}
    )
    assert "2,000 GB/s" in text and "900 TFLOP/s" in text and all(row in text for row in (*decoded, *trained))
    assert text.endswith("\n\n## Without a GPU\nkept\n") and "old" not in text and "not measured" not in text
    assert measured.KEPT in measured.PAGE.read_text()
    assert measured.AIMS in text and " ".join(measured.PAGE.read_text().split()).count(measured.AIMS.strip()) == 1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A GPU that is not there, with a page in a folder, and its parts: none runs, and each is kept. Tests say nothing and end
    4; vLLM can be installed, and runs, but not with our model in it; training comes to the end of the time."""
    parts, clock = list[list[str]](), [0.0]

    def part(arguments: list[str], seconds: float, program: str = sys.executable) -> tuple[list[str], int]:
        assert seconds > 0
        run = arguments[2:] if measured.ME[1] in arguments else ["tests"]
        parts.append([program, *arguments] if program == "make" else run)
        kind, *given = parts[-1]
        if kind == "limits":
            return ["a warning", json.dumps(TOP)], 0
        if kind == "training":
            clock[0] += 1e6
        if kind == "decoding" and given[3] == "vllm-shoal":
            return ["peer vllm-shoal ended: got no | memory"], 1
        row = "| " + " | ".join([*given[:2], "1,024", *given[3:4], "1 | 2 | 3 |"])
        return (
            ([row, "Traceback"], -9)
            if kind == "training"
            else ([row], 0)
            if kind == "decoding"
            else ([], 4 * (kind != "make"))
        )

    monkeypatch.setattr(measured, "part", part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tells(monkeypatch, "tests.gpu.measured", monotonic=lambda: clock[0])
    monkeypatch.setattr(measured, "PAGE", tmp_path / "gpu.md")
    measured.PAGE.write_text("old\n## Without a GPU\nkept\n")
    return parts


def test_the_page_is_written_whatever_ends(asked: list[list[str]]) -> None:
    """Tests that say nothing, parts that die, and no time left: what was measured stands there, and all that was not; a peer
    that fails costs nothing else, and is tried once."""
    assert measured.main(60.0, "there") == 1 + 4 + 8, (
        "tests, four parts of training, and eight of ours and the plain GPT after"
    )
    text = measured.PAGE.read_text()
    assert "Tests: they said nothing (ended 4)" in text and text.endswith("kept\n")
    assert "vllm-shoal was not measured: peer vllm-shoal ended: got no / memory (ended 1)\n" in text
    assert "vllm was not measured" not in text
    assert "| 350m | 4,096 | | Traceback (ended -9) | | |" in text and "| 1b | 16,384 | | no time left | | |" in text
    assert "| 1b | 256 | | plain | no time left | | |" in text and text.count("no time left") == 3 + 12
    kinds = [each[0] for each in asked]
    assert kinds == ["limits", "tests", "make", *["decoding"] * 13, "training"]
    assert asked[2] == ["make", "--no-print-directory", "there/.ready"]
    python = str(Path("there/bin/python").absolute())
    assert asked[3:7] == [["decoding", "350m", "1", "2000000000000.0", model, python] for model in measured.MODELS]
    table = [line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| 1b | 8 | 1,024")]
    assert table == ["ours", "plain", "vllm"]


@pytest.mark.drill
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
