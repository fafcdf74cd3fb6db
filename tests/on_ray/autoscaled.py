"""A cluster of a head without CPUs, and of nodes that Ray's own autoscaler starts and ends: raylets of this machine.

The autoscaler (version 2, as on KubeRay), its demand, its idle time and its replacing of lost nodes are the real ones. What is
played is the cloud: Ray's fake provider, which starts a raylet where another would rent a machine, with a cache of its own
(`apart`). It is named by its class, since by its own type Ray looks for a file of defaults that its wheel does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster

from shoal.on_ray.resources import _loopback, _temporary_folder, worker_env
from tests.on_ray.apart import CACHES, Apart
from tests.on_ray.test_serve import free_port, until

HEAD, WORKER = "ray.head.default", "pool"  # of these names the provider wants the first
MOST = 3  # nodes of one CPU each
IDLE_MINUTES = 0.1
MEMORY = 80 * 2**20  # bytes of a node's object store
ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",  # Ray's 5 are most of what a small cluster waits for
    "RAY_FAKE_CLUSTER": "1",
    "RAY_agent_register_timeout_ms": "120000",  # a raylet whose agent starts on a busy machine ends itself after less
    "RAY_enable_autoscaler_v2": "1",
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_period_ms": "500",
}


class Autoscaled:
    """Such a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._monitor = psutil.Process(cluster.head_node.all_processes["monitor"][0].process.pid)

    def nodes(self) -> set[str]:
        """Ids of the nodes that the autoscaler has started, and that are alive."""
        found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return {node["NodeID"] for node in found if node["Alive"] and node["NodeID"] != FAKE_HEAD_NODE_ID}

    def lose_one_with(self, process: str) -> None:
        """All processes of a node that has a `process` are killed, as where its machine is gone: the provider knows nothing."""
        for raylet in self._raylets():
            found = raylet.children(recursive=True)
            if any(process in " ".join([child.name(), *child.cmdline()]) for child in found if _lives(child)):
                for each in [raylet, *found]:
                    each.kill()
                return
        raise AssertionError(f"no node has a {process}")

    def processes(self) -> list[psutil.Process]:
        """Of the autoscaler and of all its nodes."""
        return [self._monitor, *self._monitor.children(recursive=True)]

    def _raylets(self) -> list[psutil.Process]:
        return [each for each in self._monitor.children() if _lives(each) and each.name() == "raylet"]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def config(port: int) -> dict[str, Any]:
    """Of the autoscaler; `port`: where the head's control store is."""
    provider = {
        "type": "external",
        "module": f"{Apart.__module__}.{Apart.__name__}",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    nothing = [
        "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    ]  # fmt: skip
    return {
        "cluster_name": "pools",
        "provider": provider,
        "max_workers": MOST,
        "idle_timeout_minutes": IDLE_MINUTES,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            WORKER: {"resources": {"CPU": 1, "object_store_memory": MEMORY}, "node_config": {}, "max_workers": MOST},
        },
        "upscaling_speed": 10.0,
        "file_mounts_sync_continuously": False,
        **{key: [] for key in nothing},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
    }


@contextmanager
def autoscaled(caches: Path) -> Iterator[Autoscaled]:
    """One that this process is connected to; nothing of it is left behind but the nodes' caches, in a folder."""
    with _temporary_folder() as folder, _loopback(), pytest.MonkeyPatch.context() as patch:
        port, file = free_port(), Path(folder) / "autoscaler.json"
        file.write_text(json.dumps(config(port)))  # which is YAML as well
        own = {"RAY_NODE_TYPE_NAME": HEAD, "RAY_TMPDIR": folder, "PYTHONPATH": worker_env()["PYTHONPATH"]}
        where = {CACHES: str(caches), "SHOAL_CACHE": str(caches / "driver")}
        for name, value in {**ENVIRONMENT, **own, **where}.items():
            patch.setenv(name, value)
        head = {
            "num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False, "gcs_server_port": port,
            "autoscaling_config": str(file),
            "env_vars": dict.fromkeys(["RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_CLOUD_INSTANCE_ID"], FAKE_HEAD_NODE_ID),
        }  # fmt: skip
        cluster = Cluster(initialize_head=True, head_node_args=head)
        made = Autoscaled(cluster)
        try:
            ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": worker_env()})
            yield made
        finally:
            left = made.processes()
            ray.shutdown()
            cluster.shutdown()
            for process in left:  # of nodes, which end with nobody
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            until(lambda: not any(map(_lives, left)), 60)
