"""Files and batches on the disk, below one folder, each key's apart from the others':

    FOLDER/lock                                  held by the process that runs the batches
    FOLDER/aside/...                             what is being written, or being removed
    FOLDER/OWNER/lock                            held by who counts what a key holds, until what it adds is there
    FOLDER/OWNER/files/file-.../                 about.json, content
    FOLDER/OWNER/batches/batch_.../              batch.json; while it is open also input, answers.jsonl, errors.jsonl, cancel

Notable: what has its place is whole, since folders are made aside and renamed. OWNER is the digest of a key, or ``open``;
what a request names is checked letter by letter before it becomes a path. Any gateway may do what is here, but `Worker` alone
writes into a batch that is there: to cancel is to put a file beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from shoal.api.batches.shapes import OPEN, Batch, BatchRequest, FileObject
from shoal.api.limits import Limits
from shoal.api.wire import NotFoundError
from shoal.errors import ConfigError, RequestError
from shoal.machine import write_aside

ANYBODY = "open"  # owner, where there are no keys
WINDOW_SECONDS = 24 * 3600
STALE_SECONDS = 24 * 3600.0  # after which what lies aside is nobody's: an upload takes minutes

_ID = {kind: re.compile(rf"{kind}[0-9a-f]{{32}}", re.ASCII) for kind in ("file-", "batch_")}
_OWNER = re.compile(rf"{ANYBODY}|[0-9a-f]{{64}}", re.ASCII)
State = dict[str, Any]  # a `Batch` as it is kept, with ``then`` beside it while it is finalized


class RoomError(RequestError):
    """The server's disk is full, or cannot be written."""

    status = 507
    code = "no_room"


class HeldError(RequestError):
    """A key holds as much as it may."""

    status = 409
    code = "too_much_held"


@dataclass(frozen=True)
class Page:
    """Which of a list are asked for."""

    limit: int
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


