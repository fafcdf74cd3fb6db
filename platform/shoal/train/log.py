"""What a run says: records (plain dicts) in ``RUN/metrics.jsonl``, and the same records as lines for people.

A record has a ``kind`` (start, chats, step, eval, checkpoint, copied, best, warning, end) and the ``step`` it follows. The file
is what the report and the driver of a Ray job read; lines and the progress bar are made from records alone, so they look the
same wherever the loop runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
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

    The file only grows, so that it can be followed while it is written and no crash can harm it. `read` knows that a resumed
    run repeats steps.
    """

    def __init__(self, run: str | Path, first: bool, report: Report) -> None:
        self.path, self._first, self._report = metrics_file(run), first, report
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, kind: str, values: Mapping[str, Any] | None = None, *, everywhere: bool = False, **more: Any
    ) -> None:
        """`everywhere`: hand it to `report` on every rank."""
        record = {"kind": kind, "time": time.time(), **(values or {}), **more}
        if self._first:
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk ends no run
                file.write(json.dumps(_finite(record)) + "\n")
        if self._first or everywhere:
            self._report(record)


def metrics_file(run: str | Path) -> Path:
    return Path(run) / "metrics.jsonl"


def read(run: str | Path) -> list[Record]:
    """The history of a run as one sitting: what a resumed run did again, or a new run replaced, is left out."""
    history: list[Record] = []
    for text in metrics_file(run).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except ValueError:  # a last line cut short by a crash
            continue
        if record["kind"] == "start":
            history = (
                [r for r in history if r["kind"] != "end" and r["step"] <= record["step"]] if record["step"] else []
            )
        history.append(record)
    return history


def rates(run: str | Path) -> dict[int, float]:
    """The learning rate of each update of a run, by the number of its step."""
    return {record["step"]: record["rate"] for record in read(run) if record["kind"] == "step"}


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
            refused = "".join(f", {count:,} refused: {reason}" for reason, count in r["refused"].items())
            return (
                f"chats: {r['rows']:,} rows, {r['tokens']:,} tokens{refused}; {r['padding']:.1%} of a batch is padding "
                f"({r['naive_padding']:.1%} without grouping by length)"
            )
        case "warning":
            return f"warning: {r['text']}"
        case "checkpoint":
            return f"saved {r['path']} in {r['took']:.1f} s"
        case "copied":
            return f"copied {r['path']} ({r['bytes'] / 2**20:.1f} MiB) in {r['took']:.1f} s"
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
