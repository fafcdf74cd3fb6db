"""What `make gpu` runs on a machine with a GPU: its tests, then decoding and training beside what the device could do at most,
and the results at the top of docs/benchmarks/gpu.md. On a machine without one it says so and changes nothing.

    python -m tests.gpu.measured [MINUTES]    all of it, in no more time than that
    python -m tests.gpu.measured limits | decoding PRESET BATCH BANDWIDTH | training PRESET TOKENS    a part: rows of a table

A GPU may be there once: so each part is a process of its own with a limit of time, the page is written anew after each of them,
and what a part that fails or hangs has measured until then stays.

Decoding is measured as `shoal bench decode --device cuda` does, which can show vLLM beside it. Training is held against the
measured rate of products.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from shoal import presets
from shoal.bench.device import BATCHES, CONTEXTS, bandwidth, bytes_of_step, model_of, step_seconds
from shoal.bench.mfu import mfu
from shoal.errors import ShoalError, first_line
from shoal.model.gpu import launch
from shoal.train.meter import matmul_rate

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.md"
KEPT = "## Without a GPU"  # the page from here on is not ours to write
TESTS = ["-m", "pytest", "-rf", "tests/gpu"]
DECODING = [(name, batch) for batch in BATCHES for name in ("350m", "1b")]
TRAINING = [(name, length) for length in (4096, 16_384) for name in ("350m", "1b")]
LIMIT = 900.0  # seconds of a part
MINUTES = 120.0
ROUNDS = 20
HEADS = {
    "decoding": "| decoding, bf16 | batch | context | ms a step | tokens/s | share of bandwidth |\n|---|---|---|---|---|---|",
    "training": "| training, bf16 | tokens a row | model | tokens/s | share of the rate of products | MFU |\n"
    "|---|---|---|---|---|---|",
}  # fmt: skip
BETWEEN = (
    "\nWhole updates (`shoal bench train --device cuda`), beside a plain GPT with flash attention; MFU is of the rate that the"
    " vendor states.\n"
)


def limits(device: torch.device) -> dict[str, Any]:
    """What the device could do at most: bytes a second of a copy, operations a second of products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    top = {"device": name, "bandwidth": bandwidth(device), "products": matmul_rate(device, 1.0)}
    return {**top, "able": launch.able(device)}


def decoding(
    name: str, batch: int, lengths: Sequence[int], device: torch.device, moved: float, rounds: int = ROUNDS
) -> Iterator[str]:
    """A row a context of `lengths`: steps at full depth from the plan to the tokens, beside a device that moves `moved` bytes a
    second."""
    config = presets.get(name).model
    config = dataclasses.replace(config, max_length=max(*lengths, config.context))
    model = model_of(config, device)
    for length in lengths:
        try:
            took = step_seconds(model, batch, length, rounds)
        except torch.OutOfMemoryError:
            yield f"| {name} | {batch} | {length:,} | does not fit | | |"
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        share = bytes_of_step(config, batch, length, model.net.dtype.itemsize) / moved / took
        yield f"| {name} | {batch} | {length:,} | {took * 1e3:.2f} | {batch / took:,.0f} | {share:.0%} |"


def training(name: str, length: int, device: torch.device, rounds: int = 5) -> Iterator[str]:
    """A row for ours and one for the plain GPT."""
    for row in mfu((name,), (length,), device, rounds)[1]:
        model = row["model"] + (", recomputed" * row["recomputed"])
        shares = [row["tokens_per_s"] and f"{row['tokens_per_s']:,.0f}", row["of_rate"], row["mfu"]]
        shown = [f"{each:.0%}" if isinstance(each, float) else each or "-" for each in shares]
        fits = " | ".join(shown) if row["flops"] is not None else "does not fit | | "
        yield f"| {name} | {length:,} | {model} | {fits} |"


