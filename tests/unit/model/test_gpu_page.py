"""What `make gpu` measures with, on a CPU: that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.bench.mfu import mfu
from tests.gpu import measured

CPU = torch.device("cpu")


def test_it_measures_and_writes_a_page() -> None:
    took, must = measured.decoding("test", 2, 40, CPU, rounds=1)
    assert took > 0 and must > 0
    rows = [measured.trained(row) for row in mfu(("test",), (24,), CPU, 1)[1]]
    assert [row.split("|")[3].strip() for row in rows] == ["ours", "plain"] and all("%" in row for row in rows)
    text = measured.page("a device", "1 passed", (2e12, 9e14), ["| 1b | 1 | 1,024 |"], rows)
    assert "2,000 GB/s" in text and "900 TFLOP/s" in text and "| 1b | 1 | 1,024 |" in text and rows[0] in text


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
