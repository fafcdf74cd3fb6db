"""A run in S3: each rank puts its own files of a checkpoint there, and rank 0 the manifest, which is the commit. No folder is
shared.

    s3://BUCKET/PREFIX/checkpoints/step-00000120/   the files of one in a folder (`checkpoint`); the manifest has their tags too
    s3://BUCKET/PREFIX/metrics.jsonl                as of the newest checkpoint, and of the end
    s3://BUCKET/PREFIX/model/                       the model (`data.models`)
    s3://BUCKET/PREFIX/.lease.json  stop            who trains there; its presence asks for a checkpoint and the end
    CACHE/runs/KEY/                                 of each machine: what is written or read now; where rank 0 is, the metrics

Notable: what is put goes from this machine, so a node that is lost takes nothing with it and a rank that goes on elsewhere
reads what it needs (`ranges`). Whether a checkpoint is whole is told by sizes and tags, in one request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shoal.data.lease import leased
from shoal.data.place import Bucket, said
from shoal.data.ranged import cache, room
from shoal.data.sources.s3 import S3, is_remote
from shoal.errors import CheckpointError, ConfigError, DataError, ShoalError
from shoal.machine import aside
from shoal.train.checkpoint import CheckpointStore, Saved
from shoal.train.log import metrics_file
from shoal.train.manifest import MANIFEST, STATE, STEP
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan
from shoal.train.ranges import RangedReader
from shoal.train.snapshot import Entry, random_file
from shoal.train.state import TrainState, state_of

CHECKPOINTS, METRICS = "checkpoints/", "metrics.jsonl"
LEASE, STOP = ".lease.json", "stop"
LOOK = 2.0  # seconds between two looks whether an end is asked for

There = dict[str, tuple[int, str]]  # file of a checkpoint -> bytes and tag of its object


@lru_cache(maxsize=16)
def bucket_of(uri: str) -> Bucket:
    return Bucket(uri, S3())


def placed(plan: FitPlan) -> FitPlan:
    """The plan of a run in S3 with this machine's folder of it as `run`, and where it is as `uri`; any other as it is."""
    if not is_remote(plan.run):
        return plan
    return dataclasses.replace(plan, run=str(folder_of(plan.run)), uri=plan.run.rstrip("/"))


def folder_of(run: str | Path) -> Path:
    """This machine's folder of a run in S3; of any other, that."""
    if not is_remote(run):
        return Path(run)
    key = "\0".join((S3().resolved().endpoint, str(run).rstrip("/")))
    return cache() / "runs" / hashlib.sha256(key.encode()).hexdigest()[:32]


def store_of(run: str | Path) -> CheckpointStore:
    """The checkpoints of a run, to be read."""
    return BucketStore(str(run), folder_of(run)) if is_remote(run) else CheckpointStore(run)


def need_possible(plan: FitPlan) -> None:
    """Raises ConfigError where a run in S3 is asked for what needs a folder that all workers see."""
    run = plan.uri or plan.run
    if not is_remote(run):
        return
    for name, given in (("mirror", plan.mirror), ("profile", plan.profile), ("lora_rank", plan.train.lora_rank)):
        if given:
            raise ConfigError(name, got=given, do=f"leave it out, or give a folder: {run} is in S3")


@contextmanager
def commanding(plan: FitPlan) -> Iterator[FitPlan]:
    """Hold the lease of a run in S3 in this block, for a command whose workers are elsewhere; yields the plan that says so.
    Raises DataError where another command trains there."""
    bucket, run = bucket_of(plan.run), secrets.token_hex(8)
    with leased(bucket, run, command="run", name=LEASE):
        bucket.remove([STOP])
        yield dataclasses.replace(plan, lease=run)


def ask_to_stop(plan: FitPlan) -> None:
    """Ask the run of `plan`, which is in S3, for a checkpoint and its end, unless another command took it over: that one would
    end. Where it cannot be asked a line says so."""
    try:
        if has_lease(plan):
            bucket_of(plan.run).put_text(STOP, b"")
    except DataError as error:
        print(f"warning: {plan.run} could not be asked to stop: {error}", file=sys.stderr)


def has_lease(plan: FitPlan) -> bool:
    """Whether the run of `plan`, of which `commanding` gave it the lease, is still its own. Raises DataError."""
    return said(bucket_of(plan.run), LEASE).get("run") == plan.lease