def page(top: dict[str, Any], tests: str, rows: dict[str, list[str]], old: str) -> str:
    """docs/benchmarks/gpu.md: the results, and of the `old` one what is from `KEPT` on."""
    triton = {True: "there", False: "of no use (see the log)"}[top["able"]] if launch.installed() else "missing"
    moved, multiplied = top["bandwidth"] / 1e9, top["products"] / 1e12
    lines = [
        f"# On a GPU\n\nWritten by `make gpu` on {time.strftime('%Y-%m-%d')}: {top['device']}, torch {torch.__version__},",
        f"Triton {triton}.",
        f"Tests: {tests}\n",
        f"A copy moves {moved:,.0f} GB/s, products of 4,096 x 4,096 in bf16 reach {multiplied:,.0f} TFLOP/s.\n",
        HEADS["decoding"],
        *rows["decoding"],
        BETWEEN,
        HEADS["training"],
        *rows["training"],
    ]
    _, found, kept = old.partition(KEPT)
    return "\n".join(lines) + "\n" + (f"\n{found}{kept}" if found else "")


def part(arguments: Sequence[str], seconds: float) -> tuple[list[str], int]:
    """The lines that a Python with these arguments prints, which are shown as they come, and how it ended; not 0 where it was
    ended after `seconds`."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started itself, which would keep the pipe open

    timer, lines = Timer(seconds, end), list[str]()
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        return lines, process.wait()
    finally:
        timer.cancel()
        end()


def main(minutes: float) -> int:
    """All parts; how many of them did not end well. Raises ShoalError where there is no GPU, and where not even its bandwidth
    can be measured."""
    if not torch.cuda.is_available():
        told = "" if torch.version.cuda else " (and a torch for CPUs alone)"
        raise ShoalError(
            "make gpu", got=f"no CUDA device{told}", do="run it on a machine with a GPU; nothing was changed"
        )
    end, me = time.monotonic() + 60 * minutes, ["-m", "tests.gpu.measured"]
    said, ended = part([*me, "limits"], LIMIT)
    if ended:
        raise ShoalError("the device's limits cannot be measured", got=said[-1:], do="see above; nothing was changed")
    top: dict[str, Any] = json.loads(said[-1])
    rows: dict[str, list[str]] = {"decoding": [], "training": []}
    said, ended = part(TESTS, min(2 * LIMIT, max(1.0, end - time.monotonic())))
    tests, failed = (
        next((line for line in reversed(said) if line), "they said nothing") + f" (ended {ended})",
        int(ended != 0),
    )
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page(top, tests, rows, old), encoding="utf-8")
    parts = [("decoding", *each) for each in DECODING] + [("training", *each) for each in TRAINING]
    for kind, name, number in parts:
        left = end - time.monotonic()
        more = [str(top["bandwidth"])] if kind == "decoding" else []
        said, ended = part([*me, kind, name, str(number), *more], min(LIMIT, left)) if left > 0 else ([], 1)
        rows[kind] += [line for line in said if line.startswith("| ")]
        if ended:
            why = f"ended {ended}" if left > 0 else "no time left"
            rows[kind].append(f"| {name} | {number:,} | {why} | | | |")
        failed += ended != 0
        PAGE.write_text(page(top, tests, rows, old), encoding="utf-8")
    print(f"written: {PAGE.name}")
    return failed


def one(kind: str, *given: str) -> None:
    """A part, on the GPU."""
    device = torch.device("cuda")
    if kind == "limits":
        print(json.dumps(limits(device)))
        return
    name, number = given[0], int(given[1])
    for row in (
        decoding(name, number, CONTEXTS, device, float(given[2]))
        if kind == "decoding"
        else training(name, number, device)
    ):
        print(row, flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:] and not sys.argv[1].replace(".", "").isdigit():
            one(*sys.argv[1:])
        else:
            sys.exit(min(1, main(float((sys.argv[1:] or [MINUTES])[0]))))
    except ShoalError as error:
        sys.exit(first_line(error))
