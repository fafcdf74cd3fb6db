"""The count of `api.quotas` on Ray: an actor with a name, which every gateway of a service finds, or starts.

It outlives the gateways that started it, and Ray starts it again wherever there is room. It ends by `end`, or by itself once no
gateway has said anything for `IDLE_SECONDS`, as where the service was deleted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

import ray

from shoal.api.quotas import Held, Left, Quotas
from shoal.on_ray.engines import FIRST
from shoal.on_ray.loaded import NAMESPACE

PREFIX = "quotas-"
IDLE_SECONDS, LOOK_SECONDS = 120.0, 5.0


class Count(Quotas):
    """The actor."""

    def __init__(self) -> None:
        super().__init__()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def _end_when_idle(self) -> None:
        while self.idle < IDLE_SECONDS:
            time.sleep(LOOK_SECONDS)
        ray.kill(ray.get_runtime_context().current_actor)


class ActorLink:
    """`api.quotas.Link` to the count of one service. Ray runs the calls of one process in their order."""

    def __init__(self, application: str) -> None:
        self._name = PREFIX + application
        self._actor: Any = None
        self._finding: asyncio.Task[Any] | None = None

    async def join(self, gateway: str, held: Mapping[str, Held]) -> None:
        # Of tries that are given up one waits for Ray at a time: a thread each would soon leave none for anything else.
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(asyncio.to_thread(self._found))
        self._actor = await asyncio.shield(self._finding)
        await self._actor.join.remote(gateway, dict(held))

    async def admit(self, gateway: str, line: str) -> Left | None:
        return cast("Left | None", await self._actor.admit.remote(gateway, line))

    async def tell(self, gateway: str, spent: Mapping[str, int]) -> dict[str, Left] | None:
        return cast("dict[str, Left] | None", await self._actor.tell.remote(gateway, dict(spent)))

    def come(self, gateway: str, line: str) -> None:
        with suppress(Exception):  # as of `leave`
            self._actor.come.remote(gateway, line)

    def leave(self, gateway: str, line: str) -> None:
        with suppress(Exception):  # what Ray raises of an actor that is gone: it counts nothing any more
            self._actor.leave.remote(gateway, line)

    def refund(self, gateway: str, line: str) -> None:
        with suppress(Exception):  # as of `leave`
            self._actor.refund.remote(gateway, line)

    def _found(self) -> Any:
        options: dict[str, Any] = {
            "name": self._name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached",
            "num_cpus": 0, "max_restarts": -1, "runtime_env": {"env_vars": FIRST},
        }  # fmt: skip
        return ray.remote(Count).options(**options).remote()


def end() -> None:
    """Ends the counts of all services of the Ray that is running."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX):
            with suppress(ValueError):  # it has just gone
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE))
