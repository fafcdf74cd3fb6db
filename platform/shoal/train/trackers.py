"""A run's numbers in the tools that people watch runs with: TensorBoard, MLflow, Weights & Biases, each where it is installed.

A tracker is one more `Report`: it reads the records that everything else reads, so training knows nothing of it.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shoal.errors import UsageError, first_line
from shoal.train.log import Record, Report

_STEP = ("loss", "bpb", "patch", "rate", "grad_norm", "tokens_per_second", "utilisation")


def together(*reports: Report) -> Report:
    """A `Report` that hands every record to each of `reports`."""

    def report(record: Record) -> None:
        for each in reports:
            each(record)

    return report


def trackers(names: Sequence[str], run: str | Path, title: str) -> list[Report]:
    """The trackers called `names`, for the run in folder `run`. Raises UsageError for one that is unknown or not installed."""
    found = []
    for name in names:
        if name not in _TRACKERS:
            raise UsageError("--track", got=name, allowed=list(_TRACKERS))
        module, install, make = _TRACKERS[name]
        try:
            found.append(_while_it_works(name, make(importlib.import_module(module), Path(run), title)))
        except ImportError as error:
            raise UsageError(f"--track {name}: it is not installed", do=f"pip install '{install}'") from error
    return found


def _while_it_works(name: str, report: Report) -> Report:
    """`report` until it fails: a line says so, and the run goes on without it."""
    failed = False

    def guarded(record: Record) -> None:
        nonlocal failed
        if failed:
            return
        try:
            report(record)
        except Exception as error:  # the tools' errors have no kind in common
            failed = True
            reason = first_line(error)
            print(f"warning: --track {name}: {reason}; the run goes on without it", file=sys.stderr)

    return guarded


def scalars(record: Record) -> dict[str, float]:
    """The finite numbers of a step or of an evaluation by name, such as ``train/loss`` and ``heldout/text/full``; empty for
    other records."""
    values: dict[str, Any] = {}
    if record["kind"] == "step":
        values = {f"train/{key}": record[key] for key in _STEP}
        values |= {f"train/loss_exit_{number}": value for number, value in enumerate(record["ce"], 1)}
    elif record["kind"] == "eval":
        values = {f"heldout/{m}/{e}": value for m, by_exit in record["bpb"].items() for e, value in by_exit.items()}
        values["heldout/patch"] = record["patch"]
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _tensorboard(module: ModuleType, run: Path, title: str) -> Report:
    """Event files in RUN/tensorboard; steps that a resumed run does again replace what they were."""
    writers: list[Any] = []

    def report(record: Record) -> None:
        if record["kind"] == "start":
            for writer in writers:
                writer.close()
            writers[:] = [module.SummaryWriter(str(run / "tensorboard"), purge_step=record["step"] + 1)]
        elif writers:
            for name, value in scalars(record).items():
                writers[0].add_scalar(name, value, record["step"], walltime=record["time"])
            if record["kind"] == "end":
                writers[0].close()

    return report


def _mlflow(module: ModuleType, run: Path, title: str) -> Report:
    """A run called `title` at MLFLOW_TRACKING_URI."""

    def report(record: Record) -> None:
        if record["kind"] == "start":
            if module.active_run() is None:
                module.start_run(run_name=title)
        elif values := scalars(record):
            module.log_metrics(values, step=record["step"])
        elif record["kind"] == "end":
            module.end_run()

    return report


def _wandb(module: ModuleType, run: Path, title: str) -> Report:
    """A run called `title` in the project of WANDB_PROJECT; the same folder is the same run, so that a resumed one goes on."""
    started: list[Any] = []

    def report(record: Record) -> None:
        if record["kind"] == "start" and not started:
            name = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
            started.append(module.init(name=title, id=name, resume="allow", dir=str(run)))
        elif started and (values := scalars(record)):
            started[0].log(values, step=record["step"])
        elif started and record["kind"] == "end":
            started[0].finish()

    return report


_TRACKERS: dict[str, tuple[str, str, Callable[[ModuleType, Path, str], Report]]] = {
    "tensorboard": ("tensorboardX", "shoal[track]", _tensorboard),
    "mlflow": ("mlflow", "mlflow", _mlflow),
    "wandb": ("wandb", "wandb", _wandb),
}