@contextmanager
def writing(plan: FitPlan, stop: Path) -> Iterator[FitPlan]:
    """On rank 0: the lease is this run's in this block, and the file `stop` is there once an end is asked for, or another
    command took over: nothing that this run does would ever be kept. Raises DataError where another command trains there."""
    bucket, over, lost, asked = bucket_of(plan.uri), *(threading.Event() for _ in range(3))

    def look() -> None:
        while not over.wait(LOOK):
            with contextlib.suppress(DataError):  # asked again
                if said(bucket, LEASE).get("run") != plan.lease:
                    lost.set()
                if not lost.is_set() and bucket.tag(STOP) is not None:
                    asked.set()
                if lost.is_set() or asked.is_set():
                    stop.touch()

    with contextlib.ExitStack() as held:
        if not plan.lease:
            plan = dataclasses.replace(plan, lease=secrets.token_hex(8))
            held.enter_context(leased(bucket, plan.lease, command="run", name=LEASE))
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.unlink(missing_ok=True)
        thread = threading.Thread(target=look, name="look-for-stop", daemon=True)
        thread.start()
        try:
            yield plan
        finally:
            over.set()
            thread.join()
            stop.unlink(missing_ok=True)
            # Whoever asked has been heard; the run may have removed the file by then.
            if asked.is_set() and not lost.is_set():
                with contextlib.suppress(DataError):
                    bucket.remove([STOP])


