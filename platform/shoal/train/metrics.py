"""The one table of the metrics of a training run (`FAMILIES`), and what each record says of them (`samples`). No exporter: on a
Ray cluster `on_ray/train_metrics.py` is, and each name stands there under ``ray_shoal_train_``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from shoal.train.log import Record


@dataclass(frozen=True)
class Family:
    """What one metric is: a row of the table."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


class Sample(NamedTuple):
    """One number; of a counter, what it grows by."""

    name: str
    value: float
    labels: Mapping[str, str]


_TABLE = (
    Family("step", "gauge", "Updates that are written."),
    Family("progress", "gauge", "Share of the run that is done, 0 to 1."),
    Family("loss", "gauge", "What the last update minimised, nats a target."),
    Family("bpb", "gauge", "Bits a byte at full depth, over the last update's text, code and chats."),
    Family("heldout_bpb", "gauge", "Bits a byte on held-out rows, by modality and exit.", ("modality", "exit")),
    Family("learning_rate", "gauge", "Of the last update."),
    Family("grad_norm", "gauge", "2-norm of the last update's gradients before clipping."),
    Family("tokens", "counter", "Tokens trained on, padding left out; what a restart does again counts again."),
    Family("tokens_per_second", "gauge", "Smoothed over the last updates, all workers together."),
    Family("utilisation", "gauge", "Operations of the model over those of plain matrix products (MFU), 0 to 1."),
    Family("update_seconds", "gauge", "Of the last update, with what lies before the next."),
    Family("part_seconds", "gauge", "Of the last update at rank 0: data, compute, waiting, write, rest.", ("part",)),
    Family("busy_seconds", "gauge", "Processor seconds of the last update: slowest worker, median.", ("worker",)),
    Family("slowest_rank", "gauge", "The worker that took most processor seconds for the last update."),
    Family("workers", "gauge", "Workers that train."),
    Family("starts", "counter", "Times that the workers started: the first, and after each loss or change of them."),
    Family("checkpoints", "counter", "Checkpoints written."),
    Family("checkpoint_step", "gauge", "Step of the newest checkpoint."),
    Family("checkpoint_timestamp_seconds", "gauge", "When the newest checkpoint was there, since 1970."),
    Family("checkpoint_seconds", "gauge", "From the last checkpoint's beginning until it was there."),
    Family("checkpoint_stalled_seconds", "gauge", "That training stood still for the last checkpoint."),
    Family("warnings", "counter", "Warnings, such as a checkpoint that could not be written."),
    Family("ended", "gauge", "1 where the run is complete, else 0."),
)
FAMILIES = {family.name: family for family in _TABLE}

_OF_STEP = {  # metric: key of a record
    "progress": "progress", "loss": "loss", "bpb": "bpb", "learning_rate": "rate", "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second", "utilisation": "utilisation", "update_seconds": "seconds", "tokens": "tokens",
}  # fmt: skip


def samples(record: Record) -> Iterator[Sample]:
    """What `record` says; numbers that are not finite, or of an older code not there, are left out."""
    for name, value, labels in _said(record):
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield Sample(name, float(value), labels)


def _said(record: Record) -> Iterator[tuple[str, object, dict[str, str]]]:
    match record["kind"]:
        case "start":
            yield from (("workers", record["world"], {}), ("step", record["step"], {}), ("starts", 1, {}))
            yield "ended", 0, {}
        case "step":
            yield "step", record["step"], {}
            for name, key in _OF_STEP.items():
                yield name, record.get(key), {}
            for part, seconds in record.get("parts", {}).items():
                yield "part_seconds", seconds, {"part": part}
            busy = record.get("busy", {})
            for worker in ("slowest", "median"):
                yield "busy_seconds", busy.get(worker), {"worker": worker}
            yield "slowest_rank", busy.get("slowest_rank"), {}
        case "eval":
            for modality, exits in record["bpb"].items():
                for name, value in exits.items():
                    yield "heldout_bpb", value, {"modality": modality, "exit": name}
        case "checkpoint":
            yield from (("checkpoints", 1, {}), ("checkpoint_step", record["step"], {}))
            yield "checkpoint_timestamp_seconds", record["time"], {}
            yield "checkpoint_seconds", record["took"], {}
            yield "checkpoint_stalled_seconds", record.get("stalled"), {}
        case "warning":
            yield "warnings", 1, {}
        case "end":
            yield "ended", 1, {}
