"""What several planes ask of the machine: files that are there in full or not at all, room, a port, and threads to compute
with."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from shoal.errors import ResourceError

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors in a period, and the period (cgroups of version 2)


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def aside(path: Path, *, sync: bool = False, name: bool = True) -> Iterator[Path]:
    """Where to write what is to be `path`: a file beside it, which takes its name when the block ends, and is removed when the
    block raises. Whoever writes the same `path` at the same time has another: threads have one process, and processes of
    several machines may have one number. With `sync` it outlives a power cut from then on; without, what was there before may
    be gone, and nothing, or an empty file, be there instead. Without `name` what was there may be there again, whole: who
    writes many files in one folder sees that onto the disk at the end."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        yield beside
        if sync:
            see_on_disk(beside)
        beside.replace(path)
        if sync and name:
            see_on_disk(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_aside(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a text file so that it is there in full or not at all; `sync` as of `aside`."""
    with aside(path, sync=sync) as beside:
        beside.write_text(text, encoding="utf-8")


def see_on_disk(path: Path) -> None:
    """Return when the disk has a file's content, or of a folder the names in it; where its file system can tell."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some say of folders
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write `value` in place, and see it on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cores() -> int:
    """Those that this process may use: `taskset`, a container or a batch system may leave it few of many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return allowed


def threads(asked: int | None = None) -> int:
    """Threads for a process that computes beside others: as many as are `asked` for, or the cores but one."""
    return asked or max(1, cores() - 1)


def need_disk(path: str | Path, size: int) -> None:
    """Raises ResourceError when fewer than `size` bytes are free where `path` is, or will be."""
    place = Path(path).absolute()
    place = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise ResourceError(
            f"disk space at {place}",
            got=_gib(free),
            allowed=f"at least {_gib(size)}",
            do="free some, or write elsewhere",
        )


def need_free_port(host: str, port: int) -> None:
    """Raises ResourceError when nothing could listen on `port` of `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not block it
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} of {host}", got=error.strerror, do="give another --port, or stop what listens there"
            ) from error


def need_memory(size: int) -> None:
    """Raises ResourceError when fewer than `size` bytes of memory are available."""
    available = psutil.virtual_memory().available
    if available < size:
        raise ResourceError(
            "memory", got=_gib(available), allowed=f"at least {_gib(size)}", do="close other programs, or use less"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
