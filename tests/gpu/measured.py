"""What `make gpu` runs on a machine with a GPU: its tests, then decoding and training beside what the device could do at most,
and the page of results, docs/benchmarks/gpu.md. On a machine without one it says so and changes nothing.

Decoding is measured as `shoal bench decode --device cuda` does, which can show vLLM beside it. Training is held against the
measured rate of products.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from shoal import presets
from shoal.bench.device import BATCHES, CONTEXTS, bandwidth, bytes_of_step, model_of, step_seconds
from shoal.bench.mfu import mfu
from shoal.errors import ShoalError
from shoal.model.gpu import launch
from shoal.train.meter import matmul_rate

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.md"
DECODING = [(name, batch, length) for name in ("350m", "1b") for batch in BATCHES for length in CONTEXTS]
TRAINING = ("350m", "1b"), (4096, 16_384)
ROUNDS = 20


def decoding(name: str, batch: int, length: int, device: torch.device, rounds: int = ROUNDS) -> tuple[float, int]:
    """Seconds of a step at full depth, from the plan to the tokens, and the bytes that it must read."""
    config = presets.get(name).model
    config = dataclasses.replace(config, max_length=max(length, config.context))
    model = model_of(config, device)
    must = bytes_of_step(config, batch, length, model.net.dtype.itemsize)
    return step_seconds(model, batch, length, rounds), must


def trained(row: dict[str, Any]) -> str:
    """A line of the table of training, of a row of `mfu`."""
    name = row["model"] + (", recomputed" * row["recomputed"])
    shares = f"{row['of_rate']:.0%} | " + ("-" if row["mfu"] is None else f"{row['mfu']:.0%}")
    return f"| {row['preset']} | {row['length']:,} | {name} | {row['tokens_per_s']:,.0f} | {shares} |"


def page(device: str, tests: str, limits: tuple[float, float], decoded: list[str], trained: list[str]) -> str:
    """docs/benchmarks/gpu.md."""
    triton = "there" if launch.installed() else "missing"
    moved, multiplied = limits[0] / 1e9, limits[1] / 1e12
    lines = [
        f"# On a GPU\n\nWritten by `make gpu` on {time.strftime('%Y-%m-%d')}: {device}, torch {torch.__version__},",
        f"Triton {triton}.",
        f"Tests: {tests}\n",
        f"A copy moves {moved:,.0f} GB/s, products of 4,096 x 4,096 in bf16 reach {multiplied:,.0f} TFLOP/s.\n",
        "| decoding, bf16 | batch | context | ms a step | tokens/s | share of bandwidth |\n|---|---|---|---|---|---|",
        *decoded,
        "\nWhole updates (`shoal bench train --device cuda`), beside a plain GPT with flash attention; MFU is of the rate that"
        " the vendor states.\n",
        "| training, bf16 | tokens a row | model | tokens/s | share of the rate of products | MFU |\n|---|---|---|---|---|---|",
        *trained,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if not torch.cuda.is_available():
        raise ShoalError("make gpu", got="no CUDA device", do="run it on a machine with a GPU; nothing was changed")
    device = torch.device("cuda")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/gpu"], capture_output=True, text=True, check=False
    )
    print(done.stdout, flush=True)
    limits = bandwidth(device), matmul_rate(device, 1.0)
    decoded = []
    for name, batch, length in DECODING:
        try:
            took, must = decoding(name, batch, length, device)
        except torch.OutOfMemoryError:
            decoded.append(f"| {name} | {batch} | {length:,} | does not fit | | |")
            continue
        share = must / limits[0] / took
        decoded.append(f"| {name} | {batch} | {length:,} | {took * 1e3:.2f} | {batch / took:,.0f} | {share:.0%} |")
        print(decoded[-1], flush=True)
        torch.cuda.empty_cache()
    rows = [trained(row) for row in mfu(*TRAINING, device, 5)[1]]
    print(*rows, sep="\n", flush=True)
    PAGE.write_text(
        page(torch.cuda.get_device_name(device), done.stdout.strip().splitlines()[-1], limits, decoded, rows)
    )
    print(f"written: {PAGE.name}")


if __name__ == "__main__":
    try:
        main()
    except ShoalError as error:
        sys.exit(str(error))
