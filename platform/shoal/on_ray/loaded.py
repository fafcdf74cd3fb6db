"""The last weights that a deployment's replicas loaded, kept by Ray for those that start later.

A slip in a deployed file stops no replica that serves; this is what keeps it from stopping the next one that starts.
"""

from __future__ import annotations

import hashlib

import ray
from ray import serve
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

NAMESPACE = "shoal"


class LastLoaded:
    """Of the replicas of one deployment, as long as its service runs and starts with the model directory `model`."""

    def __init__(self, model: str) -> None:
        """In a process that is no replica it remembers nothing."""
        self._key: bytes | None = None
        if ray.is_initialized():
            replica = serve.get_replica_context().replica_id
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            of = f"{controller._actor_id.hex()} {replica.deployment_id.app_name} {replica.deployment_id.name} {model}"
            self._key = hashlib.sha256(of.encode()).digest()

    def put(self, directory: str) -> None:
        if self._key is not None:
            internal_kv._internal_kv_put(self._key, directory.encode(), namespace=NAMESPACE)

    def get(self) -> str | None:
        """The directory, None where none was loaded yet."""
        found = None if self._key is None else internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        return None if found is None else found.decode()
