"""What `make gpu` runs on a machine with a GPU: its tests, then decoding and training beside what the device could do at most,
and the results at the top of docs/benchmarks/gpu.md. On a machine without one it says so and changes nothing.

    python -m tests.gpu.measured [MINUTES [FOLDER]]    all of it, in no more time than that; FOLDER is for vLLM's environment
    python -m tests.gpu.measured limits | decoding PRESET BATCH BANDWIDTH MODEL [PYTHON] | training PRESET TOKENS    a part

A GPU may be there once: so each part is a process of its own with a limit of time, the page is written anew after each of them,
and what a part that fails or hangs has measured until then stays.

Decoding is measured as `shoal bench decode --device cuda` does: ours, a plain GPT with flash attention, a Llama of the shape in
vLLM, and ours in vLLM, a batch of each in turns. vLLM has an environment of its own (`make .venv-vllm-gpu/.ready`); where it
cannot be installed, or fails, a line of the page says so, and all else goes on. Training is held against the measured rate of
products.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks.device import BATCHES, CONTEXTS, PEERS, bandwidth, steps
from benchmarks.mfu import TOLD, mfu
from shoal import presets
from shoal.errors import ShoalError, first_line
from shoal.model.gpu import launch
from shoal.train.meter import matmul_rate

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.md"
KEPT = "## Without a GPU"  # the page from here on is not ours to write
ME = ["-m", "tests.gpu.measured"]
TESTS = ["-m", "pytest", "-v", "-rf", "tests/gpu"]  # each test is said as it begins, and how it ended
NAMES = ("350m", "1b")
MODELS = ("ours", "plain", *PEERS)
DECODING = [("decoding", name, batch, which) for batch in BATCHES for name in NAMES for which in MODELS]
TRAINING = [("training", name, length, "") for length in (4096, 16_384) for name in NAMES]
EARLY = 2 * len(NAMES) * len(MODELS)  # parts of decoding, of the two smaller batches, before those of training
PARTS = [*DECODING[:EARLY], *TRAINING, *DECODING[EARLY:]]
LIMIT = 900.0  # seconds of a part
MINUTES = 120.0
WITH_PEERS = 60.0  # minutes: with fewer none go to vLLM, which takes one or two to start
ROUNDS = 20
HEADS = {
    "decoding": "| decoding, bf16 | batch | context | model | ms a step | tokens/s | share of bandwidth |\n"
    "|---|---|---|---|---|---|---|",
    "training": "| training, bf16 | tokens a row | model | tokens/s | share of the rate of products | MFU |\n"
    "|---|---|---|---|---|---|",
}  # fmt: skip
BESIDE = (
    "\n`plain` is a GPT of as many layers of that width with torch's flash attention, keys and values of its own in each head;"
    " `vllm` a Llama of the shape with random weights in vLLM, which reads all of the context; `vllm-shoal` our model in vLLM."
    " Shares are of what each must read.\n"
)
AIMS = (
    "Aims on an H100: 80 % of the bandwidth at batch 1 to 8, 60 % at 64, a step at 32k within 1.3 times of one at 1k; 45 % MFU"
    " at 1b.\n"
)
BETWEEN = (
    "Whole updates (`shoal bench train --device cuda`), beside a plain GPT with flash attention; MFU is of the rate that the"
    " vendor states.\n"
)


def limits(device: torch.device) -> dict[str, Any]:
    """What the device could do at most: bytes a second of a copy, operations a second of products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    top = {"device": name, "bandwidth": bandwidth(device), "products": matmul_rate(device, 1.0)}
    return {**top, "able": launch.able(device)}


def decoding(
    name: str, batch: int, lengths: Sequence[int], device: torch.device, moved: float, which: str = "ours",
    python: str = "", rounds: int = ROUNDS,
) -> Iterator[str]:  # fmt: skip
    """A row a context of `lengths`: steps of a model at full depth, beside a device that moves `moved` bytes a second. Raises
    ShoalError for a peer that fails."""
    for found in steps(which, presets.get(name).model, batch, lengths, device, rounds, python):
        row, took = f"| {name} | {batch} | {found.length:,} | {which} |", found.seconds
        if took is None:
            yield f"{row} does not fit | | |"
        else:
            yield f"{row} {took * 1e3:.2f} | {batch / took:,.0f} | {found.bytes / moved / took:.0%} |"


def training(name: str, length: int, device: torch.device, rounds: int = 5) -> Iterator[str]:
    """A row for ours and one for the plain GPT."""
    for row in mfu((name,), (length,), device, rounds)[1]:
        model = row["model"] + TOLD[row["recomputed"]]
        shares = [row["tokens_per_s"] and f"{row['tokens_per_s']:,.0f}", row["of_rate"], row["mfu"]]
        shown = [f"{each:.0%}" if isinstance(each, float) else each or "-" for each in shares]
        fits = " | ".join(shown) if row["flops"] is not None else "does not fit | | "
        yield f"| {name} | {length:,} | {model} | {fits} |"


def page(top: dict[str, Any], tests: str, rows: dict[str, list[str]], old: str, lacks: dict[str, str]) -> str:
    """docs/benchmarks/gpu.md: the results, which peers were not measured and why (`lacks`), and of the `old` one what is from
    `KEPT` on."""
    triton = {True: "there", False: "of no use (see the log)"}[top["able"]] if launch.installed() else "missing"
    moved, multiplied = top["bandwidth"] / 1e9, top["products"] / 1e12
    lines = [
        f"# On a GPU\n\nWritten by `make gpu` on {time.strftime('%Y-%m-%d')}: {top['device']}, torch {torch.__version__},",
        f"Triton {triton}.",
        f"Tests: {tests}\n",
        f"A copy moves {moved:,.0f} GB/s, products of 4,096 x 4,096 in bf16 reach {multiplied:,.0f} TFLOP/s.\n",
        AIMS,
        HEADS["decoding"],
        *beside(rows["decoding"]),
        BESIDE,
        *(f"{which} was not measured: {why}\n" for which, why in lacks.items()),
        BETWEEN,
        HEADS["training"],
        *rows["training"],
    ]
    _, found, kept = old.partition(KEPT)
    return "\n".join(lines) + "\n" + (f"\n{found}{kept}" if found else "")


