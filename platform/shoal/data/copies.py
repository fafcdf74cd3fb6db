"""Copies on this machine's disk of what lies in S3, side by side and together within the bound of the cache.

    CACHE/KIND/KEY/     one copy; KEY.lock beside it is held by who fetches it, and by who removes it
    .used in it         locked in common by the processes that read it, for as long as they live
    .reserved in it     while it is fetched, a file of as many bytes as it will have, none of which is written
    .gone-KEY.*         one that is being removed: what lies at KEY is never half of one

KEY is 32 hexadecimal digits. What else lies there is somebody's own: it is not counted, and stays. The copy that was not used
for the longest time goes first, and none goes that a process uses: of a corpus files are mapped as a run comes to them.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.data.alone import alone
from shoal.data.ranged import cache_bytes
from shoal.errors import ResourceError

USED, RESERVED, ROOM = ".used", ".reserved", ".room.lock"
KEY = re.compile(r"[0-9a-f]{32}")
GONE = ".gone-"  # begins the name of one that is being removed

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
    (folder / RESERVED).unlink(missing_ok=True)  # by a process that was killed while it had the lock
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


def tidy(folder: Path, names: Collection[str]) -> None:
    """Remove all files of the copy `folder` but `names` and what says that it is used: a process that was killed left them.
    For who holds its lock."""
    for left in folder.iterdir():
        if left.is_file() and left.name not in names and left.name != USED:
            left.unlink()


def size(folder: Path) -> int:
    """Bytes of a copy, or of what it will be."""
    found = reserved = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # who writes it has just renamed or removed it
            if file.is_file() and file.name == RESERVED:
                reserved = file.stat().st_size
            elif file.is_file():
                found += file.stat().st_size
    return max(reserved, found)


def make_room(folder: Path, need: int, *, spared: float = 0.0) -> bool:
    """Remove copies beside `folder` that nobody uses, the oldest first, until `need` more bytes are within the bound of the
    cache; none that was used in the last `spared` seconds, and none where they alone are beyond it. Whether they are within."""
    most, total, found = cache_bytes(), need, []
    for path in folder.parent.iterdir():
        if path.name.startswith(GONE):  # by a process that was killed
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # another process removes it
            if KEY.fullmatch(path.name) and path.is_dir():
                _unreserve(path)
                found.append((path.stat().st_mtime, size(path), path))
                total += found[-1][1]
    if need + sum(bytes_ for _, bytes_, path in found if path == folder) > most:
        return False
    for used, bytes_, path in sorted(found):
        if total <= most or used > time.time() - spared:
            break
        busy = ResourceError(f"{path} is being written")
        with suppress(ResourceError, OSError), alone(path.with_suffix(".lock"), busy):
            # what another process has used meanwhile is newer
            if path != folder and path.stat().st_mtime == used and not _is_used(path):
                gone = path.with_name(f"{GONE}{path.name}.{secrets.token_hex(4)}")
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
                total -= bytes_
    return total <= most


def _unreserve(folder: Path) -> None:
    """Free what was reserved for a copy whose process was killed while it fetched it; it is no newer for that."""
    if not (folder / RESERVED).exists():
        return
    busy = ResourceError(f"{folder} is being written")
    with suppress(ResourceError, OSError), alone(folder.with_suffix(".lock"), busy):
        if not _is_used(folder):
            used = folder.stat().st_mtime_ns
            (folder / RESERVED).unlink()
            os.utime(folder, ns=(used, used))


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
