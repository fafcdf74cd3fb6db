"""Runs a program in a process of its own, and ends it: whatever it does, `run` returns, and nothing of it goes on."""

from __future__ import annotations

import base64
import functools
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ResourceError, UsageError, last_line
from shoal.sandbox import inside, kernel
from shoal.sandbox.limits import MOST_PROGRAM, Call, Limits

ENDED, FAILED, TIME, OUTPUT, KILLED = HOW = ("ended", "failed", "time", "output", "killed")
START = 60.0  # seconds for the process to shut itself in, on a machine that has no time
_CHUNK = 2**16


@dataclass(frozen=True)
class Ran:
    """What became of a program. `how`: ``ended``; ``failed`` (an exception, or another exit code than 0); out of ``time`` or of
    room for its ``output``, or ``killed`` by a signal. `out` and `err`: what it printed. `values`: for each call what was
    returned, as `written` has it, or None where it raised or was never reached. `code`: of the exit, negative for a signal."""

    how: str
    code: int
    out: str
    err: str
    values: tuple[str | None, ...]
    seconds: float


def run(program: str, calls: Sequence[Call] = (), limits: Limits = Limits()) -> Ran:
    """Run a program, then call its functions in order. Raises ResourceError where the kernel has no such sandbox, or no
    process can be started, UsageError for a program that is too long."""
    if got := kernel.unsupported():
        raise _no_sandbox(got)
    if len(program) > MOST_PROGRAM:
        raise UsageError("a program's length", got=len(program), allowed=f"at most {MOST_PROGRAM:,} characters")
    asked = {
        "program": program, "calls": [asdict(call) for call in calls], "seconds": limits.seconds, "memory": limits.memory,
        "filter": base64.b64encode(kernel.filter_of(platform.machine())).decode(), "parent": os.getpid(),
    }  # fmt: skip
    with _Process(limits) as process:
        process.follow(json.dumps(asked).encode())
        return process.ran(len(calls))


@functools.cache
def refused() -> str:
    """Why no program can be run here, in a line, or ""."""
    try:
        run("")
    except ResourceError as error:
        return error.message
    return ""


def _not_started(error: OSError) -> ResourceError:
    do = "let this process have more descriptors or memory (ulimit -a)"
    return ResourceError("no process could be started for a program", got=last_line(error), do=do)


def _no_sandbox(got: str) -> ResourceError:
    return ResourceError(
        "programs are not run without a sandbox", got=got, allowed="Linux on x86_64 or aarch64, with seccomp filters",
        do="run it there",
    )  # fmt: skip


class _Process:
    """The process, its pipes, and what has come out of them."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._began = limits, time.monotonic()
        self._how, self._shut = "", False
        try:
            ours, theirs = os.pipe()
        except OSError as error:
            raise _not_started(error) from error
        # where Python itself was found by it, it is found again; nothing else of the environment is passed on
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        # -I: neither environment nor folder says what is imported, -S: nor what is installed
        words = [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", str(Path(inside.__file__)), str(theirs)]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=[theirs], env=kept, cwd=os.sep
            )
        except OSError as error:
            os.close(ours)
            raise _not_started(error) from error
        finally:
            os.close(theirs)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._in = self._process.stdin
        self._answers = os.fdopen(ours, "rb")
        self._read: dict[Any, bytearray] = {
            one: bytearray() for one in (self._process.stdout, self._process.stderr, self._answers)
        }

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        """It has ended, whatever happened here; it has no children, so nothing is left."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self._in.close()
        for pipe in self._read:
            pipe.close()
        self._process.wait()

    def follow(self, asked: bytes) -> None:
        """Tell it what to run, and read until its pipes are closed, its time is over, or it has said too much."""
        rest = memoryview(asked)
        with selectors.DefaultSelector() as pipes:
            for pipe in (self._in, *self._read):
                os.set_blocking(pipe.fileno(), False)
                pipes.register(pipe, selectors.EVENT_WRITE if pipe is self._in else selectors.EVENT_READ)
            while pipes.get_map() and not self._how:
                for key, _ in pipes.select(self._left()):
                    if key.fileobj is self._in:
                        rest = rest[self._tell(rest) :]
                        if not rest:
                            pipes.unregister(self._in)
                            self._in.close()
                    elif not self._hear(key.fileobj):
                        pipes.unregister(key.fileobj)
                if self._left() <= 0:
                    self._how = TIME
        if not self._how:
            try:
                self._process.wait(max(0.0, self._left()))  # one may close its pipes and go on
            except subprocess.TimeoutExpired:
                self._how = TIME
        self._process.kill()
        self._process.wait()

    def _left(self) -> float:
        """Seconds until its time is over, which begins once it is shut in."""
        return self._began + (self._limits.wall if self._shut else START) - time.monotonic()

    def _tell(self, rest: memoryview) -> int:
        try:
            return os.write(self._in.fileno(), rest[:_CHUNK])
        except BlockingIOError:
            return 0
        except BrokenPipeError:  # it could not even start, and says why
            return len(rest)

    def _hear(self, pipe: Any) -> bool:
        """Read what is there; False at the end."""
        try:
            some = os.read(pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return True
        said = self._read[pipe]
        said += some
        if not self._shut and self._read[self._answers].startswith(b"shut\n"):
            self._shut, self._began = True, time.monotonic()
        if len(said) > self._limits.output:
            del said[self._limits.output :]
            self._how = OUTPUT
        return bool(some)

    def ran(self, calls: int) -> Ran:
        out, err, answers = (bytes(said).decode("utf-8", "replace") for said in self._read.values())
        if not self._shut:
            said = next((line for line in reversed(err.splitlines()) if line.strip()), "it did not start")
            raise _no_sandbox(said.strip())
        code = self._process.returncode
        how = self._how or (ENDED if code == 0 else FAILED if code > 0 else KILLED)
        if code == -signal.SIGXCPU:
            how = TIME
        values = [_value(line) for line in answers.splitlines()[1 : calls + 1]]
        values += [None] * (calls - len(values))
        return Ran(how, code, out, err, tuple(values), time.monotonic() - self._began)


def _value(line: str) -> str | None:
    """What a call gave. The program can write such lines as well: it may be anything, and is held against what is right."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    value = found.get("value") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None
