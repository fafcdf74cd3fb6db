"""`shoal bench decode` with the same checkpoint in both engines, in turns."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(180)
def test_both_engines_decode_one_checkpoint_in_turns_and_the_ratio_is_printed() -> None:
    command = [
        sys.executable,
        "-m",
        "shoal.cli",
        "bench",
        "decode",
        "--parts",
        "speed",
        "--batches",
        "2",
        "--tokens",
        "4",
    ]
    command += ["--rounds", "1", "--peer", f"vllm-shoal={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.strip().splitlines()
    assert any("x vllm-shoal" in line for line in table)
    rows = {(row["what"], row["depth"]): row for row in json.loads(last)["speed"]}
    ours, theirs = rows["fp32", "full"], rows["vllm-shoal", "full"]
    assert ours["tokens_per_s"] > 0 and theirs["tokens_per_s"] > 0
    assert ours["ratios"]["vllm-shoal"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"])