class Store:
    """What is kept in one folder."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Raises ConfigError for a folder that cannot be made or written."""
        self.folder, self._limits = folder, limits
        self._aside = folder / "aside"
        try:
            self._aside.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("ab"):
                pass
        except OSError as error:
            raise ConfigError("batches", got=f"{folder}: {error.strerror}", allowed="a folder to write") from error

    # --- files --------------------------------------------------------------------------------------------------------

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """A folder aside whose ``content`` is to be written; removed at the end of the block unless `keep` has put it in place.
        Raises RoomError for a disk that takes no more."""
        place = self._aside / uuid.uuid4().hex
        try:
            with room():
                place.mkdir()
                yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def keep(self, place: Path, owner: str, filename: str, purpose: str, file_id: str | None = None) -> FileObject:
        """Puts what `new_file` gave in place as a file of `owner`. Raises RoomError, HeldError."""
        size = (place / "content").stat().st_size
        about: FileObject = {
            "id": file_id or new_id("file-"),
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,  # type: ignore[typeddict-item]
            "status": "processed",
        }
        with room():
            (place / "about.json").write_text(json.dumps(about), encoding="utf-8")
        with self._counting(owner):
            if purpose == "batch":
                self._need_room(owner, size)
            _into_place(place, self._at(owner, "files") / about["id"])
        return about

    def file(self, owner: str, file_id: str) -> FileObject:
        """Raises NotFoundError."""
        found = _read(self._find(owner, "files", file_id) / "about.json")
        if found is None:
            raise _no_such("file", file_id)
        return found  # type: ignore[return-value]

    def files(self, owner: str, page: Page, purpose: str | None) -> tuple[list[FileObject], bool]:
        """The files of a page, and whether there are more. Raises NotFoundError for a place that is none."""
        return self._page(owner, "files", page, lambda about: purpose in (None, about["purpose"]))

    def content(self, owner: str, file_id: str) -> IO[bytes]:
        """The file, opened: who deletes it meanwhile takes nothing from who reads. Raises NotFoundError."""
        try:
            return (self._find(owner, "files", file_id) / "content").open("rb")
        except OSError:
            raise _no_such("file", file_id) from None

    def delete(self, owner: str, file_id: str) -> None:
        """Raises NotFoundError. A batch that runs keeps what it reads."""
        gone = self._aside / uuid.uuid4().hex
        try:
            self._find(owner, "files", file_id).rename(gone)
        except OSError:
            raise _no_such("file", file_id) from None
        shutil.rmtree(gone, ignore_errors=True)

    # --- batches ------------------------------------------------------------------------------------------------------

    def create(self, owner: str, asked: BatchRequest) -> Batch:
        """A new batch over a file of `owner`. Raises NotFoundError, RequestError, HeldError, RoomError."""
        about = self.file(owner, asked.input_file_id)
        if about["purpose"] != "batch":
            raise RequestError("input_file_id", param="input_file_id", got=about["purpose"], allowed="purpose batch")
        now = int(time.time())
        batch: State = {
            "id": new_id("batch_"),
            "object": "batch",
            "endpoint": asked.endpoint,
            "errors": None,
            "input_file_id": about["id"],
            "completion_window": asked.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_SECONDS,
            **dict.fromkeys(("finalizing_at", "completed_at", "failed_at", "expired_at")),
            **dict.fromkeys(("cancelling_at", "cancelled_at")),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": asked.metadata,
        }
        with self.new_file() as place:
            try:
                _link(self._find(owner, "files", about["id"]) / "content", place / "input")
            except FileNotFoundError:
                raise _no_such("file", about["id"]) from None
            (place / "batch.json").write_text(json.dumps(batch), encoding="utf-8")
            with self._counting(owner):
                self._make_room(owner)
                _into_place(place, self._at(owner, "batches") / batch["id"])
        return self._seen(owner, batch)

    def batch(self, owner: str, batch_id: str) -> Batch:
        """Raises NotFoundError."""
        with room():
            return self._seen(owner, self.state(owner, batch_id))

    def batches(self, owner: str, page: Page) -> tuple[list[Batch], bool]:
        """The batches of a page, and whether there are more. Raises NotFoundError for a place that is none."""
        found, more = self._page(owner, "batches", page, lambda _: True)
        return [self._seen(owner, batch) for batch in found], more

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """The batch, which is to end. Raises NotFoundError, and RequestError for one that has ended otherwise."""
        with room():
            state = self.state(owner, batch_id)
        if state["status"] not in (*OPEN, "cancelled"):
            raise RequestError(f"batch {batch_id}", got=state["status"], allowed="one that has not ended")
        if state["status"] != "cancelled":
            with room():
                (self.place(owner, batch_id) / "cancel").touch()
        return self._seen(owner, self.state(owner, batch_id))

    # --- for the worker -----------------------------------------------------------------------------------------------

    def lock(self) -> IO[bytes] | None:
        """Held for as long as what is returned is open, by one process on all machines that share the folder; None where
        another holds it."""
        file = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return file

    def sweep(self) -> None:
        """Removes what was left aside."""
        for place in self._aside.iterdir():
            with suppress(OSError):
                if time.time() - place.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(place)

    def oldest(self, ended: dict[str, set[str]]) -> list[tuple[str, str]]:
        """(owner, id) of the oldest batch of each owner that is none of the `ended` ones; these are, after it, those that are
        there and have ended. Raises OSError."""
        found = []
        for owner in sorted(place.name for place in self.folder.iterdir() if _OWNER.fullmatch(place.name)):
            names = self._names(owner, "batches")
            over = ended[owner] = ended.get(owner, set()).intersection(names)
            for name in names:
                state = None if name in over else _read(self.place(owner, name) / "batch.json")
                if state is not None and state["status"] not in OPEN:
                    over.add(name)
                elif name not in over:
                    found.append((owner, name))
                    break
        return found

    def state(self, owner: str, batch_id: str) -> State:
        """Raises NotFoundError, and OSError where it is there and cannot be read now."""
        path = self._find(owner, "batches", batch_id) / "batch.json"
        found = _read(path)
        if found is None:
            with suppress(FileNotFoundError), path.open("rb"):
                pass
            raise _no_such("batch", batch_id)
        return found

    def place(self, owner: str, batch_id: str) -> Path:
        """The folder of a batch."""
        return self._at(owner, "batches") / batch_id

    def write(self, owner: str, state: State) -> None:
        """Keeps what has become of a batch. Raises OSError."""
        write_aside(self.place(owner, state["id"]) / "batch.json", json.dumps(state))

    def cancelled(self, owner: str, batch_id: str) -> float | None:
        """When it was told to end (Unix time), if it was."""
        try:
            return (self.place(owner, batch_id) / "cancel").stat().st_mtime
        except OSError:
            return None

    def publish(self, owner: str, batch_id: str, name: str, file_id: str) -> None:
        """Makes one of a batch's own files a file of `owner`; does nothing where that is done. Raises OSError, RoomError."""
        if (self._at(owner, "files") / file_id).exists():
            return
        with self.new_file() as place:
            _link(self.place(owner, batch_id) / name, place / "content")
            self.keep(place, owner, f"{batch_id}_{name}", "batch_output", file_id)

    def tidy(self, owner: str, batch_id: str) -> None:
        """Removes what an ended batch needs no more."""
        for name in ("input", "answers.jsonl", "errors.jsonl", "cancel"):
            with suppress(OSError):
                (self.place(owner, batch_id) / name).unlink()

    # ------------------------------------------------------------------------------------------------------------------

    def _at(self, owner: str, kind: str) -> Path:
        assert _OWNER.fullmatch(owner), "an owner is a digest"
        return self.folder / owner / kind

    def _find(self, owner: str, kind: str, name: str) -> Path:
        pattern, what = (_ID["file-"], "file") if kind == "files" else (_ID["batch_"], "batch")
        if not pattern.fullmatch(name):
            raise _no_such(what, name)
        return self._at(owner, kind) / name

    def _names(self, owner: str, kind: str) -> list[str]:
        """Of all that is there, the oldest first: an id begins with the time at which it was made."""
        pattern = _ID["file-" if kind == "files" else "batch_"]
        with suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self._at(owner, kind)) if pattern.fullmatch(name))
        return []

    def _files(self, owner: str) -> list[State]:
        at = self._at(owner, "files")
        found = [_read(at / name / "about.json") for name in self._names(owner, "files")]
        return [about for about in found if about is not None]

    def _page(self, owner: str, kind: str, page: Page, wanted: Any) -> tuple[list[Any], bool]:
        names = self._names(owner, kind)
        if page.order == "desc":
            names.reverse()
        if page.after is not None:
            self._find(owner, kind, page.after)
            if page.order == "desc":
                names = [name for name in names if name < page.after]
            else:
                names = [name for name in names if name > page.after]
        found: list[Any] = []
        for name in names:
            value = _read(self._at(owner, kind) / name / ("about.json" if kind == "files" else "batch.json"))
            if value is not None and wanted(value):
                if len(found) == page.limit:
                    return found, True
                found.append(value)
        return found, False

    def _seen(self, owner: str, state: State) -> Batch:
        """A batch as a client sees it."""
        seen = {name: value for name, value in state.items() if name != "then"}
        told = self.cancelled(owner, state["id"])
        if told is not None and state["status"] in OPEN and state.get("then", "cancelled") == "cancelled":
            seen |= {"status": "cancelling", "cancelling_at": int(told)}
        if state["status"] in OPEN:
            seen |= {"output_file_id": None, "error_file_id": None}  # until they are there
        return seen  # type: ignore[return-value]

    @contextmanager
    def _counting(self, owner: str) -> Iterator[None]:
        """One request at a time, of all gateways, adds to what `owner` holds: two that counted at once would both find room.
        Where the file system has no locks nothing is held. Raises RoomError."""
        with room():
            (self.folder / owner).mkdir(exist_ok=True)
            with (self.folder / owner / "lock").open("ab") as file:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield

    def _need_room(self, owner: str, size: int) -> None:
        """Raises HeldError where `owner` may not hold another file of `size` bytes."""
        held = [found["bytes"] for found in self._files(owner)]
        if len(held) >= self._limits.held_files or sum(held) + size > self._limits.held_bytes:
            allowed = f"{self._limits.held_files} files of {self._limits.held_bytes} bytes together"
            raise HeldError("too many files are kept", got=f"{len(held)}", allowed=allowed, do="delete some")

    def _make_room(self, owner: str) -> None:
        """Forgets the oldest batches that have ended, where there are many. Raises HeldError."""
        states = [_read(self.place(owner, name) / "batch.json") for name in self._names(owner, "batches")]
        known = [state for state in states if state is not None]
        ended = [state["id"] for state in known if state["status"] not in OPEN]
        if len(known) - len(ended) >= self._limits.open_batches:
            raise HeldError("too many batches wait", allowed=self._limits.open_batches, do="wait for one to end")
        for name in ended[: max(0, len(known) + 1 - self._limits.held_batches)]:
            gone = self._aside / uuid.uuid4().hex
            with suppress(OSError):
                self.place(owner, name).rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def room() -> Iterator[None]:
    """In this block an error of the disk is a RoomError."""
    try:
        yield
    except OSError as error:
        raise RoomError("the server cannot keep it", got=error.strerror, do="try again later") from error


def _into_place(place: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    place.rename(final)


def _link(source: Path, target: Path) -> None:
    """`target` with what `source` holds, without a copy where the file system can."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def new_id(kind: str) -> str:
    """An id that no other has; those made later come after it."""
    return f"{kind}{time.time_ns():016x}{uuid.uuid4().hex[:16]}"


def _read(path: Path) -> State | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _no_such(what: str, got: str) -> NotFoundError:
    listed = {"file": "GET /v1/files", "batch": "GET /v1/batches"}[what]
    return NotFoundError(f"no such {what}", got=got[:100], do=f"{listed} lists them")
