"""A gateway's end of its capture: what it hands over to the scribe that writes it, a process of its own.

    put ── one write that never waits ──> pipe, 1 MiB ──> scribe ──> journal      beside: memory that both see, with its counts
     └─ kept until the scribe has it in a journal: another scribe gets it again where one was killed

Notable: what is in the pipe outlives who wrote it: the scribe reads it to its end, and then ends itself. A full pipe is a row
that is dropped and counted. The scribe is no child of this process: a worker of Ray kills its children when it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
import secrets
import select
import subprocess
import sys
import termios
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import shoal
from shoal.data.sources.s3 import is_remote
from shoal.loop.capture import now_ms
from shoal.loop.facts import Facts, lighter, packed
from shoal.loop.writer import Bounds

log = logging.getLogger("shoal.loop")

PIPE_BYTES = 2**20  # as many as Linux lets anybody have
WHOLE = select.PIPE_BUF  # bytes of a write that goes in whole or not at all
KEPT = 4096  # rows that wait here while there is no scribe
KEPT_BYTES = 2**24  # of these: past that one waits without its prompts
CLOSE_SECONDS = 20.0  # for the last rows to be parts; the scribe goes on by itself after that
LIVED_SECONDS, LATEST_SECONDS = 10.0, 30.0  # a scribe that ended sooner is begun again later and later, up to this
WAIT_SECONDS = 0.01  # between two looks whether it is done


class Shared:
    """Counts that a scribe tells its gateway, in memory that both see; a scribe goes on from those of the one before."""

    NAMES = ("taken", "rows", "bytes", "waiting", "pid", "ended", "disk", "bound", "end", "fault")
    SIZE = 8 * len(NAMES)

    def __init__(self, descriptor: int) -> None:
        self._cells = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("q")

    def __getitem__(self, name: str) -> int:
        return self._cells[self.NAMES.index(name)]

    def __setitem__(self, name: str, value: int) -> None:
        self._cells[self.NAMES.index(name)] = value

    @property
    def taken(self) -> int:
        """Frames that are in a journal, or counted: asked for with each row."""
        return self._cells[0]


DROPPED = Shared.NAMES[-4:]


class Outbox:
    """What hands over rows, and sees to it that there is a scribe. Begins one with the first row, or when it is looked at."""

    def __init__(self, folder: str, bounds: Bounds | None = None) -> None:
        """`folder`: of a capture, as `Capture` takes it."""
        self._given = {
            "folder": folder if is_remote(folder) else os.path.abspath(folder),  # of now: a process may go elsewhere
            "bounds": asdict(bounds or Bounds()),
            "service": secrets.token_hex(4),
            "clocks": (now_ms(), time.monotonic()),
        }
        self._most = (bounds or Bounds()).max_bytes
        self._counted = 0  # bytes as of the last count
        self._added = Counter[int]()  # minute -> bytes that were put beside the rows, and may not be counted yet
        self.counts = Counter[str]()  # dropped here, by reason
        self.scribes = 0  # that were begun
        self._memory = os.memfd_create("capture")
        os.ftruncate(self._memory, Shared.SIZE)
        self._shared = Shared(self._memory)
        self._pipe = -1
        self._kept = deque[tuple[float, bytes]]()  # frames that no journal has yet, and when they came
        self._kept_bytes = 0
        self._taken = 0  # frames that were kept and are no more
        self._unsent = 0  # of those that are, the last so many are in no pipe
        self._lock = threading.RLock()
        self._begun, self._again, self._short = 0.0, 0.0, 0
        self._forking: subprocess.Popen[bytes] | None = None
        self._left = set[int]()  # scribes that have ended, and may be this process's to reap
        self._ended = False
        self._complained = set[str]()

    # --- rows ---------------------------------------------------------------------------------------------------------

    def put(self, facts: Facts) -> None:
        """Hand over what a request was, or drop and count it. Never waits; raises nothing but what `facts.packed` does."""
        frame, now = packed(facts), time.monotonic()
        with self._lock:
            if self._ended:
                self.drop("end", "the capture was closed")
                return
            self._forget_taken()
            if self._pipe < 0:
                self._begin()
            if self._unsent and not self._sent_rest():
                self._put_later(now, frame)
                return
            try:
                frame = self._fitting(frame)
                self._send(frame)
            except BlockingIOError:
                self.drop("queue", "the scribe is too slow for the rows that come")
            except OSError:  # the scribe is gone
                self._put_later(now, frame)
                self._lose()
            else:
                self._keep(now, frame)
                if "queue" in self._complained and self._fits(self._room() // 2):
                    self._complained.discard("queue")  # not for one row that found a place among others that do not

    def drop(self, reason: str, told: str = "") -> None:
        """Count a row that is not kept; with what is `told` the log says so, once until there is room again."""
        self.counts[reason] += 1
        if told and reason not in self._complained:
            self._complained.add(reason)
            log.error("captured rows are dropped: %s; they are counted until it has room again", told)

    def _put_later(self, now: float, frame: bytes) -> None:
        if len(self._kept) >= KEPT:
            self.drop("queue", "there is no scribe for the rows that come")
            return
        self._keep(now, frame if self._kept_bytes + len(frame) <= KEPT_BYTES else lighter(frame, WHOLE))
        self._unsent += 1

    def _keep(self, now: float, frame: bytes) -> None:
        self._kept.append((now, frame))
        self._kept_bytes += len(frame)

    def _forget_taken(self) -> None:
        taken = self._shared.taken
        while self._taken < taken and self._kept:
            self._kept_bytes -= len(self._kept.popleft()[1])
            self._taken += 1

    def _send(self, frame: bytes) -> None:
        """Into the pipe, whole. Raises BlockingIOError where it has no room, another OSError where nobody reads it."""
        if self._pipe < 0:
            raise BrokenPipeError
        if len(frame) > WHOLE and not self._fits(len(frame)):
            raise BlockingIOError
        if os.write(self._pipe, frame) < len(frame):
            raise BrokenPipeError  # what comes after half a frame would be read wrong

    def _fits(self, size: int) -> bool:
        """Whether the pipe surely takes so many bytes at once: its pages may be half full."""
        used = int.from_bytes(fcntl.ioctl(self._pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
        return 2 * used + size <= self._room()

    def _room(self) -> int:
        """Bytes that the pipe takes when it is empty: its first and last pages may be nearly so."""
        return fcntl.fcntl(self._pipe, fcntl.F_GETPIPE_SZ) - 3 * mmap.PAGESIZE

    def _fitting(self, frame: bytes) -> bytes:
        """`frame`, or so much of it as this pipe ever takes: all rows would wait behind one that it never does."""
        if self._pipe < 0 or len(frame) <= WHOLE or len(frame) <= self._room():
            return frame
        return lighter(frame, max(WHOLE, self._room()))

    def _sent_rest(self) -> bool:
        """Send what waits for a scribe, as far as it goes; whether all of it went."""
        while self._unsent:
            came, whole = self._kept[-self._unsent]
            try:
                frame = self._fitting(whole)
                self._kept[-self._unsent], self._kept_bytes = (came, frame), self._kept_bytes - len(whole) + len(frame)
                self._send(frame)
            except OSError:
                return False
            self._unsent -= 1
        return True

    # --- the scribe ---------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """See that there is a scribe; to be called once a second."""
        with self._lock:
            self._forget_taken()
            if self._forking is not None and self._forking.poll() is not None:
                self._forking = None
            self._reap()
            if self._ended:
                return
            if self._pipe >= 0 and (self._is_broken() or self._is_gone()):
                self._lose()
            elif self._pipe < 0:
                self._begin()
            self._sent_rest()

    def _is_broken(self) -> bool:
        """Whether nobody reads the pipe."""
        poll = select.poll()
        poll.register(self._pipe, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))

    def _is_gone(self) -> bool:
        """Whether the scribe has ended, though its end of the pipe is open: in a process that was forked while it was begun."""
        return not self._lives() if self._shared["pid"] else self._forking is None

    def _reap(self) -> None:
        """A process that has no parent is the first one's of its container, which this may be."""
        for pid in [*self._left]:
            try:
                done, _ = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                done = pid
            if done:
                self._left.discard(pid)

    def _lose(self) -> None:
        """The scribe has ended, and nobody told it to: begin another, with what no journal has."""
        if self._pipe < 0:
            return
        self._forget_taken()
        self._left |= {self._shared["pid"]} - {0}
        os.close(self._pipe)
        self._pipe, lived = -1, time.monotonic() - self._begun
        self._short = 0 if lived > LIVED_SECONDS else self._short + 1
        self._again = time.monotonic() + (min(LATEST_SECONDS, 2.0 ** (self._short - 2)) if self._short > 1 else 0.0)
        log.error("capture: the process that writes it has ended; another is begun, and gets %d rows", len(self._kept))
        self._begin()

    def _begin(self) -> None:
        """A pipe with all that is kept, as far as it goes, and a scribe that reads it."""
        if time.monotonic() < self._again:
            return
        read = -1
        try:
            read, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            with suppress(OSError):  # where too many of this user's are large already: 64 KiB are some hundred rows
                fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._unsent = len(self._kept)
            self._sent_rest()
            self._shared["pid"] = self._shared["ended"] = 0
            self._begun = time.monotonic()
            self._forking = self._started(read)
            self.scribes += 1
        except OSError as error:
            log.error("capture: no process to write it can be begun: %s; it is tried again", error.strerror)
            if self._pipe >= 0:
                os.close(self._pipe)
            self._pipe, self._again = -1, time.monotonic() + 1.0
        finally:
            if read >= 0:
                os.close(read)

    def _started(self, read: int) -> subprocess.Popen[bytes]:
        """What becomes a scribe and ends at once. Raises OSError."""
        # of this process: ready when it has ended. Opened here, since a process that starts may find it gone, or another's
        gateway = os.pidfd_open(os.getpid())
        given = {**self._given, "pipe": read, "shared": self._memory, "gateway": gateway, "again": len(self._kept)}
        given["pid_at"] = 8 * Shared.NAMES.index("pid")
        paths = [str(Path(shoal.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "shoal.loop", json.dumps(given)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(read, self._memory, gateway),
                env={**os.environ, **one},
                start_new_session=True,  # who kills the group of this process loses no row
            )
        finally:
            os.close(gateway)

    def close(self) -> None:
        """Waits until all is in journals, and these are parts, `CLOSE_SECONDS` at most; the scribe then ends. A row that comes
        later is dropped and counted."""
        until = time.monotonic() + CLOSE_SECONDS
        while self._kept and not self._ended and time.monotonic() < until:
            self.look()
            time.sleep(WAIT_SECONDS)
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._forget_taken()
            lost = len(self._kept)
            if self._pipe >= 0:
                os.close(self._pipe)
                lost = self._unsent  # what is in the pipe is still read
            if lost:
                self.counts["end"] += lost
                log.error("capture: %d rows are lost: no process to write them could be begun", lost)
            begun, self._pipe = self._pipe >= 0, -1
        if self._forking is not None:
            with suppress(subprocess.TimeoutExpired):
                self._forking.wait(max(0.0, until - time.monotonic()))
        while begun and not self._shared["ended"] and time.monotonic() < until and self._lives():
            time.sleep(WAIT_SECONDS)
        self._left |= {self._shared["pid"]} - {0}
        self._reap()
        os.close(self._memory)

    def _lives(self) -> bool:
        try:
            gone = os.pidfd_open(self._shared["pid"])
        except OSError as error:  # the number is nobody's, or by now a thread's
            return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        poll = select.poll()
        poll.register(gone, select.POLLIN)
        try:
            return not poll.poll(0)
        finally:
            os.close(gone)

    # --- what is said of it -------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """That are in journals, or were."""
        return self._shared["rows"]

    @property
    def bytes(self) -> int:
        """That are kept in the folder, as of the last count."""
        return self._shared["bytes"]

    def add(self, size: int) -> None:
        """So many bytes were put beside the rows: texts, and votes."""
        with self._lock:
            self._added[int(time.monotonic() // 60)] += size

    @property
    def full(self) -> bool:
        """Whether no more may be put there: all is counted once an hour, and what came since, or meanwhile, is added."""
        with self._lock:
            if self._counted != self.bytes:
                self._counted, last = self.bytes, int(time.monotonic() // 60) - 1
                self._added = Counter({minute: size for minute, size in self._added.items() if minute >= last})
            return self._counted + self._added.total() > self._most

    @property
    def waiting(self) -> int:
        """Files that the bucket does not have yet."""
        return self._shared["waiting"]

    @property
    def dropped(self) -> Counter[str]:
        """Rows that are not kept, by reason."""
        return self.counts + Counter({reason: self._shared[reason] for reason in DROPPED})

    @property
    def lag(self) -> float:
        """Seconds for which the oldest row has waited that is in no journal yet."""
        with self._lock:
            self._forget_taken()
            return time.monotonic() - self._kept[0][0] if self._kept else 0.0

    @property
    def scribe(self) -> int:
        """The id of the scribe's process; 0 while there is none."""
        return self._shared["pid"]
