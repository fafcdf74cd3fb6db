"""Where the time of an update goes, on this rank and beside the others; and a trace of some updates.

data      rows are read and become tensors on the device
compute   forward and backward, with the exchange of weights and gradients that FSDP does meanwhile
waiting   for other ranks, where nothing is computed
write     the gradients' norm, clipping, the optimizer
rest      evaluation, copying a checkpoint, writing records: what lies between two updates
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from shoal.train.parallel import Ranks

PARTS = ("data", "compute", "waiting", "write", "rest")
WARM = 2  # updates of a sitting before those that are traced: the first allocate, and compile
TRACES = "traces"  # folder of a run


class Watch:
    """Seconds of one update by part, on this rank."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.busy = 0.0  # of a processor: what a rank computes itself, waiting left out

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began, busy = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.parts[part] += time.perf_counter() - began
            if part != "waiting":
                self.busy += time.thread_time() - busy

    def told(self, ranks: Ranks, seconds: float) -> dict[str, Any]:
        """What a record says of an update that took `seconds` in all: `parts` of rank 0, and the processor seconds of the
        `slowest` rank (which one, as `slowest_rank`) beside the `median`. All ranks call it."""
        each = torch.zeros(ranks.world, dtype=torch.float64)
        each[ranks.rank] = self.busy
        each = ranks.sum(each).cpu()
        parts = self.parts | {"rest": max(0.0, seconds - sum(self.parts.values()))}
        slowest = int(each.argmax())
        busy = {"slowest": float(each[slowest]), "median": float(each.median()), "slowest_rank": slowest}
        return {"parts": parts, "busy": busy}


class Tracer:
    """A trace of `updates` updates of this sitting, after the first `WARM`, in RUN/traces: one file a rank, which
    ui.perfetto.dev and chrome://tracing open. Of 0 updates none."""

    def __init__(self, run: str | Path, updates: int, ranks: Ranks) -> None:
        self._folder, self._updates, self._ranks = Path(run) / TRACES, updates, ranks
        self._begun = 0  # updates of this sitting
        self._profile: profile | None = None

    def before(self) -> None:
        """Call before each update."""
        if self._updates and self._begun == WARM:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._ranks.device.type == "cuda")
            self._profile = profile(activities=kinds, record_shapes=True)
            self._profile.start()
        self._begun += 1

    def after(self, step: int) -> Path | None:
        """Call after each update, with its number; returns the file that was written with it, if one was."""
        if self._profile is None or self._begun < WARM + self._updates:
            return None
        return self._write(step)

    def close(self, step: int) -> Path | None:
        """Write what was traced where the run ends before as many updates."""
        return None if self._profile is None else self._write(step)

    def _write(self, step: int) -> Path:
        assert self._profile is not None
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:08d}-rank-{self._ranks.rank:05d}.json"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        return path