def beside(rows: Sequence[str]) -> list[str]:
    """`rows` with those of one preset, batch and context together, in the order in which the first of each came."""
    places = dict[tuple[str, ...], list[str]]()
    for row in rows:
        places.setdefault(tuple(row.split("|")[1:4]), []).append(row)
    return [row for place in places.values() for row in place]


def part(arguments: Sequence[str], seconds: float, program: str = sys.executable) -> tuple[list[str], int]:
    """The lines that `program` with these arguments prints, which are shown as they come, and how it ended; not 0 where it was
    ended after `seconds`."""
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)
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


def installed(folder: str, minutes: float, seconds: float) -> str:
    """Why vLLM is not to be measured, or nothing: then its environment is in `folder`, made in so many `seconds` where it was
    not there."""
    if not folder or minutes < WITH_PEERS:
        return f"{WITH_PEERS:.0f} minutes were not given" if folder else "it was not asked for"
    said, ended = part(["--no-print-directory", f"{folder}/.ready"], seconds, "make") if seconds > 0 else ([], 1)
    return why(said, ended) if ended else ""


def tested(said: Sequence[str], ended: int) -> str:
    """In one line, how many tests passed, or which one ran when they were ended; and which had failed until then."""
    last = next((line for line in reversed(said) if line), "they said nothing")
    failed = [found[1] for line in said if (found := re.match(r"(\S+::.+?) (?:FAILED|ERROR)\b", line))]
    return f"{last} (ended {ended})" + (f"; failed: {', '.join(failed)}" if failed else "")


def why(said: Sequence[str], ended: int) -> str:
    """In one line, of a part that did not end well."""
    told = [line for line in said if line and not line.startswith("| ")]
    return f"{told[-1] if told else 'it said nothing'} (ended {ended})".replace("|", "/")


def main(minutes: float, folder: str = "") -> int:
    """All parts; how many of them did not end well, peers aside. Raises ShoalError where there is no GPU, and where not even
    its bandwidth can be measured."""
    if not torch.cuda.is_available():
        told = "" if torch.version.cuda else " (and a torch for CPUs alone)"
        raise ShoalError(
            "make gpu", got=f"no CUDA device{told}", do="run it on a machine with a GPU; nothing was changed"
        )
    end = time.monotonic() + 60 * minutes
    said, ended = part([*ME, "limits"], LIMIT)
    if ended:
        raise ShoalError("the device's limits cannot be measured", got=said[-1:], do="see above; nothing was changed")
    top: dict[str, Any] = json.loads(said[-1])
    said, ended = part(TESTS, min(2 * LIMIT, max(1.0, end - time.monotonic())))
    tests = tested(said, ended)
    failed = int(ended != 0)
    rows: dict[str, list[str]] = {"decoding": [], "training": []}
    old, lacks = PAGE.read_text(encoding="utf-8"), dict[str, str]()
    PAGE.write_text(page(top, tests, rows, old, lacks), encoding="utf-8")
    if said_no := installed(folder, minutes, min(LIMIT, end - time.monotonic())):
        lacks = dict.fromkeys(PEERS, said_no)
    python = str(Path(folder, "bin", "python").absolute())
    for kind, name, number, which in PARTS:
        if which not in lacks:
            more = [str(top["bandwidth"]), which, python] if kind == "decoding" else []
            found, trouble = one_part([kind, name, str(number), *more], end - time.monotonic())
            if trouble and which in PEERS and not any(f"| {which} |" in row for row in [*rows[kind], *found]):
                lacks[which] = trouble  # and it is not tried again
            elif trouble:
                found.append(f"| {name} | {number:,} | {which and f'| {which} '}| {trouble} | | |")
            failed += bool(trouble) and which not in PEERS
            rows[kind] += found
        PAGE.write_text(page(top, tests, rows, old, lacks), encoding="utf-8")
    print(f"written: {PAGE.name}")
    return failed


def one_part(asked: Sequence[str], left: float) -> tuple[list[str], str]:
    """Rows of a part that has so many seconds `left`, and what went wrong."""
    if left <= 0:
        return [], "no time left"
    said, ended = part([*ME, *asked], min(LIMIT, left))
    return [line for line in said if line.startswith("| ")], why(said, ended) if ended else ""


def one(kind: str, *given: str) -> None:
    """A part, on the GPU. Raises ShoalError for a peer that fails."""
    device = torch.device("cuda")
    if kind == "limits":
        print(json.dumps(limits(device)))
        return
    name, number = given[0], int(given[1])
    for row in (
        decoding(name, number, CONTEXTS, device, float(given[2]), *given[3:])
        if kind == "decoding"
        else training(name, number, device)
    ):
        print(row, flush=True)


if __name__ == "__main__":
    a_part = sys.argv[1:] and not sys.argv[1].replace(".", "").isdigit()
    try:
        if a_part:
            one(*sys.argv[1:])
        else:
            sys.exit(min(1, main(float((sys.argv[1:] or [MINUTES])[0]), *sys.argv[2:])))
    except ShoalError as error:
        print(first_line(error), file=sys.stdout if a_part else sys.stderr)  # of a part the page quotes it
        sys.exit(1)
