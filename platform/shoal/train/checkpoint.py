"""Training checkpoints: all that an exact resume needs, written aside, hashed and renamed.
Exact: to the bit where rates follow the number of the step, or a schedule that was recorded (`Run.schedule`).

    RUN/checkpoints/step-00000120/
        shard-0000R.safetensors   model and optimizer, each rank its own shards (torch.distributed.checkpoint reads them, at any
                                  number of ranks; nothing is pickled)
        rng-0000R.safetensors     random state of each rank
        state.json                step, tokens, cursor, seconds trained, what was trained, in how many micro-batches an
                                  update, by which code
        manifest.json             size and sha256 of every file, as the rank that wrote it says; written last

Between two updates each rank copies its share (`begin`), and a thread of its own writes it while training goes on (`Snapshot`);
when all ranks have (`ready`), rank 0 writes the manifest and gives the directory its name (`publish`). So one named
step-NNNNNNNN is whole unless the disk lies; `newest` reads the hashes anyway and falls back to the one before. What is missing
here is fetched from the run's `Mirror`, if it has one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException as DcpError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from shoal.errors import CheckpointError, ShoalError, last_line
from shoal.machine import write_json
from shoal.train.manifest import MANIFEST, STATE, STEP, damage, entry
from shoal.train.mirror import Mirror
from shoal.train.parallel import PULSE, Ranks
from shoal.train.snapshot import Entry, Snapshot, random_file, set_random_state
from shoal.train.state import FORMAT, VERSION, TrainState, read_state

_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass
class Saved:
    """A checkpoint that is being written, or was."""

    state: TrainState  # as it was when it was begun
    path: Path  # where it is, or will be
    keep_best: bool
    aside: Path  # where it is written
    began: float  # by this process's clock
    stalled: float = 0.0  # seconds that training stood still for it
    took: float = 0.0  # seconds from its beginning to its name
    busy: float = 0.0  # seconds of a processor that the slowest rank wrote and hashed for

    def told(self) -> dict[str, Any]:
        """What its state file says."""
        return {"format": FORMAT, "version": VERSION, **asdict(self.state)}


class CheckpointStore:
    """The checkpoints of one run, in ``RUN/checkpoints``. What takes `ranks` is called by all of them together."""

    def __init__(self, run: str | Path, keep: int = 2, mirror: Mirror | None = None) -> None:
        """`mirror`: copies elsewhere; on rank 0 only, which alone asks for it."""
        self.directory = Path(run) / "checkpoints"
        self.keep, self.mirror = keep, mirror
        self._best: list[Path] = []  # the best one, if any is to stay
        self._last: Path | None = None  # the one that was saved last, here
        self._snapshot: Snapshot | None = None  # made at the first save, since its memory stays
        self.pending: Saved | None = None  # what is being written

    def steps(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(path for path in self.directory.glob("step-*") if STEP.fullmatch(path.name))

    def at(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.directory / f"step-{step:08d}"

    def save(
        self, model: nn.Module, optimizer: Optimizer, state: TrainState, ranks: Ranks, *, keep_best: bool = False
    ) -> Path:
        """`begin` and `publish`, with training standing still; returns the checkpoint's directory."""
        self.begin(model, optimizer, state, ranks, keep_best=keep_best)
        return self.publish(ranks).path

    def begin(
        self, model: nn.Module, optimizer: Optimizer, state: TrainState, ranks: Ranks, *, keep_best: bool = False
    ) -> bool:
        """Copy what a checkpoint of `state` is made of and begin to write it, when the one before is published or given up. May
        training go on meanwhile? Not where a rank has no memory for a copy: then `publish` comes next. `keep_best`: the best
        one stays besides the newest. Raises CheckpointError, on all ranks and with nothing left behind, when one cannot."""
        assert self.pending is None, "one checkpoint is written at a time"
        began, final = time.perf_counter(), self.at(state.step)
        # What a killed run left writing must not write into this one.
        aside = self.directory / f".{final.name}.{ranks.agree(secrets.token_hex(4))}.tmp"
        snapshot = self._snapshot = self._snapshot or Snapshot(ranks)
        copied = True

        def copy() -> None:
            nonlocal copied
            self._make_ready(aside, final, ranks)
            copied = snapshot.take(_tensors(model, optimizer))

        try:
            _together(ranks, copy, f"cannot write checkpoint {self.shown(final)}")
        except CheckpointError:
            if ranks.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        copied = not int(ranks.sum(torch.tensor([float(not copied)])))
        self.pending = Saved(dataclasses.replace(state), final, keep_best, aside, began)
        snapshot.write(aside, self._sender(final))
        self.pending.stalled = time.perf_counter() - began
        return copied

    def ready(self, ranks: Ranks) -> bool:
        """Have all ranks written what was begun? So `publish` would not wait."""
        running = self._snapshot is not None and self._snapshot.running
        return not int(ranks.sum(torch.tensor([float(running)])))

    def publish(self, ranks: Ranks) -> Saved:
        """Wait until all ranks have written what was begun, then publish it; the oldest beyond `keep` are removed. Raises
        CheckpointError, on all ranks and with nothing left behind, when one of them could not write."""
        saved, self.pending = self.pending, None
        assert saved is not None and self._snapshot is not None, "nothing was begun"
        came = time.perf_counter()
        while not self.ready(ranks):  # one exchange that waited for the slowest would be given up
            self._snapshot.wait(PULSE)
        problem, met, mine = "", None, {}
        try:
            mine = self._snapshot.result()
        except Exception as error:
            problem, met = last_line(error), error
        found = ranks.gather((problem, mine, self._snapshot.seconds))
        problem = problem or next((f"worker {rank}: {each[0]}" for rank, each in enumerate(found) if each[0]), "")
        files = {name: values for _, entries, _ in found for name, values in entries.items()}

        def name_it() -> None:
            if ranks.first:
                self._publish(saved, files)

        what = f"cannot write checkpoint {self.shown(saved.path)}"
        try:
            if problem:
                raise CheckpointError(what, got=problem) from met
            _together(ranks, name_it, what)
        except CheckpointError:
            if ranks.first:
                shutil.rmtree(saved.aside, ignore_errors=True)
            raise
        if ranks.first:
            best = saved.keep_best and saved.state.best is not None
            self._last, self._best = saved.path, [self.at(saved.state.best_step)] if best else []
            if self.mirror is not None:
                self.mirror.best = self._best[0].name if self._best else ""
                self.mirror.offer(saved.path)
            self.tidy()
        now = time.perf_counter()
        saved.busy = max(seconds for *_, seconds in found)
        saved.stalled, saved.took = ranks.agree((saved.stalled + now - came, now - saved.began))
        return saved

    # ---- a folder; `bucket.BucketStore` has the same in S3

    def shown(self, path: Path) -> str:
        """The checkpoint `path` as people know it."""
        return str(path)

    def state(self, path: Path) -> TrainState:
        """The state in checkpoint `path`. Raises CheckpointError when it is of another format."""
        return read_state(path)

    def leave(self, ranks: Ranks) -> None:
        """The run ends, in whatever way."""

    def _make_ready(self, aside: Path, final: Path, ranks: Ranks) -> None:
        if ranks.first:
            aside.mkdir(parents=True)

    def _sender(self, final: Path) -> Callable[[Path], Entry] | None:
        """What is done with each file of the checkpoint `final` once it is written, as of `Snapshot.write`."""
        return None

    def _publish(self, saved: Saved, files: Mapping[str, Any]) -> None:
        """Give what was written its name, once all of it is seen to be there. Raises OSError."""
        for name, values in files.items():
            size = (saved.aside / name).stat().st_size
            if size != values["bytes"]:  # on a file system of many machines, say
                raise OSError(f"{name} has {size} bytes here, and {values['bytes']} where it was written")
        write_json(saved.aside / STATE, saved.told())
        write_json(saved.aside / MANIFEST, {**files, STATE: entry(saved.aside / STATE)})
        shutil.rmtree(saved.path, ignore_errors=True)
        saved.aside.rename(saved.path)

    def _problem(self, path: Path) -> str | None:
        """What is wrong with the checkpoint `path`, or None."""
        return damage(path) if path.is_dir() else "it is not here"

    def _remove(self, paths: set[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)

    def _remove_all(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _reader(self, path: Path, ranks: Ranks) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(path=str(path))

    def _random(self, path: Path, ranks: Ranks) -> bytes | None:
        """The file of this rank's random state, where there is one."""
        file = path / random_file(ranks)
        return file.read_bytes() if file.exists() else None

    # ---- a folder or S3

    def abandon(self, ranks: Ranks) -> None:
        """Give up what is being written, if anything is; every rank by itself, since another may be gone."""
        saved, self.pending = self.pending, None
        if saved is not None and self._snapshot is not None:
            self._snapshot.stop()
            if ranks.first:
                shutil.rmtree(saved.aside, ignore_errors=True)

    def tidy(self) -> None:
        """Remove checkpoints that nobody needs: neither new, nor best, nor still to be copied; none before the first was saved
        here. One of a later step than the last saved was damaged, or this run would have gone on from it: it is not new. On
        rank 0 only."""
        if self._last is None:
            return
        new = [path for path in self.steps() if path <= self._last][-self.keep :]
        stay = {*self._best, *new, *(self.mirror.needed if self.mirror else ())}
        self._remove(set(self.steps()) - stay)

    def clear(self, ranks: Ranks) -> None:
        """Forget all checkpoints of the run, copies too. Raises CheckpointError, on all ranks, where the mirror fails."""
        with ranks.alike():
            if ranks.first:
                self._remove_all()
                if self.mirror is not None:
                    self.mirror.clear()

    def newest(self, ranks: Ranks, warn: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, fetched when it is only in the mirror, or None, the same on all ranks. Damaged ones
        are passed over, with a warning. Raises CheckpointError when there is none here and the mirror does not answer."""
        found: Path | ShoalError | None = None
        with ranks.at_leisure():  # one is hashed, or fetched, whole
            if ranks.first:
                try:
                    found = self._newest(warn)
                except ShoalError as error:
                    found = error
        chosen: Path | ShoalError | None = ranks.agree(found)
        if isinstance(chosen, ShoalError):
            raise chosen
        return None if chosen is None else self.directory / chosen.name

    def _newest(self, warn: Callable[[str], None]) -> Path | None:
        for left in self.directory.glob(".step-*.tmp"):  # by a run that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        here = {path.name for path in self.steps()}
        copies: set[str] = set()
        if self.mirror is not None:
            try:
                copies = set(self.mirror.names())
            except CheckpointError as error:
                if not here:
                    raise
                warn(f"{error}; going on from what is in {self.directory}")
        for name in sorted(here | copies, reverse=True):
            path = self.directory / name
            problem = damage(path) if name in here else "it is not here"
            if problem is None:
                return path
            if name in here:
                warn(
                    f"checkpoint {path} is damaged ({problem}); trying {'its copy' if name in copies else 'the one before'}"
                )
            if self.mirror is not None and name in copies:
                if (problem := self._fetch(self.mirror, name)) is None:
                    return path
                warn(f"{self.mirror.place}/{name} is damaged ({problem}); trying the one before")
        return None

    def _fetch(self, mirror: Mirror, name: str) -> str | None:
        """Bring the copy `name` here; returns what is wrong with it, or None."""
        aside = self.directory / f".{name}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            mirror.fetch(name, aside)
        except CheckpointError as error:
            return str(error)
        if problem := damage(aside):
            return problem
        shutil.rmtree(self.directory / name, ignore_errors=True)
        aside.rename(self.directory / name)
        return None

    def fetched(self, step: int, ranks: Ranks) -> Path:
        """Where the checkpoint of `step` is, whole, brought here from the mirror where it must be. Raises CheckpointError."""
        path = self.at(step)

        def bring() -> None:
            with ranks.at_leisure():
                problem = self._problem(path) if ranks.first else None
                if problem and self.mirror is not None:
                    problem = self._fetch(self.mirror, path.name)
            if problem:
                raise OSError(problem)

        _together(ranks, bring, f"cannot read checkpoint {self.shown(path)}")
        return path

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        """Model, optimizer and random state from `path`, in place, at any number of ranks. Raises CheckpointError, on all
        ranks, when one of them cannot read it; some tensors may be loaded then."""
        tensors: dict[str, Tensor] = {}

        def find() -> None:
            saved = self._reader(path, ranks).read_metadata().state_dict_metadata
            tensors.update(_tensors(model, optimizer, list(saved)))

        def fill() -> None:
            with _alone(ranks):
                dcp_load(tensors, storage_reader=self._reader(path, ranks), no_dist=ranks.world == 1)

        def draw_on() -> None:
            if (state := self._random(path, ranks)) is not None:
                set_random_state(load_tensors(state))

        for part in (find, fill, draw_on):
            _together(ranks, part, f"cannot load checkpoint {self.shown(path)}")


def _together(ranks: Ranks, work: Callable[[], None], what: str) -> None:
    """Do `work` on every rank. Raises CheckpointError on all of them when it failed on one: those that go on would wait for
    ever for the one that stopped."""
    problem, met = "", None
    try:
        work()
    except (Exception, DcpError) as error:  # DCP wraps whatever went wrong on any rank in its own kinds
        problem, met = last_line(error), error
    failed = int(ranks.sum(torch.tensor([float(bool(problem))])))
    if failed:
        raise CheckpointError(what, got=problem or f"an error on {failed} other worker(s)") from met


def _tensors(model: nn.Module, optimizer: Optimizer, saved: list[str] | None = None) -> dict[str, Tensor]:
    """Model and optimizer as one flat mapping of live tensors, which DCP reads from or writes into.

    With `saved` (names in a checkpoint) the optimizer's missing state is made first, as zeros. Scalars are given as
    views of one element.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        prefix = f"{_OPTIMIZER}{name}/"
        state = optimizer.state[parameter] if saved or parameter in optimizer.state else {}
        for key in (k.removeprefix(prefix) for k in saved or () if k.startswith(prefix)):
            shape = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter.detach())
            state.setdefault(key, shape)
        tensors |= {prefix + key: t.view(1) if t.dim() == 0 else t for key, t in state.items()}
    return tensors


@contextlib.contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """DCP warns at every save and load of a process that is meant to be alone."""
    with warnings.catch_warnings():
        if ranks.world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
