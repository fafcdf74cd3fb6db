"""The lock of a folder: one process at a time, and none that has ended."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError

BUSY = DataError("another is here")
HOLD = """
import sys, time
from pathlib import Path
from shoal.data.alone import alone
from shoal.errors import DataError
with alone(Path(sys.argv[1]), DataError("busy")):
    print("held", flush=True)
    time.sleep(600)
"""


def held(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_another_process_keeps_us_out_until_it_is_killed(tmp_path: Path) -> None:
    process = held(tmp_path / "run" / "lock")
    try:
        with pytest.raises(DataError, match="another is here"), alone(tmp_path / "run" / "lock", BUSY):
            raise AssertionError
    finally:
        process.kill()
    with alone(tmp_path / "run" / "lock", BUSY, wait=60.0):  # what is killed may take a moment to be gone
        pass
    process.wait()


def test_a_fork_neither_keeps_nor_frees_what_its_parent_holds(tmp_path: Path) -> None:
    """It has the lock in common with its parent: whoever waited for the parent's end waited for the fork's."""
    with alone(tmp_path / "lock", BUSY):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with alone(tmp_path / "lock", BUSY):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with contextlib.ExitStack() as held:
        held.enter_context(alone(tmp_path / "lock", BUSY))
        child = os.fork()
        if child == 0:
            held.close()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(DataError), alone(tmp_path / "lock", BUSY):
            raise AssertionError


def test_a_lock_file_that_was_removed_meanwhile_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the end of a prepare, which removes its work folder: who has opened the old file has not locked the new one."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def removed(file: int, how: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with alone(path, BUSY, wait=10.0):
        assert path.exists() and len(calls) == 2
        with pytest.raises(DataError), alone(path, BUSY):
            raise AssertionError


def test_without_locks_it_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"), alone(tmp_path / "lock", BUSY):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write to"), alone(tmp_path / "file" / "run" / "lock", BUSY):
        raise AssertionError
