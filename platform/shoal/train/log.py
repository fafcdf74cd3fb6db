"""What a run says: records (plain dicts) in ``RUN/metrics.jsonl``, and the same records as lines for people.

A record has a ``kind`` (start, chats, step, eval, checkpoint, copied, trace, best, warning, end) and the ``step`` it follows.
The file is what the report and the driver of a Ray job read; lines and the progress bar are made from records alone, so they
look the same wherever the loop runs. A crash or a full disk may tear a line: every reader goes by `parse`, passes over what is
no record and counts it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

Record = dict[str, Any]
Report = Callable[[Record], None]


def ignore(record: Record) -> None:
    """A `Report` that says nothing."""


class Speaker:
    """Says a record: appends it to ``RUN/metrics.jsonl`` and hands it to `report`, on rank 0.

    The file only grows, so that it can be followed while it is written. What a full disk did not take is written, whole and
    on a line of its own, before the next record. `read` knows that a resumed run repeats steps.
    """

    def __init__(self, run: str | Path, first: bool, report: Report) -> None:
        self.path, self._first, self._report = metrics_file(run), first, report
        self._unwritten: list[bytes] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, kind: str, values: Mapping[str, Any] | None = None, *, everywhere: bool = False, **more: Any
    ) -> None:
        """`everywhere`: hand it to `report` on every rank."""
        record = {"kind": kind, "time": time.time(), **(values or {}), **more}
        if self._first:
            self._unwritten.append(json.dumps(_finite(record)).encode() + b"\n")
            self._write()
        if self._first or everywhere:
            self._report(record)

    def _write(self) -> None:
        try:
            with self.path.open("ab+", buffering=0) as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                while self._unwritten:
                    if file.write(self._unwritten[0]) < len(self._unwritten[0]):
                        return
                    del self._unwritten[0]
        except OSError:  # a full disk ends no run
            return


def metrics_file(run: str | Path) -> Path:
    return Path(run) / "metrics.jsonl"


def parse(text: bytes) -> Record | None:
    """The record in a line of a metrics file; None where it holds none that can be read."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    known = type(record.get("step")) is int or record["kind"] == "end"
    return dict(_finite(record)) if known else None


@dataclass(frozen=True)
class History:
    """What a run has said."""

    records: list[Record]
    unreadable: int  # lines that hold no record, passed over


def history(run: str | Path) -> History:
    """The history of a run as one sitting: what a resumed run did again, or a new run replaced, is left out."""
    records: list[Record] = []
    unreadable = 0
    for text in metrics_file(run).read_bytes().split(b"\n"):
        record = parse(text)
        if record is None:
            unreadable += bool(text.strip())
            continue
        if record["kind"] == "start":
            before = record["step"]
            records = [r for r in records if r["kind"] != "end" and r["step"] <= before] if before else []
        records.append(record)
    return History(records, unreadable)


def read(run: str | Path) -> list[Record]:
    """The records of `history`."""
    return history(run).records


def schedule(run: str | Path, limits: Mapping[str, float | None] | None = None, after: int = 0) -> dict[int, float]:
    """The share of its length at which each update of a run after step `after` took its rates, by the number of its step, up to
    the first that is not known; with `limits`, of the sittings that were to be as long. Empty where nothing was recorded."""
    if not metrics_file(run).is_file():
        return {}
    found: dict[int, float] = {}
    length: Any = None
    for record in read(run):
        if record["kind"] == "start":
            length = record.get("limits")
        at = record.get("schedule")
        if record["kind"] == "step" and isinstance(at, (int, float)) and (limits is None or limits == length):
            found[record["step"]] = float(at)
    unbroken: dict[int, float] = {}
    while (step := after + len(unbroken) + 1) in found:
        unbroken[step] = found[step]
    return unbroken