class BucketStore(CheckpointStore):
    """The checkpoints of a run at `uri`; `run`: this machine's folder of it. `lease`: whose it must be to publish; "": any."""

    def __init__(self, uri: str, run: str | Path, keep: int = 2, lease: str = "") -> None:
        super().__init__(run, keep)
        self._bucket, self._lease = bucket_of(uri), lease
        self._readers: dict[str, RangedReader] = {}

    def shown(self, path: Path) -> str:
        return f"{self._bucket.uri}/{CHECKPOINTS}{path.name}"

    def steps(self) -> list[Path]:
        return sorted(self.directory / name for name, files in self._there().items() if MANIFEST in files)

    def state(self, path: Path) -> TrainState:
        data = self._bucket.text(f"{_at(path)}{STATE}")
        if data is None:
            raise CheckpointError(f"{self.shown(path)} lacks {STATE}")
        return state_of(json.loads(data), self.shown(path))

    def publish(self, ranks: Ranks) -> Saved:
        saved = self.pending
        try:
            return super().publish(ranks)
        except CheckpointError:
            if saved is not None and ranks.first:
                with contextlib.suppress(ShoalError):  # the next run removes it
                    self._need_lease()  # else it may be another's
                    self._remove({saved.path})
            raise
        finally:
            if saved is not None:
                shutil.rmtree(saved.aside, ignore_errors=True)

    def abandon(self, ranks: Ranks) -> None:
        saved = self.pending
        super().abandon(ranks)
        if saved is not None:
            shutil.rmtree(saved.aside, ignore_errors=True)

    def tidy(self) -> None:
        with contextlib.suppress(ShoalError):  # the next one does
            self._need_lease()  # what is later than ours is another's
            super().tidy()

    def newest(self, ranks: Ranks, warn: Callable[[str], None]) -> Path | None:
        for left in self.directory.glob(".*"):  # by a run that was killed: nobody writes before all have been here
            shutil.rmtree(left, ignore_errors=True)
        return super().newest(ranks, warn)

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        try:
            super().load(path, model, optimizer, ranks)
        finally:
            for reader in self._readers.values():
                shutil.rmtree(reader.path, ignore_errors=True)
            self._readers.clear()

    def leave(self, ranks: Ranks) -> None:
        if ranks.first:
            with contextlib.suppress(ShoalError):
                self._need_lease()
                self._put_metrics()

    # ---- what a folder does by files

    def _newest(self, warn: Callable[[str], None]) -> Path | None:
        self._need_lease()  # what is half put may be another's
        self._bring_metrics()
        there = self._there()
        self._remove({self.directory / name for name, files in there.items() if MANIFEST not in files})
        for name in sorted((name for name, files in there.items() if MANIFEST in files), reverse=True):
            path = self.directory / name
            problem = self._damage(path, there[name])
            if problem is None:
                return path
            warn(f"checkpoint {self.shown(path)} is damaged ({problem}); trying the one before")
        return None

    def _problem(self, path: Path) -> str | None:
        return self._damage(path, self._there().get(path.name, {}))

    def _damage(self, path: Path, files: There) -> str | None:
        """What is wrong with a checkpoint that has these `files`, or None."""
        try:
            manifest = self._manifest(path)
            if STATE not in manifest:
                return f"{MANIFEST} does not list {STATE}"
            for name, listed in manifest.items():
                if name not in files:
                    return f"{name} is missing"
                size, tag = files[name]
                if size != listed["bytes"]:
                    return f"{name} has {size} bytes, not {listed['bytes']}"
                if tag != listed["tag"]:
                    return f"{name} is not what was put: another tag"
        except (CheckpointError, KeyError, TypeError, AttributeError, ValueError) as error:
            return str(error)
        return None

    def _manifest(self, path: Path) -> dict[str, Entry]:
        data = self._bucket.text(f"{_at(path)}{MANIFEST}")
        if data is None:
            raise CheckpointError(f"{self.shown(path)} has no {MANIFEST}")
        return dict(json.loads(data))

    def _make_ready(self, aside: Path, final: Path, ranks: Ranks) -> None:
        aside.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            self._need_lease()
            # Of one that was damaged: it is not whole while it is replaced.
            self._bucket.remove([f"{_at(final)}{MANIFEST}"])

    def _sender(self, final: Path) -> Callable[[Path], Entry] | None:
        def send(path: Path) -> Entry:
            tag = self._bucket.put(path, f"{_at(final)}{path.name}")
            path.unlink()
            return {"tag": tag}

        return send

    def _publish(self, saved: Saved, files: Mapping[str, Any]) -> None:
        self._need_lease()
        self._put_metrics()
        data = json.dumps(saved.told(), indent=1).encode()
        tag = self._bucket.put_text(f"{_at(saved.path)}{STATE}", data)
        state = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tag": tag}
        manifest = json.dumps({**files, STATE: state}, indent=1).encode()
        self._bucket.put_text(f"{_at(saved.path)}{MANIFEST}", manifest)

    def _remove(self, paths: set[Path]) -> None:
        for path in paths:
            names = [name for name, _ in self._bucket.sizes(_at(path))]
            for some in ([f"{_at(path)}{MANIFEST}"], names):  # what is left of one that was half removed is not whole
                self._bucket.remove(some)

    def _remove_all(self) -> None:
        self._need_lease()
        self._remove({self.directory / name for name in self._there()})

    def _reader(self, path: Path, ranks: Ranks) -> RangedReader:
        if path.name not in self._readers:
            shards = {name: told for name, told in self._manifest(path).items() if name.startswith("shard-")}
            folder = self.directory / f".{path.name}-{ranks.rank}-{secrets.token_hex(4)}.read"
            self._readers[path.name] = RangedReader(self._bucket, _at(path), shards, folder)
        return self._readers[path.name]

    def _random(self, path: Path, ranks: Ranks) -> bytes | None:
        name = random_file(ranks)
        listed = self._manifest(path).get(name)
        if listed is None:
            return None
        return self._bucket.part(f"{_at(path)}{name}", 0, int(listed["bytes"]), tag=str(listed["tag"]))

    def _there(self) -> dict[str, There]:
        """The files of each checkpoint, whole or not."""
        found: dict[str, There] = {}
        for name, size, tag in self._bucket.listed(CHECKPOINTS):
            step, slash, file = name.removeprefix(CHECKPOINTS).partition("/")
            if slash and STEP.fullmatch(step):
                found.setdefault(step, {})[file] = (size, tag)
        return found

    def _need_lease(self) -> None:
        """Raises CheckpointError where another command took over."""
        if self._lease and said(self._bucket, LEASE).get("run") != self._lease:
            raise CheckpointError(
                f"another run took over {self._bucket.uri}", do="let that one end, and give another --out"
            )

    def _put_metrics(self) -> None:
        file = metrics_file(self.directory.parent)
        if file.is_file():
            self._bucket.put(file, METRICS)

    def _bring_metrics(self) -> None:
        """The run's metrics, where this machine's are not these and what followed."""
        file, data = metrics_file(self.directory.parent), self._bucket.text(METRICS)
        if data is None or (file.is_file() and file.read_bytes().startswith(data)):
            return
        with room(file.parent), aside(file) as beside:
            beside.write_bytes(data)


def _at(path: Path) -> str:
    """What the names of the objects of a checkpoint begin with."""
    return f"{CHECKPOINTS}{path.name}/"
