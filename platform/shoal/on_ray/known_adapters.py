"""The adapters that a service has, kept by Ray for gateways and engines that start later.

They are those that it was started with until requests load and drop some.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping

import ray
from ray import serve
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from shoal.api.adapters import Known
from shoal.api.serve_args import ServeArgs
from shoal.model import adapter_files
from shoal.on_ray.loaded import NAMESPACE


class KnownAdapters:
    """Of the service that this process is a replica of, as long as it runs and starts with the same ones."""

    def __init__(self, args: ServeArgs) -> None:
        self._started_with = args.adapters
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        told = [controller._actor_id.hex(), serve.get_replica_context().app_name, args.model, args.adapters]
        self._key = hashlib.sha256(json.dumps(["adapters", *told], sort_keys=True).encode()).digest()

    def get(self) -> dict[str, Known]:
        """By name. Raises CheckpointError for one that the service starts with and that cannot be read."""
        kept: bytes | None = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        if kept is not None:
            return {name: Known(**each) for name, each in json.loads(kept).items()}
        now = int(time.time())
        return {
            name: Known(adapter_files.read(directory).identity, directory, now)
            for name, directory in self._started_with.items()
        }

    async def put(self, known: Mapping[str, Known]) -> None:
        told = json.dumps({name: dataclasses.asdict(each) for name, each in known.items()})
        internal_kv._internal_kv_put(self._key, told.encode(), namespace=NAMESPACE)