def line(record: Record) -> str:
    """One fixed-width line for a record."""
    r = record
    match r["kind"]:
        case "step":
            exits = " ".join(_number(value, 6, 3) for value in r["ce"])
            return (
                f"step {r['step']:>6} {r['progress']:6.1%}  loss {r['loss']:7.4f}  exits {exits}  patch {r['patch']:6.4f}  "
                f"bpb {_number(r['bpb'], 6, 3)}  lr {r['rate']:.2e}  norm {r['grad_norm']:6.2f}  "
                f"{r['tokens_per_second']:>9,.0f} tok/s  util {r['utilisation']:4.0%}  ETA {clock(r['eta'])}"
            )
        case "eval":
            parts = [
                f"{kind} " + " ".join(_number(v, 5, 3) for v in exits.values()) for kind, exits in r["bpb"].items()
            ]
            patch = "" if r["patch"] is None else f"   patch {r['patch']:.4f}"
            return f"eval {r['step']:>6} {r['progress']:6.1%}  held-out bpb by exit: {'   '.join(parts)}{patch}"
        case "start":
            at = f"resumed at step {r['step']}: " if r["step"] else ""
            return (
                f"{at}{r['name']}, {r['parameters'] / 1e6:.2f} M parameters, {r['world']} worker(s) on {r['device']}, "
                f"{r['batch_tokens']:,} tokens an update in {r['micro_batches']} micro-batch(es) a worker, "
                f"{r['matmul_rate'] / 1e9:,.0f} GFLOP/s a worker in matrix products"
            )
        case "chats":
            first = {reason: f" (the first in line {at})" for reason, at in r.get("refused_at", {}).items()}
            refused = "".join(f", {n:,} refused: {reason}{first.get(reason, '')}" for reason, n in r["refused"].items())
            return (
                f"chats: {r['rows']:,} rows, {r['tokens']:,} tokens{refused}; {r['padding']:.1%} of a batch is padding "
                f"({r['naive_padding']:.1%} without grouping by length)"
            )
        case "warning":
            return f"warning: {r['text']}"
        case "checkpoint":
            still = f", {r['stalled']:.2f} s of which training stood still" if "stalled" in r else ""
            return f"saved {r['path']} in {r['took']:.1f} s{still}"
        case "copied":
            return f"copied {r['path']} ({r['bytes'] / 2**20:.1f} MiB) in {r['took']:.1f} s"
        case "trace":
            return f"traced updates up to {r['step']}: open {r['path']} in ui.perfetto.dev"
        case "best":
            return f"best: step {r['best_step']}, {r['bpb']:.4f} held-out bits a byte; the model is written from it"
        case "end":
            return f"done: {r['steps']} steps, {r['tokens']:,} tokens in {clock(r['seconds'])}; model in {r['out']}"
    return json.dumps(r)


class Console:
    """A `Report` for people: a progress bar under the lines in a terminal, plain lines in a file."""

    def __init__(self, title: str, every: int = 10, stream: TextIO | None = None) -> None:
        self.every, self.stream = every, stream or sys.stdout
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        if self.stream.isatty():
            columns = (
                TextColumn(title),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
            )
            self._bar = Progress(*columns, console=Terminal(file=self.stream))
            self._task = self._bar.add_task(title, total=1.0, eta="--:--")
            self._bar.start()

    def __call__(self, record: Record) -> None:
        if self._bar is not None and self._task is not None and "progress" in record:
            self._bar.update(self._task, completed=record["progress"])
            if "eta" in record:
                self._bar.update(self._task, eta=clock(record["eta"]))
        if record["kind"] != "step" or record["step"] <= 3 or record["step"] % self.every == 0:
            if self._bar is not None:
                self._bar.console.print(line(record), markup=False, highlight=False, soft_wrap=True)
            else:
                print(line(record), file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock(seconds: float | None) -> str:
    """``mm:ss``, or ``h:mm:ss`` from an hour on; dashes while it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes:02d}:{rest:02d}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None or not math.isfinite(value) else f"{value:{width}.{digits}f}"


def _finite(value: Any) -> Any:
    """`value` with nan and infinity as null, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
