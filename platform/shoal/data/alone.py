"""One command at a time in a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.errors import ResourceError, ShoalError

PAUSE = 0.2  # seconds between two tries
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer


@contextmanager
def alone(path: Path, busy: ShoalError, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which is made with its folder, in this block. Raises `busy` where another process still
    holds it after `wait` seconds, ResourceError where it cannot be made.

    It holds over several nodes where their file system passes flock on (NFS from version 4, CephFS, Lustre mounted with flock).
    Where it knows no locks at all a warning says so, and nothing is held.
    """
    end = time.monotonic() + wait
    while (lock := _taken(path)) is None:
        if time.monotonic() >= end:
            raise busy
        time.sleep(PAUSE)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # a fork has the lock in common with this process, and would keep it while it lives
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _taken(path: Path) -> int | None:
    """The open lock file, held; None while another process holds it, or has just removed it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ResourceError(f"cannot write to {path.parent}", got=error.strerror, do="give another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in NO_LOCKS:
            text = f"the file system of {path.parent} has no locks ({error.strerror}): see to it that one command works there"
            warnings.warn(text, stacklevel=4)
            return lock
        os.close(lock)
        raise ResourceError(f"cannot lock {path}", got=error.strerror, do="give another folder") from error
    os.close(lock)
    return None
