"""Rows to the disk, in the process of a scribe (`scribe`), which may wait for it.

    put ──one write──> journal/NAME-000007.jsonl ──16 MiB or 5 minutes──> rows/day=.../part-NAME-000007.parquet
                                                                    thread

Notable: rows are in the journal, and so in the kernel's hands, when `put` returns: a process that is killed loses none of them.
A journal is locked by the process that writes it; one that nobody holds was left by a dead one, and is adopted (`parts`).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import first_line
from shoal.loop.bucket import MARK
from shoal.loop.capture import FEEDBACK, FORGOTTEN, JOURNAL, ROWS, TEXTS, Capture, day_of, now_ms
from shoal.loop.parts import adopt, make_parts, sweep
from shoal.loop.rows import Row

log = logging.getLogger("shoal.loop")

SEND_SECONDS, SEND_AT_END_SECONDS = 30.0, 10.0  # between two times that the bucket gets what is new; for the last one
LOOK_SECONDS, RETRY_SECONDS, TIDY_SECONDS = 0.5, 30.0, 3600.0
COUNT_SECONDS, COUNT_SHARE = 30.0, 20.0  # least between two counts; and least times what a count took
JUMP_MS = 3_600_000  # between what two clocks say has passed: one of them was set


@dataclass(frozen=True)
class Bounds:
    """How much is kept, and for how long."""

    keep_days: int = 90  # of numbers
    keep_texts: int = 30  # days, of texts, and of votes, which have some
    max_bytes: int = 10 * 2**30  # of all: then the oldest day goes, its texts first
    journal_bytes: int = 16 * 2**20  # of one journal, which then becomes a part
    journal_seconds: float = 300.0


class Journal:
    """An open journal: a file that this process holds."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises OSError."""
        hidden = folder / f".{name}"
        self.path = folder / f"{name}.jsonl"
        self.descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
        self.size, self.torn = 0, False
        self.began = time.monotonic()
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self.path)  # only now can it be found by who adopts
        except OSError:
            os.close(self.descriptor)
            hidden.unlink(missing_ok=True)
            raise

    def write(self, lines: Sequence[bytes]) -> int:
        """Lines, in one write; returns how many went in whole: where a part of one did, it is ended by the next. Raises OSError
        where none did, as where somebody has removed the file: it would take all, and nobody could read it."""
        if not os.fstat(self.descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "it was removed")
        data = b"\n" * self.torn + b"".join(lines)
        wrote = os.write(self.descriptor, data)
        whole = data[:wrote].count(b"\n") - (self.torn and wrote > 0)
        self.torn = data[wrote - 1 : wrote] != b"\n" if wrote else self.torn
        self.size += wrote
        return whole

    def close(self) -> None:
        os.close(self.descriptor)


