"""Nodes that share no folder: raylets of this machine, each with a cache of its own. And how one is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from shoal.on_ray.resources import _loopback, worker_env

STORE = 80 * 2**20  # bytes of each node's object store


@contextmanager
def nodes(count: int, caches: Path, **environment: str) -> Iterator[Cluster]:
    """A head without a CPU and `count` nodes of one, which this process is connected to. Their caches are ``node-N`` in
    `caches`, this process's is ``driver``. `environment`: more of all their variables."""
    folder = tempfile.mkdtemp(prefix="ray-")
    with _loopback(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where it also writes the address that other programs would take for theirs
        # a raylet whose agent starts slowly ends itself after less
        patch.setenv("RAY_agent_register_timeout_ms", "120000")
        patch.setenv("RAY_health_check_failure_threshold", "2")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("SHOAL_CACHE", str(caches / "driver"))
        for name, value in environment.items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for number in range(count):
                cache = {"SHOAL_CACHE": str(caches / f"node-{number}")}
                made.add_node(num_cpus=1, object_store_memory=STORE, env_vars=cache)
            ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": worker_env()})
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def lose(cluster: Cluster, node: Any) -> None:
    """Kill the raylet of a node, and what it began, at once."""
    began = _began(node)
    cluster.remove_node(node, allow_graceful=False)
    for process in began:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def lose_a_node_with(cluster: Cluster, process: str, *, but: str = "no such process") -> None:
    """Lose a node that has a `process` and none of the other kind."""
    for node in list(cluster.worker_nodes):
        names = [*map(_called, _began(node))]
        if any(process in name for name in names) and not any(but in name for name in names):
            lose(cluster, node)
            return
    raise AssertionError(f"no node has a {process}")


def node_that_asks(cluster: Cluster, port: int) -> Any:
    """The node of which a process has a connection from `port` of this machine; None for one of no node."""
    for node in list(cluster.worker_nodes):
        for process in _began(node):
            with suppress(psutil.Error):  # it has just ended
                if any(one.laddr.port == port for one in process.net_connections("tcp")):
                    return node
    return None


def _began(node: Any) -> list[psutil.Process]:
    return list(psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True))


def _called(process: psutil.Process) -> str:
    """Its name and its arguments; "" where it has just ended."""
    with suppress(psutil.Error):
        return " ".join([process.name(), *process.cmdline()])
    return ""
