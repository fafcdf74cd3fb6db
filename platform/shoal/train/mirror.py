"""Copies of a run's checkpoints in another folder or in S3, made by a thread while training goes on.

    PLACE/step-00000120/...         the files of RUN/checkpoints/step-00000120; manifest.json is copied last

So a copy with a manifest is whole, and one without was cut off. When the place does not answer, the copy is tried again and
again, until there is a newer checkpoint; training never waits for it, but at its end (`close`). A run whose own folder is
lost goes on from here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from shoal.data import s3
from shoal.data.remote import is_remote
from shoal.errors import CheckpointError, ShoalError
from shoal.train.manifest import MANIFEST

PAUSE, LONGEST_PAUSE = (
    2.0,
    60.0,
)  # seconds before the second attempt, which double; the S3 client tries half a minute by itself
PATIENCE = 120.0  # seconds that the end of a run waits for the last copy

News = tuple[str, dict[str, Any]]  # kind and values of a record


class Mirror:
    """The copies in `place`, a folder or ``s3://BUCKET/PREFIX``; the newest `keep` of them and the one called `best` stay."""

    def __init__(self, place: str, keep: int) -> None:
        self.place, self.keep, self.best = place.rstrip("/"), keep, ""
        self._remote = is_remote(place)
        self._files = s3.S3().filesystem() if self._remote else pafs.LocalFileSystem()
        self._root = "/".join(s3.split(self.place)).rstrip("/") if self._remote else str(Path(place).absolute())
        self._waiting: Path | None = None
        self._busy: Path | None = None
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._changed, self._closing = threading.Condition(), False
        self._thread: threading.Thread | None = None

    # ---- what is there

    def names(self) -> list[str]:
        """Whole copies, oldest first. Raises CheckpointError when the place does not answer."""
        found = self._told(lambda: self._files.get_file_info(self._everything()))
        return sorted(Path(info.path).parent.name for info in found if Path(info.path).name == MANIFEST)

    def fetch(self, name: str, into: Path) -> None:
        """Copy the files of `name` into the new folder `into`. Raises CheckpointError."""
        into.mkdir(parents=True)
        found = self._told(lambda: self._files.get_file_info(pafs.FileSelector(f"{self._root}/{name}")))
        here = pafs.LocalFileSystem()
        for info in found:
            if info.type == pafs.FileType.File:
                target = str(into / Path(info.path).name)
                self._told(lambda a=info.path, b=target: _copy(self._files, a, here, b))  # type: ignore[misc]

    def clear(self) -> None:
        """Remove all copies. Raises CheckpointError."""
        for name in self._told(
            lambda: {Path(i.path).parent.name for i in self._files.get_file_info(self._everything())}
        ):
            if name.startswith("step-"):
                self._told(lambda n=name: self._remove(n))  # type: ignore[misc]

    # ---- copying, in a thread

    def offer(self, path: Path) -> None:
        """Copy the published checkpoint `path` when the one before is copied; one that still waits is given up for it."""
        with self._changed:
            self._waiting = path
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="copy-checkpoints", daemon=True)
            self._thread.start()

    @property
    def needed(self) -> set[Path]:
        """Checkpoints that must not be removed now."""
        with self._changed:
            return {path for path in (self._busy, self._waiting) if path is not None}

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
            self._closing, self._waiting = True, None
            self._changed.notify()
        for path in left:
            self._warn(
                f"checkpoint {path.name} could not be copied to {self.place} in {PATIENCE:.0f} s; it is in {path}"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                self._busy, self._waiting = self._waiting, None
            self._copy_until_newer(self._busy)
            with self._changed:
                self._busy = None

    def _copy_until_newer(self, path: Path) -> None:
        pause, began = PAUSE, time.perf_counter()
        while True:
            try:
                size = self._copy(path)
                took = time.perf_counter() - began
                self._news.put(("copied", {"path": f"{self.place}/{path.name}", "bytes": size, "took": took}))
                return
            except Exception as error:  # whatever it is, training must not feel it
                self._warn(f"cannot copy {path.name} to {self.place} ({_reason(self.place, error)}); trying again")
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._closing, timeout=pause):
                    return
            pause = min(2 * pause, LONGEST_PAUSE)

    def _copy(self, path: Path) -> int:
        """Copy, remove what is no longer kept, and return the bytes that were copied."""
        here, target = pafs.LocalFileSystem(), f"{self._root}/{path.name}"
        if not self._remote:
            self._files.create_dir(target)
        names = sorted((file.name for file in path.iterdir() if file.is_file()), key=lambda name: name == MANIFEST)
        size = sum(_copy(here, str(path / name), self._files, f"{target}/{name}") for name in names)
        for old in self.names()[: -self.keep]:
            if old != self.best:
                self._remove(old)
        return size

    def _remove(self, name: str) -> None:
        """The manifest first: what is left of a copy that was half removed is not taken for a whole one."""
        if self._files.get_file_info(f"{self._root}/{name}/{MANIFEST}").type == pafs.FileType.File:
            self._files.delete_file(f"{self._root}/{name}/{MANIFEST}")
        self._files.delete_dir(f"{self._root}/{name}")

    def _warn(self, text: str) -> None:
        self._news.put(("warning", {"text": text}))

    def _everything(self) -> pafs.FileSelector:
        return pafs.FileSelector(self._root, recursive=True, allow_not_found=True)

    def _told(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(f"checkpoints in {self.place}", got=_reason(self.place, error)) from error


def _copy(source: pafs.FileSystem, path: str, target: pafs.FileSystem, to: str) -> int:
    """Copy one file and return its bytes. In S3 an object is there when it is complete."""
    size = 0
    with source.open_input_stream(path) as reader, target.open_output_stream(to) as writer:
        while chunk := reader.read(2**22):
            writer.write(chunk)
            size += len(chunk)
    return size


def _reason(place: str, error: Exception) -> str:
    if isinstance(error, ShoalError):
        return str(error)
    if is_remote(place) and s3.is_fault(error):
        return str(s3.fault(place, error))
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
