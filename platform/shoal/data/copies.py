"""Copies on this machine's disk of what lies in S3, side by side and together within the bound of the cache.

    CACHE/KIND/KEY/     one copy; KEY.lock beside it is held by who fetches it, and by who removes it
    .used in it         locked in common by the processes that read it, for as long as they live
    .reserved in it     while it is fetched, a file of as many bytes as it will have, none of which is written

The copy that was not used for the longest time goes first, and none goes that a process uses: of a corpus files are mapped as a
run comes to them.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.data.alone import alone
from shoal.data.ranged import cache_bytes
from shoal.errors import ResourceError

USED, RESERVED, ROOM = ".used", ".reserved", ".room.lock"

_held: dict[Path, int] = {}  # of this process: the locks that say what it uses


def use(folder: Path) -> None:
    """Nobody removes the copy `folder` as long as this process lives. For who holds its lock."""
    folder.touch()  # it is used now
    path = folder / USED
    lock = _held.get(folder)
    if lock is not None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return
        os.close(_held.pop(folder))  # somebody has emptied the cache by hand
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(OSError):  # a file system without locks, where `_is_used` is told of none either
        fcntl.flock(lock, fcntl.LOCK_SH)
    _held[folder] = lock


@contextmanager
def reserved(folder: Path, need: int) -> Iterator[bool]:
    """Whether `need` more bytes may be written to the copy `folder` in this block, for which others may have gone. For who
    holds its lock."""
    busy = ResourceError(f"{folder.parent} is looked through")
    with alone(folder.parent / ROOM, busy, wait=math.inf):
        fits = make_room(folder, need)
        if fits:
            with (folder / RESERVED).open("wb") as file:
                file.truncate(size(folder) + need)
    try:
        yield fits
    finally:
        (folder / RESERVED).unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of a copy, or of what it will be."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    return max(sizes.pop(RESERVED, 0), sum(sizes.values()))


def make_room(folder: Path, need: int, *, spared: float = 0.0) -> bool:
    """Remove copies beside `folder` that nobody uses, the oldest first, until `need` more bytes are within the bound of the
    cache; none that was used in the last `spared` seconds, and none where they alone are beyond it. Whether they are within."""
    most, total, found = cache_bytes(), need, []
    for path in folder.parent.iterdir():
        with suppress(OSError):  # another process removes it
            if path.is_dir() and not path.name.startswith("."):
                found.append((path.stat().st_mtime, size(path), path))
                total += found[-1][1]
    if need + sum(bytes_ for _, bytes_, path in found if path == folder) > most:
        return False
    for used, bytes_, path in sorted(found):
        if total <= most or used > time.time() - spared:
            break
        busy = ResourceError(f"{path} is being written")
        with suppress(ResourceError, FileNotFoundError), alone(path.with_suffix(".lock"), busy):
            # what another process has used meanwhile is newer
            if path != folder and path.stat().st_mtime == used and not _is_used(path):
                shutil.rmtree(path, ignore_errors=True)
                total -= bytes_
    return total <= most


def _is_used(folder: Path) -> bool:
    try:
        lock = os.open(folder / USED, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False