class Writer:
    """Puts rows into a capture. `put` is called by one thread; `close` at the end."""

    def __init__(
        self,
        capture: Capture,
        bounds: Bounds | None = None,
        *,
        wall: Callable[[], int] = now_ms,
        start: bool = True,
        service: str = "",
        clocks: tuple[int, float] | None = None,
    ) -> None:
        """`wall`: the time in ms since 1970; `start`: with a thread of its own; `service`: whose journals they are, by a name
        of its own [none]; `clocks`: what `wall` and the steady clock said when the service began [now]. Raises OSError where no
        journal can be made."""
        self.capture, self.bounds, self._wall = capture, bounds or Bounds(), wall
        self.rows, self.dropped, self.bytes = 0, Counter[str](), 0
        self._folder = capture.folder / JOURNAL
        host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40]
        self._name, self._number = f"{host}-{os.getpid()}-{service}{secrets.token_hex(3)}", 0
        self._lock = threading.Lock()
        self._closed: list[Journal] = []  # that have no part yet
        self._failed_at = self._tidied_at = self._taken_out_at = -1e9
        self._counted_at: float | None = None
        self._count_again = math.inf
        self._over = False  # more is kept than may be, all of it of today
        self._ended = False  # the journal is a part, or about to be one
        self._clocks = clocks or (wall(), time.monotonic())
        self._complained = set[str]()
        self._forgotten = capture.forgotten()
        self._journal = self._open()
        self._end, self._parted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True) if start else None
        self._sender = threading.Thread(target=self._send, name="capture-bucket", daemon=True)
        if self._thread is not None:
            self._thread.start()
            if capture.bucket is not None:
                self._sender.start()

    # --- the scribe's own thread ---------------------------------------------------------------------------------------

    def put(self, *rows: Row, frames: Sequence[int] = ()) -> None:
        """Keep `rows`, in one write, or drop and count them; `frames`: as a line has it, of each [none]. Raises what a row does
        that cannot be a line."""
        self._try(self._see_forgotten)
        forgotten, each = self._forgotten.subjects, zip(rows, frames or [0] * len(rows), strict=True)
        lines = [row.line(frame) for row, frame in each if not (forgotten and row.subject in forgotten)]
        if not lines:
            return
        with self._lock:
            if self._ended:  # the descriptor may be another file's by now
                self._drop("end", "the capture was closed", len(lines))
            elif self._over:
                told = f"{self.bytes} bytes are kept, at most {self.bounds.max_bytes} may be"
                self._drop("bound", told, len(lines))
            else:
                self._write(lines)

    def _see_forgotten(self) -> None:
        self._forgotten = self.capture.forgotten()

    def close(self) -> None:
        """Ends the thread; makes parts of what is left, where it can. A row that comes later is dropped and counted."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if not self._ended:
                self._closed.append(self._journal)
            self._ended = True
        self._make_parts()
        for journal in self._closed:
            journal.close()
        self._closed = []
        self._parted.set()
        if self._sender.is_alive():
            self._sender.join(SEND_AT_END_SECONDS)  # it sends once more

    def _write(self, lines: Sequence[bytes]) -> None:
        """`lines` into the journal, with the lock."""
        try:
            whole, why = self._journal.write(lines), os.strerror(errno.ENOSPC)
        except OSError as error:
            whole, why = 0, error.strerror or str(error)
        self.rows += whole
        if whole < len(lines):
            self._drop("disk", f"cannot write {self._journal.path}: {why}", len(lines) - whole)
        else:
            self._complained.discard("disk")

    def _drop(self, reason: str, told: str, count: int) -> None:
        self.dropped[reason] += count
        self._complain(reason, f"captured rows are dropped: {told}; they are counted until it has room again")

    def _complain(self, about: str, line: str) -> None:
        """Logs `line`, once until `about` is well again."""
        if about not in self._complained:
            self._complained.add(about)
            log.error("%s", line)

    # --- the writer's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """One round of the writer's thread: changes journals, makes parts, adopts, tidies. What fails keeps none of the others
        from being done."""
        self._try(self._rotate)
        if self._closed and time.monotonic() > self._failed_at + RETRY_SECONDS:
            self._try(self._make_parts)
        if time.monotonic() > self._tidied_at + TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            self._try(self._adopt)
            self._try(self.tidy)
        elif time.monotonic() > self._count_again:
            self._count_again = time.monotonic() + TIDY_SECONDS  # where it fails
            self._try(self.count)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
            self._complained.discard(work.__name__)
        except Exception as error:  # the service goes on, and rows with it
            self._complain(work.__name__, f"capture: {first_line(error)}; it is tried again")

    def _adopt(self) -> None:
        adopt(self.capture)

    def _send(self) -> None:
        """The thread that keeps the bucket as the copy is. It may wait for the bucket as long as it likes."""
        while True:
            over = self._end.wait(SEND_SECONDS)
            if over and self._thread is not None:
                self._thread.join()
            if over:
                self._parted.wait()
            try:
                self.send(over)
                self._complained.discard("bucket")
            except Exception as error:  # tried again, for as long as it takes
                self._complain(
                    "bucket", f"capture: {first_line(error)}; rows stay on this disk until the bucket takes them"
                )
            if over:
                return

    def send(self, over: bool = False) -> None:
        """Send what is new, and then hear who was forgotten elsewhere: what of them lies here, or was sent before, goes at
        once, but no more often than once an hour, and where it is `over`. Raises what the bucket, or the disk, says."""
        self.capture.sent()
        if self.capture.bucket is None:
            return
        self.capture.bucket.pull(FORGOTTEN.partition(".")[0])
        if over or time.monotonic() > self._taken_out_at + TIDY_SECONDS:
            from shoal.loop.forget import take_out  # what looks is nothing that a scribe needs

            if take_out(self.capture):
                self._taken_out_at = time.monotonic()

    @property
    def waiting(self) -> int:
        """Files that the bucket does not have yet."""
        return 0 if self.capture.bucket is None else self.capture.bucket.waiting

    def _open(self) -> Journal:
        self._number += 1
        return Journal(self._folder, f"{self._name}-{self._number:06}")

    def _rotate(self) -> None:
        """Begin another journal where this one is large, old, or removed; an empty one stays."""
        journal = self._journal
        gone = not journal.path.exists()
        old = time.monotonic() > journal.began + self.bounds.journal_seconds
        if not gone and not (journal.size and (old or journal.size >= self.bounds.journal_bytes)):
            return
        try:
            fresh = self._open()
        except OSError as error:
            self._complain("disk", f"capture: cannot begin a journal: {error.strerror}; rows go on in the one before")
            return
        with self._lock:
            self._journal = fresh
        self._closed.append(journal)

    def _make_parts(self) -> None:
        """Of all journals that are closed: one that cannot be a part keeps no other from it."""
        left = []
        for journal in self._closed:
            try:
                make_parts(self.capture, journal.path)
            except Exception as error:
                if journal.path.exists():  # else somebody removed it
                    left.append(journal)
                    told = f"capture: no part of {journal.path.name}: {first_line(error)}; its rows stay in it"
                    self._complain("parts", told)
                    continue
            journal.close()
        self._closed = left
        if left:
            self._failed_at = time.monotonic()
        else:
            self._complained.discard("parts")

    def tidy(self) -> None:
        """Removes the oldest day, one at a time, where it is too old, and measures what is kept then."""
        sweep(self.capture.folder)
        if not self._clock_was_set():  # else "today" may be any day
            today, keep_texts = day_of(self._wall()), self.bounds.keep_texts
            for kind, keep in ((ROWS, self.bounds.keep_days), (TEXTS, keep_texts), (FEEDBACK, keep_texts)):
                oldest = next(iter(self.capture.days(kind)), today)
                if oldest < day_of(self._wall() - keep * 86_400_000):
                    self._remove(kind, oldest, f"older than {keep} days", everywhere=True)
        self.count()

    def count(self) -> None:
        """Measures what is kept, by all gateways together, and removes the oldest days where it is too much. Says when to do it
        again: before half of the room that is left is taken, as fast as it was taken since the last time."""
        began, before = time.monotonic(), self.bytes
        self.bytes = _size(self.capture.folder)
        if not self._clock_was_set():
            self._make_room(day_of(self._wall()))
        took, room, grown = time.monotonic() - began, self.bounds.max_bytes - self.bytes, self.bytes - before
        wait = COUNT_SECONDS
        if self._counted_at is not None:
            wait = TIDY_SECONDS if grown <= 0 else 0.5 * room * (began - self._counted_at) / grown
        self._counted_at, least = began, max(COUNT_SECONDS, COUNT_SHARE * took)
        self._count_again = began + min(TIDY_SECONDS, max(least, wait))

    def _make_room(self, today: str) -> None:
        while self.bytes > self.bounds.max_bytes and (first := self._oldest(today)) is not None:
            day, _, kind = first
            if self.capture.bucket is not None and not self.capture.bucket.leave(
                self.capture.folder / kind / f"day={day}"
            ):
                break  # what the bucket does not have yet stays
            self._remove(kind, day, f"{self.bytes} bytes are kept, at most {self.bounds.max_bytes} may be")
            self.bytes = _size(self.capture.folder)
            if day in self.capture.days(kind):  # the disk does not let it go
                break
        self._over = self.bytes > self.bounds.max_bytes

    def _oldest(self, today: str) -> tuple[str, int, str] | None:
        """The oldest day before `today` that has anything, and of what has one that day what goes first, with its place in that
        order: texts, which are most of it; votes go last, since people made them."""
        kinds = (TEXTS, ROWS, FEEDBACK)
        found = [(day, place, kind) for place, kind in enumerate(kinds) for day in self.capture.days(kind)[:1]]
        return min((each for each in found if each[0] < today), default=None)

    def _clock_was_set(self) -> bool:
        """Whether the clock was set since the start: then no day is removed for its age until the next start."""
        wall, steady = self._clocks
        jumped = self._wall() - wall - round(1000 * (time.monotonic() - steady))
        if abs(jumped) < JUMP_MS:
            return False
        self._complain(
            "clock", f"capture: the clock was set by {jumped / 3.6e6:+.1f} h; no day is removed until a restart"
        )
        return True

    def _remove(self, kind: str, day: str, why: str, *, everywhere: bool = False) -> None:
        """`everywhere`: from the bucket as well, which is told by what is left of the folder."""
        log.warning("capture: removed %s of %s: %s", kind, day, why)
        folder = self.capture.folder / kind / f"day={day}"
        if not (everywhere and (folder / MARK).is_file()):
            shutil.rmtree(folder, ignore_errors=True)
            return
        for path in folder.glob("[!.]*"):
            with suppress(OSError):
                path.unlink()


def _size(folder: Path) -> int:
    """Bytes of the files in `folder`."""
    found = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.stat(os.path.join(at, name)).st_size
    return found
