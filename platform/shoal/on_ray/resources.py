"""What a command needs of the machine: a Ray to run on, and room. Asked first, so that nothing fails half-way."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

import shoal
from shoal.errors import ResourceError

LEAST_CPUS = 4  # logical: training holds its CPUs for its whole run, and Ray Data and Serve must still find some
OBJECT_STORE = 512 * 2**20  # bytes: shards pass between processes in files, so little is shared through it
ANSWER_SECONDS = 10.0  # that a cluster has to accept a connection
SOCKET_PATH = 107  # characters that a Unix socket's path may have
SESSION_PATH = 70  # of them that Ray adds to its folder's


@contextmanager
def local_ray(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, else the cluster that RAY_ADDRESS names (as it does inside a
    submitted job), else one of our own on loopback with `num_cpus` logical CPUs, which ends with the block.

    Raises ResourceError when Ray cannot be reached or started.
    """
    if ray.is_initialized():
        yield
    elif address := os.environ.get("RAY_ADDRESS"):
        _need_answer(address)
        _init(f"cannot join the Ray cluster at {address}", address=address)
        try:
            yield
        finally:
            ray.shutdown()
    else:
        with _session_folder() as folder, _loopback():
            _init(
                "cannot start a local Ray",
                address="local",
                num_cpus=num_cpus or max(LEAST_CPUS, os.cpu_count() or 1),
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                runtime_env={"env_vars": worker_env()},
                _temp_dir=folder,
            )
            try:
                yield
            finally:
                ray.shutdown()


def worker_env() -> dict[str, str]:
    """Environment of worker processes: one compute thread each, and `shoal` and the chat page's `ui` as they are here."""
    source = Path(shoal.__file__).parent.parent
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(source), str(source.parent), *filter(None, before)])
    return {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


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


def need_memory(size: int) -> None:
    """Raises ResourceError when fewer than `size` bytes of memory are available."""
    available = psutil.virtual_memory().available
    if available < size:
        raise ResourceError(
            "memory", got=_gib(available), allowed=f"at least {_gib(size)}", do="close other programs, or use less"
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


def _need_answer(address: str) -> None:
    """Raises ResourceError when nothing listens at HOST:PORT (Ray itself would go on trying for minutes)."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray finds it, or says at once that there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster at RAY_ADDRESS={address}",
            got=error.strerror or str(error),
            do="start it, or unset RAY_ADDRESS",
        ) from error


def _init(fault: str, **options: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds
        ray.shutdown()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ResourceError(fault, got=reason, do="check that it runs, or start a local one") from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Every port that a Ray started in this block opens is on 127.0.0.1 alone.

    Ray does so by itself on desktop systems; elsewhere it takes the machine's public address, even when told 127.0.0.1.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(variable)
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # the variable is for Ray's own processes
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(variable) if given is None else os.environ.update({variable: given})


@contextmanager
def _session_folder() -> Iterator[str]:
    """A folder for one Ray's logs and sockets, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        if len(folder) + SESSION_PATH > SOCKET_PATH:
            raise ResourceError(
                f"temporary folder {folder}",
                got=f"{len(folder)} characters",
                allowed=f"at most {SOCKET_PATH - SESSION_PATH}, for Unix sockets",
                do="set TMPDIR to a shorter path",
            )
        yield folder


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
