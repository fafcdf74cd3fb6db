"""Every kernel becomes machine code for the GPUs that people have, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BEFORE, AFTER = ["_norm", "_store"], ["_norm", "_swiglu"]
TRAINING = ["_near", "_rate", "_pick", "_forward", "_to_q", "_to_pieces", "_to_kv", "_near_to_q", "_near_to_kv"]
LAYERS = {
    "decoding": [*BEFORE, "_attend", *AFTER],
    "a few rows": [*BEFORE, "_summarise", "_attend", *AFTER],
    **{kind: [*BEFORE, "_attend", *AFTER] for kind in ("many blocks", "S", "L", "D", "many alone")},
    **{f"{kind} alone": [*BEFORE, "_attend", *AFTER] for kind in "HSLD"},
    **{f"{kind} trained": TRAINING for kind in "HS"},
    "one token": ["_near", "_near_to_q", "_near_to_kv"],
    "stored alone": ["_store", "_store", "_summarise"],
    "int8": ["_levels", "_product"] * 2,
    "adapters": ["_thin", "_wide"] * 2,
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("preset", "dtype", "architecture", "kv"), [
    ("1b", "bfloat16", "90", []), ("1b", "bfloat16", "80", ["int8"]), ("tiny", "float32", "90", []),
    ("wide", "bfloat16", "90", []), ("wide", "float32", "80", ["int8"]), ("plain", "bfloat16", "90", []),
    ("bare", "float32", "80", []),
])  # fmt: skip
def test_layers_of_each_kind_compile_and_launch_five_or_six_kernels(
    preset: str, dtype: str, architecture: str, kv: list[str]
) -> None:
    """Beside four products, and the gate's sigmoid; then those of attention in training, of INT8 and of adapters. In no more
    shared memory than the smallest device has; and whoever goes on for others reads what they stored after they did
    (`ahead.in_order`)."""
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.triton.ahead", preset, dtype, architecture, *kv]
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == LAYERS
