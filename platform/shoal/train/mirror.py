"""Copies of a run's checkpoints in another folder or in S3, made by a thread while training goes on.

    PLACE/step-00000120/...         the files of RUN/checkpoints/step-00000120; manifest.json is copied last

So a copy with a manifest is whole, and one without was cut off. When the place does not answer, the copy is tried again and
again, until there is a newer checkpoint; training never waits for it, but at its end (`close`). A run whose own folder is
lost goes on from here.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from shoal.data.sources import s3
from shoal.data.sources.s3 import is_remote
from shoal.errors import CheckpointError, ShoalError, first_line
from shoal.machine import aside
from shoal.train.manifest import MANIFEST, STEP

# seconds before the second attempt, which double; the S3 client tries half a minute by itself
PAUSE, LONGEST_PAUSE = 2.0, 60.0
PATIENCE = 120.0  # seconds that the end of a run waits for the last copy

News = tuple[str, dict[str, Any]]  # kind and values of a record


class Place(Protocol):
    """Where copies lie; names are relative, such as ``step-00000120/state.json``."""

    def files(self) -> list[str]: ...
    def put(self, file: Path, name: str) -> None: ...
    def get(self, name: str, file: Path) -> None: ...
    def remove(self, name: str) -> None: ...


class Folder:
    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def files(self) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in self.root.glob("*/*")]

    def put(self, file: Path, name: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        with aside(self.root / name) as beside:
            shutil.copyfile(file, beside)

    def get(self, name: str, file: Path) -> None:
        shutil.copyfile(self.root / name, file)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # until it is empty
            (self.root / name).parent.rmdir()


class Bucket:
    def __init__(self, uri: str) -> None:
        self.bucket, key = s3.split(uri)
        self.prefix = f"{key.strip('/')}/" if key.strip("/") else ""
        self.client = s3.S3().client()

    def files(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return [item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", ())]

    def put(self, file: Path, name: str) -> None:
        self.client.upload_file(str(file), self.bucket, self.prefix + name)

    def get(self, name: str, file: Path) -> None:
        self.client.download_file(self.bucket, self.prefix + name, str(file))

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)


class Mirror:
    """The copies in `place`, a folder or ``s3://BUCKET/PREFIX``; the newest `keep` of them and the one called `best` stay."""

    def __init__(self, place: str, keep: int) -> None:
        self.place, self.keep, self.best = place.rstrip("/"), keep, ""
        self._at: Place = Bucket(self.place) if is_remote(place) else Folder(self.place)
        self._waiting: list[Path] = []
        self._busy: Path | None = None
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._changed, self._closing = threading.Condition(), False
        self._thread: threading.Thread | None = None

    # ---- what is there

    def names(self) -> list[str]:
        """Whole copies, oldest first. Raises CheckpointError when the place does not answer."""
        with self._told():
            return self._whole(self._at.files())

    def fetch(self, name: str, into: Path) -> None:
        """Copy the files of `name` into the new folder `into`. Raises CheckpointError."""
        into.mkdir(parents=True)
        with self._told():
            for file in self._at.files():
                plain = file.removeprefix(f"{name}/")
                if plain != file and Path(plain).name == plain:  # others are not ours, and might lead elsewhere
                    self._at.get(file, into / plain)

    def clear(self) -> None:
        """Remove all copies. Raises CheckpointError."""
        with self._told():
            self._remove([file for file in self._at.files() if _checkpoint(file)])

    # ---- copying, in a thread

    def offer(self, path: Path) -> None:
        """Copy the published checkpoint `path` when the one before is copied; those that still wait are given up for it, the
        best one apart."""
        with self._changed:
            self._waiting = [*self._bests(self._waiting), path]
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="copy-checkpoints", daemon=True)
            self._thread.start()

    @property
    def needed(self) -> set[Path]:
        """Checkpoints that must not be removed now."""
        with self._changed:
            return {path for path in (self._busy, *self._waiting) if path is not None}

    def news(self) -> Iterable[News]:
        """What has happened since this was asked last: ``copied`` and ``warning`` records."""
        while not self._news.empty():
            yield self._news.get()

    def close(self) -> None:
        """Wait for the last copy, at most PATIENCE seconds; `news` says how it went."""
        end = time.monotonic() + PATIENCE
        while self.needed and time.monotonic() < end:
            time.sleep(0.05)
        left = self.needed
        with self._changed:
            self._closing, self._waiting = True, []
            self._changed.notify()
        for path in left:
            self._warn(
                f"checkpoint {path.name} could not be copied to {self.place} in {PATIENCE:.0f} s; it is in {path}"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._busy = self._waiting.pop(0)
            copied = self._copy_until_newer(self._busy)
            with self._changed:
                if not copied and not self._closing:
                    self._waiting += self._bests([self._busy])
                self._busy = None

    def _copy_until_newer(self, path: Path) -> bool:
        """Try until it is copied, or there is a newer one; which of the two?"""
        pause, began = PAUSE, time.perf_counter()
        while True:
            try:
                size = self._copy(path)
                took = time.perf_counter() - began
                self._news.put(("copied", {"path": f"{self.place}/{path.name}", "bytes": size, "took": took}))
                return True
            except Exception as error:  # whatever it is, training must not feel it
                self._warn(f"cannot copy {path.name} to {self.place} ({_reason(self.place, error)}); trying again")
            with self._changed:
                if self._changed.wait_for(lambda: bool(self._waiting or self._closing), timeout=pause):
                    return False
            pause = min(2 * pause, LONGEST_PAUSE)

    def _bests(self, paths: list[Path]) -> list[Path]:
        return [path for path in paths if path.name == self.best]

    def _copy(self, path: Path) -> int:
        """Copy, remove what is no longer kept, and return the bytes that were copied."""
        files = sorted((file for file in path.iterdir() if file.is_file()), key=lambda file: file.name == MANIFEST)
        for file in files:
            self._at.put(file, f"{path.name}/{file.name}")
        there = self._at.files()
        # A copy of a later step was damaged, or the run would have gone on from it.
        stay = {self.best, *[name for name in self._whole(there) if name <= path.name][-self.keep :]}
        self._remove([file for file in there if (name := _checkpoint(file)) and name not in stay])
        return sum(file.stat().st_size for file in files)

    def _remove(self, names: list[str]) -> None:
        """Manifests first: what is left of a copy that was half removed is not taken for a whole one."""
        for name in sorted(names, key=lambda name: not name.endswith(MANIFEST)):
            self._at.remove(name)

    @staticmethod
    def _whole(files: Iterable[str]) -> list[str]:
        return sorted(name for file in files if (name := _checkpoint(file)) and file == f"{name}/{MANIFEST}")

    def _warn(self, text: str) -> None:
        self._news.put(("warning", {"text": text}))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # boto3's errors have no kind in common
            raise CheckpointError(f"checkpoints in {self.place}", got=_reason(self.place, error)) from error


def _checkpoint(file: str) -> str | None:
    """The name of the checkpoint that `file` is of; None where it is not ours."""
    name, slash, _ = file.partition("/")
    return name if slash and STEP.fullmatch(name) else None


def _reason(place: str, error: Exception) -> str:
    if isinstance(error, ShoalError):
        return str(error)
    if is_remote(place):
        return str(s3.fault(place, error))
    return first_line(error)
