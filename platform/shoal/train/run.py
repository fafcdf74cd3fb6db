"""What a run goes on from and leaves behind, whatever interrupts it: checkpoints, their copies, the best of them, the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim import Optimizer

from shoal.data.alone import alone
from shoal.errors import CheckpointError, ConfigError, ResourceError, ShoalError
from shoal.train import log
from shoal.train.bucket import BucketStore, writing
from shoal.train.checkpoint import CheckpointStore
from shoal.train.feed import Feed
from shoal.train.heldout import HeldoutReport, measure
from shoal.train.log import Speaker
from shoal.train.loss import LossModel
from shoal.train.mirror import Mirror
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, recorded
from shoal.train.state import TrainState, code_version, require_same

# in the run's folder: held by the command, and by rank 0 of its workers
COMMAND, WRITER = ".command.lock", ".writer.lock"
SHARE = 0.02  # of a run's time that checkpoints may cost: where they cost more, they are further apart
LEFT_BEHIND = 60.0  # seconds that the workers of a command that was killed may take to end
LESS_MEMORY = (
    "use more --accumulate, --set recompute=selective or true, fewer workers on a machine, or a smaller preset"
)


@dataclass
class Run:
    """The checkpoints of this run: what to go on from, and what to leave behind."""

    plan: FitPlan
    ranks: Ranks
    say: Speaker
    model: LossModel = field(init=False)
    optimizer: Optimizer = field(init=False)
    feed: Feed = field(init=False)
    saved_at: float = 0.0  # seconds of training when the last checkpoint was written, or could not be
    cost: float = 0.0  # seconds that the last checkpoint took from training
    _saved_step: int = -1
    _done: float = 0.0  # share of the run that was done when what is being saved was begun
    _path: Path | None = None  # the checkpoint to go on from

    def __post_init__(self) -> None:
        with self.ranks.alike():
            self.mirror = Mirror(self.plan.mirror, self.plan.keep) if self.plan.mirror and self.ranks.first else None
        plan, keep = self.plan, self.plan.keep
        self.store = (
            BucketStore(plan.uri, plan.run, keep, plan.lease)
            if plan.uri
            else CheckpointStore(plan.run, keep, self.mirror)
        )

    def begin(self, identity: dict[str, Any]) -> TrainState:
        """The state to go on from, whose weights `load` brings; a fresh one when there is no whole checkpoint. `identity`: what
        a checkpoint must agree with. Raises CheckpointError, on all ranks, when it does not."""
        with self.ranks.alike():
            if self.ranks.agree(identity) != identity:
                raise CheckpointError(f"{self.plan.init or self.plan.data} changes while it is read", do="start again")
            now = TrainState(
                world=self.ranks.world,
                code=code_version(),
                command=self.plan.command,
                trained=identity,
                limits=self.plan.limits,
                measured_on=self.plan.measured_on,
            )
        if self.plan.resume == "never" and not self._is_begun():
            self.store.clear(self.ranks)
        path = self._path = self.store.newest(self.ranks, lambda text: self.say("warning", step=0, text=text))
        if path is None:
            return now
        with self.ranks.alike():
            saved = self.store.state(path)
            require_same(saved.trained, now.trained, self.store.shown(path))
        if saved.code != now.code:
            who = self.store.shown(path)
            text = f"{who} was written by other code ({saved.code}, now {now.code}): the run may differ in rounding"
            self.say("warning", step=saved.step, text=text)
        self.saved_at, self._saved_step = saved.seconds, saved.step
        state = dataclasses.replace(saved, world=now.world, code=now.code, command=now.command, limits=now.limits)
        if saved.limits != now.limits:  # another length has another schedule
            state.schedule = 0.0
        if saved.measured_on != now.measured_on:
            state.best, state.best_step, state.measured_on = None, 0, now.measured_on
        return state

    def _is_begun(self) -> bool:
        """Has this very command begun the run anew, and left a checkpoint? Then its workers were started again: one of them was
        lost, or there are more of them now."""

        def ours(path: Path) -> bool:
            with contextlib.suppress(CheckpointError, ConfigError, ValueError):  # one that cannot be read is not
                return self.store.state(path).command == self.plan.command
            return False

        found = False
        with self.ranks.alike():
            if self.plan.command and self.ranks.first:
                found = any(ours(path) for path in self.store.steps())
        return bool(self.ranks.agree(found))

    def schedule(self, state: TrainState) -> dict[int, float]:
        """For steps to come, the share of the run at which they take their rates, where that is known: of a run that is
        followed, or of this one's own updates after the checkpoint that it goes on from, so that they are done again as they
        were. Call it before the run says that it starts. Raises DataError, on all ranks."""
        found: dict[int, float] = {}
        with self.ranks.alike():
            if self.plan.rates_of:
                found = recorded(self.plan)
            elif self.ranks.first and self._path is not None:
                found = log.schedule(self.plan.run, state.limits, after=state.step)
        return dict(self.ranks.agree(found))

    def load(self, model: LossModel, optimizer: Optimizer, feed: Feed) -> None:
        """Bring what the state of `begin` has learned into `model` and `optimizer`. Raises CheckpointError."""
        self.model, self.optimizer, self.feed = model, optimizer, feed
        if self._path is not None:
            self.store.load(self._path, model, optimizer, self.ranks)

    def evaluate(self, state: TrainState, done: float) -> HeldoutReport:
        """Held-out quality now; with `keep_best`, a checkpoint when it is the best so far, which it is once that is written."""
        report = measure(self.model, self.feed.heldout, self.ranks)
        if not self.feed.heldout:
            return report
        self.say("eval", asdict(report), step=state.step, progress=done)
        mean = report.mean_bpb
        if self.plan.keep_best and math.isfinite(mean) and (state.best is None or mean < state.best):
            better = dataclasses.replace(state, best=mean, best_step=state.step)
            if self.save(better, done):
                state.best, state.best_step = better.best, better.best_step
        return report

    def due(self, seconds: float) -> bool:
        """Is it time for a checkpoint, after so many `seconds` of training? `checkpoint_minutes` after the last one was there,
        and later where it cost more than SHARE of that time; 0 is after every update, whatever it costs."""
        if not self.plan.checkpoint_minutes:
            return True
        apart = max(60 * self.plan.checkpoint_minutes, self.cost / SHARE)
        return self.store.pending is None and seconds - self.saved_at >= apart

    def save(self, state: TrainState, done: float, *, must: bool = False, beside: bool = False) -> bool:
        """Write a checkpoint of `state`, unless its step has one; is there one now? With `beside` the run goes on, and `look`
        publishes it. When it fails the run goes on and tries again a period later; with `must` it raises CheckpointError."""
        self.look(state, wait=True)  # never two at a time
        if state.step == self._saved_step:
            return True
        self._done = done
        keep_best = self.plan.keep_best
        try:
            go_on = self.store.begin(self.model, self.optimizer, state, self.ranks, keep_best=keep_best)
        except CheckpointError as error:
            return self._failed(error, state, must=must)
        return False if beside and go_on else self.look(state, wait=True, must=must)

    def look(self, state: TrainState, *, wait: bool = False, must: bool = False) -> bool:
        """Publish the checkpoint that is being written if all ranks have written it, or, with `wait`, once they have; was one
        published? `must`: as of `save`."""
        if self.store.pending is None or not (wait or self.store.ready(self.ranks)):
            return False
        try:
            saved = self.store.publish(self.ranks)
        except CheckpointError as error:
            return self._failed(error, state, must=must)
        self._saved_step, self.saved_at = saved.state.step, saved.state.seconds + saved.took
        # A processor that writes and hashes is one that does not train, where processors train.
        self.cost = saved.stalled + (saved.busy if self.ranks.device.type == "cpu" else 0.0)
        values = {
            "tokens": saved.state.tokens,
            "path": self.store.shown(saved.path),
            "took": saved.took,
            "stalled": saved.stalled,
        }
        self.say("checkpoint", values, everywhere=True, step=saved.state.step, progress=self._done)
        return True

    def _failed(self, error: CheckpointError, state: TrainState, *, must: bool) -> bool:
        """False, with a warning; raises `error` for a checkpoint that there `must` be."""
        if must:
            raise error
        self.saved_at = state.seconds
        newest = f"step {self._saved_step}" if self._saved_step >= 0 else "none"
        self.say("warning", step=state.step, text=f"{error}; training goes on, the newest checkpoint is {newest}")
        return False

    def abandon(self) -> None:
        """Give up what is being written, for a run that ends by an error."""
        self.store.abandon(self.ranks)

    def take_best(self, state: TrainState, final: HeldoutReport) -> HeldoutReport:
        """Put the weights of the best evaluation in place of the last ones; returns its report. Where there is no whole
        checkpoint of it, a warning says so and the last weights stay. The last ones are saved before. Raises CheckpointError
        where they cannot be read back."""
        if state.best_step == state.step and state.best is not None:
            return final
        stay = f"the model is written from the last weights, those of step {state.step}"
        if state.best is None:
            self.say("warning", step=state.step, text=f"no checkpoint of an evaluation to take the best of; {stay}")
            return final
        try:
            self.store.load(self.store.fetched(state.best_step, self.ranks), self.model, self.optimizer, self.ranks)
        except CheckpointError as error:
            self.say("warning", step=state.step, text=f"{error}; {stay}")
            self.store.load(self.store.at(state.step), self.model, self.optimizer, self.ranks)  # some may be replaced
            return final
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
def only_writer(plan: FitPlan, ranks: Ranks) -> Iterator[FitPlan]:
    """Rank 0 holds the run's folder in this block, once the processes that a killed command left behind have ended; yields the
    plan, in S3 with the lease. Raises ResourceError or DataError, on all ranks, where another run goes on writing there: their
    checkpoints would be mixed."""
    busy = ResourceError(f"another run is writing to {plan.run}", do="wait for it, stop it, or give another --out")
    with contextlib.ExitStack() as held:
        with ranks.alike():
            if ranks.first and plan.uri:
                plan = held.enter_context(writing(plan, stop_file(plan.run)))
            elif ranks.first:
                held.enter_context(alone(Path(plan.run) / WRITER, busy, wait=LEFT_BEHIND))
        yield plan


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
        tokens = plan.train.batch_tokens // plan.parts_at(ranks.world)
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
