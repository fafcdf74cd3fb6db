"""What a command needs of the machine: a Ray to run on, and room. Asked first, so that nothing fails half-way."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

import shoal
from shoal.errors import ResourceError, first_line
from shoal.machine import cores

LEAST_CPUS = 4  # logical: training holds its CPUs for its whole run, and Ray Data and Serve must still find some
OBJECT_STORE = 512 * 2**20  # bytes: shards pass between processes in files, so little is shared through it
LEAVE_SECONDS = 15.0  # that processes of a Ray that has ended may take to end as well
ANSWER_SECONDS = 10.0  # that a cluster has to accept a connection
NODE_GROUP = "ray.io/node-group"  # label of nodes: an autoscaler gives each one, the head too
SOCKET_PATH = 107  # characters that a Unix socket's path may have
SESSION_PATH = 70  # of them that Ray adds to its folder's


@contextmanager
def local_ray(num_cpus: int | None = None, logs: Path | None = None) -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, else the cluster that RAY_ADDRESS names (as it does inside a
    submitted job), else one of our own on loopback with `num_cpus` logical CPUs, which ends with the block.
    The logs of the last are deleted with it, or come into `logs`, a folder for each Ray.

    Raises ResourceError when Ray cannot be reached or started, and where `logs` cannot be written.
    """
    if logs is not None:
        _need_folder(logs)
    if ray.is_initialized():
        yield
    elif address := os.environ.get("RAY_ADDRESS"):
        _need_answer(address)
        with _loopback() if _on_loopback(address) else nullcontext():
            _init(f"cannot join the Ray cluster at {address}", address=address)
            try:
                yield
            finally:
                ray.shutdown()
    else:
        with _session_folder(logs) as folder, _loopback(), _own_groups():
            _init(
                "cannot start a local Ray",
                address="local",
                num_cpus=num_cpus or max(LEAST_CPUS, cores()),
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
    # installed, workers find both as this process does; site-packages in PYTHONPATH would stand before Python's own modules
    own = [str(source), str(source.parent)] if source.name == "platform" else []
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([*own, *filter(None, before)])
    return {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def _need_answer(address: str) -> None:
    """Raises ResourceError when no Ray answers at HOST:PORT (Ray itself would go on trying for minutes)."""
    target = _target(address)
    if target is None:
        return  # "auto": Ray finds it, or says at once that there is none
    host, _, port = target.rpartition(":")
    got = None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        channel = init_grpc_channel(target)
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        finally:
            channel.close()
    except grpc.FutureTimeoutError:
        got = f"something that is no Ray, or one that has not answered for {ANSWER_SECONDS:g} s"
    except OSError as error:
        got = error.strerror or str(error)
    if got is not None:
        raise ResourceError(f"no Ray cluster at RAY_ADDRESS={address}", got=got, do="start it, or unset RAY_ADDRESS")


def _target(address: str) -> str | None:
    """HOST:PORT of an address that has one."""
    target = address.rpartition("://")[2]
    return target if target.rpartition(":")[2].isdecimal() else None


def _on_loopback(address: str) -> bool:
    """Whether the nodes of the Ray at HOST:PORT know each other by 127.0.0.1: a driver that called itself by another address
    would look for its own node among them until it gives up, after a minute."""
    target = _target(address)
    if target is None or address.startswith("ray://"):
        return False
    try:
        nodes = GcsClient(address=target).get_all_node_info(timeout=ANSWER_SECONDS)
    except Exception:  # of many kinds; joining it will say what is wrong
        return False
    return any(node.node_manager_address == "127.0.0.1" for node in nodes.values())


def _init(fault: str, **options: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many kinds
        ray.shutdown()
        raise ResourceError(fault, got=first_line(error), do="check that it runs, or start a local one") from error


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
def _own_groups() -> Iterator[None]:
    """Processes that a Ray started in this block has are no part of this one's process group: a signal to the group (of a
    terminal, a shell, a service manager) is for us to act on, and Ray is what we need for that. They end with this process."""

    class Apart(services.ConsolePopen):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, process_group=0, **options)

    before = services.ConsolePopen
    setattr(services, "ConsolePopen", Apart)  # noqa: B010
    try:
        yield
    finally:
        setattr(services, "ConsolePopen", before)  # noqa: B010


@contextmanager
def _session_folder(logs: Path | None) -> Iterator[str]:
    """A folder for one Ray's logs and sockets, gone afterwards; its logs come into `logs`, however the block ends."""
    with _temporary_folder() as folder:
        if len(folder) + SESSION_PATH > SOCKET_PATH:
            raise ResourceError(
                f"temporary folder {folder}",
                got=f"{len(folder)} characters",
                allowed=f"at most {SOCKET_PATH - SESSION_PATH}, for Unix sockets",
                do="set TMPDIR to a shorter path",
            )
        try:
            yield folder
        finally:
            if logs is not None:
                for session in Path(folder).glob("session_*"):
                    if not session.is_symlink():
                        _keep(session / "logs", logs / session.name)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Gone after the block, also where processes of a Ray that ended by itself still write into it for a while."""
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        yield folder
    finally:
        until = time.monotonic() + LEAVE_SECONDS
        shutil.rmtree(folder, ignore_errors=True)
        while Path(folder).exists() and time.monotonic() < until:
            time.sleep(0.1)
            shutil.rmtree(folder, ignore_errors=True)


def _need_folder(logs: Path) -> None:
    """Raises ResourceError where nothing can be written to a folder `logs`, which is made."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=logs).close()
    except OSError as error:
        raise ResourceError(f"folder {logs} for logs", got=error.strerror, do="give another") from error


def _keep(logs: Path, place: Path) -> None:
    try:
        shutil.copytree(logs, place, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    except (OSError, shutil.Error) as error:
        raise ResourceError(f"not all of Ray's logs are in {place}", got=str(error)[:200]) from error
