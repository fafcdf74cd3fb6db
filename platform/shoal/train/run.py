"""What a run goes on from and leaves behind, whatever interrupts it: checkpoints, their copies, the best of them, the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch.optim import Optimizer

from shoal.errors import CheckpointError, ResourceError, ShoalError
from shoal.train.checkpoint import CheckpointStore, TrainState, code_version, read_state, require_same
from shoal.train.feed import Feed
from shoal.train.heldout import HeldoutReport, measure
from shoal.train.log import Speaker
from shoal.train.loss import LossModel
from shoal.train.mirror import Mirror
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan

LESS_MEMORY = "use more --accumulate, --set recompute=true, fewer workers on a machine, or a smaller preset"


@dataclass
class Run:
    """The checkpoints of this run: what to go on from, and what to leave behind."""

    plan: FitPlan
    ranks: Ranks
    model: LossModel
    optimizer: Optimizer
    say: Speaker
    feed: Feed
    saved_at: float = 0.0  # seconds of training at the last checkpoint
    _saved_step: int = -1

    def __post_init__(self) -> None:
        self.mirror = Mirror(self.plan.mirror, self.plan.keep) if self.plan.mirror and self.ranks.first else None
        self.store = CheckpointStore(self.plan.run, self.plan.keep, self.mirror)

    def resume(self) -> TrainState:
        """The state to go on from, with model and optimizer loaded; a fresh one when there is no whole checkpoint."""
        now = TrainState(world=self.ranks.world, code=code_version(), trained=self.plan.identity())
        if self.plan.resume == "never":
            self.store.clear(self.ranks)
        path = self.store.newest(self.ranks, lambda text: self.say("warning", step=0, text=text))
        if path is None:
            return now
        saved = read_state(path)
        require_same(saved.trained, now.trained, path)
        if saved.code != now.code:
            text = f"{path} was written by other code ({saved.code}, now {now.code}): the run may differ in rounding"
            self.say("warning", step=saved.step, text=text)
        self.store.load(path, self.model, self.optimizer, self.ranks)
        self.saved_at, self._saved_step = saved.seconds, saved.step
        return dataclasses.replace(saved, world=now.world, code=now.code, trained=now.trained)

    def evaluate(self, state: TrainState, done: float) -> HeldoutReport:
        """Held-out quality now; with `keep_best`, a checkpoint when it is the best so far."""
        report = measure(self.model, self.feed.heldout, self.ranks)
        if not self.feed.heldout:
            return report
        self.say("eval", asdict(report), step=state.step, progress=done)
        mean = report.mean_bpb
        if self.plan.keep_best and math.isfinite(mean) and (state.best is None or mean < state.best):
            state.best, state.best_step = mean, state.step
            self.save(state, done)
        return report

    def save(self, state: TrainState, done: float, *, must: bool = False) -> None:
        """Write a checkpoint of `state`, unless it has one. When that fails the run goes on and tries again a period later;
        with `must` it raises CheckpointError."""
        if state.step == self._saved_step:
            return
        began = time.perf_counter()
        self.saved_at = state.seconds
        try:
            path = self.store.save(self.model, self.optimizer, state, self.ranks, keep_best=self.plan.keep_best)
        except CheckpointError as error:
            if must:
                raise
            newest = f"step {self._saved_step}" if self._saved_step >= 0 else "none"
            self.say("warning", step=state.step, text=f"{error}; training goes on, the newest checkpoint is {newest}")
            return
        self._saved_step = state.step
        took = time.perf_counter() - began
        self.say(
            "checkpoint",
            everywhere=True,
            step=state.step,
            progress=done,
            tokens=state.tokens,
            path=str(path),
            took=took,
        )

    def take_best(self, state: TrainState, final: HeldoutReport) -> HeldoutReport:
        """Put the weights of the best evaluation in place of the last ones; returns its report. Raises CheckpointError when
        nothing was ever measured."""
        if state.best is None:
            raise CheckpointError("no evaluation to choose the best checkpoint by", do="give held-out rows")
        if state.best_step == state.step:
            return final
        self.store.load(self.store.fetched(state.best_step, self.ranks), self.model, self.optimizer, self.ranks)
        self.say("best", step=state.step, best_step=state.best_step, bpb=state.best)
        return measure(self.model, self.feed.heldout, self.ranks)

    def tell_copies(self, state: TrainState) -> None:
        """Say what became of copies since this was called last."""
        for kind, values in self.mirror.news() if self.mirror else ():
            self.say(kind, values, step=state.step)

    def close(self, state: TrainState) -> None:
        """Wait for the last copy; whoever asked this run to stop has been heard."""
        if self.mirror is not None:
            self.mirror.close()
            self.store.tidy()  # one that was being copied when the last was saved could not go then
        self.tell_copies(state)
        if self.ranks.first:
            stop_file(self.plan.run).unlink(missing_ok=True)


@contextlib.contextmanager
def enough_memory(plan: FitPlan, ranks: Ranks) -> Iterator[None]:
    """A failed allocation in this block becomes a ResourceError that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        cuda = ranks.device.type == "cuda"
        held = torch.cuda.memory_allocated(ranks.device) if cuda else psutil.Process().memory_info().rss
        tokens = plan.train.batch_tokens // (ranks.world * plan.train.accumulate)
        traceback.clear_frames(error.__traceback__)  # what they hold is needed to say anything at all
        raise ResourceError(
            f"worker {ranks.rank} is out of memory",
            got=f"{held / 2**30:.1f} GiB in use with {tokens:,} tokens in a micro-batch",
            do=LESS_MEMORY,
        ) from error


class StoppedError(ShoalError):
    """The run was asked to stop, and left a checkpoint."""

    exit_code = 130


def stop_file(run: str | Path) -> Path:
    """The file whose presence asks a run to save a checkpoint and end."""
    return Path(run) / "stop"


class Clock:
    """Seconds of training over all sittings, as rank 0 sees them, so that every rank decides alike."""

    def __init__(self, ranks: Ranks, before: float, stop: Path) -> None:
        self._ranks, self._before, self._start, self._stop = ranks, before, time.perf_counter(), stop
        self._at = before
        self.last_step = 0.0  # seconds from the end of one update to the end of the next
        self.stopped = False  # was the run asked to end?

    def now(self) -> float:
        seconds: float
        seconds, self.stopped = self._ranks.agree(
            (self._before + time.perf_counter() - self._start, self._ranks.first and self._stop.exists())
        )
        return seconds

    def step(self) -> float:
        """Call at the end of an update; returns `now`."""
        now = self.now()
        self.last_step, self._at = now - self._at, now
        return now

    def eta(self, done: float) -> float:
        """Seconds to go, when a share `done` took as long as it did."""
        return self._at * (1.0 - done) / done if done else float("inf")
