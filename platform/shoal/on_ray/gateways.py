"""How many gateways a service has, and what each says of itself.

A gateway is one process with one event loop, so it carries what one core does. Their number follows the requests that they
hold, and the processor time that they take, whichever asks for more (`scaling`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from shoal.api.adapter_names import Change, State
from shoal.api.drain import STREAM_SECONDS
from shoal.api.serve_args import ServeArgs
from shoal.engine.metrics import Samples
from shoal.on_ray.clients import ANSWER_SECONDS
from shoal.on_ray.engines import HELD, LIFE, LOGGING
from shoal.on_ray.known_adapters import KnownAdapters
from shoal.on_ray.scaling import CPU_USE, replicas
from shoal.on_ray.serve_config import GATEWAY

log = logging.getLogger("ray.serve")

REQUESTS = 400  # that one is to hold: at the slowest cadence of events half a core
OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": HELD,  # connections that the gateway holds; what the engines take is bounded by `ServeArgs`
    "max_queued_requests": HELD,
    "max_surge_percent": 100,  # in an update the new one serves before the old one goes
    "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    "health_check_period_s": 1.0,  # one that has died is missed so soon; Serve's 10 were most of the time without it
    **LIFE,
    "logging_config": LOGGING,
    "ray_actor_options": {"num_cpus": 0},
}


def gateway_options(args: ServeArgs) -> dict[str, Any]:
    """Serve's options for the gateways that `args` ask for."""
    # one that goes has the time of the longest request: its streams cannot go on at another
    options = {**OPTIONS, "graceful_shutdown_timeout_s": max(args.seconds, STREAM_SECONDS)}
    return options | replicas(args.min_gateways, args.max_gateways, REQUESTS)


class CpuUse:
    """The share of a core that this process takes."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def since(self) -> float:
        """Since the last call."""
        wall, cpu = time.monotonic(), time.process_time()
        use = (cpu - self._cpu) / max(1e-3, wall - self._wall)
        self._wall, self._cpu = wall, cpu
        return use

    def told(self) -> dict[str, float]:
        """For Serve's autoscaling."""
        return {CPU_USE: self.since()}


@cache
def _all_of(application: str) -> DeploymentHandle[Any]:
    """Its gateways. Each handle follows what becomes of them for as long as the process lives."""
    return serve.get_deployment_handle(GATEWAY, application)


async def vote(application: str, answer: str, who: str | None, rating: str | None) -> None:
    """Tells its gateways that `who` rates an answer, which one of them gave. Raises what Ray does."""
    async with asyncio.timeout(ANSWER_SECONDS):
        await _all_of(application).broadcast("voted", answer, who, rating)._fetch_replica_results_async()


class GatewayNames:
    """`Names` of a gateway."""

    def __init__(self, kept: KnownAdapters, know: Callable[[Mapping[str, str]], None], application: str | None) -> None:
        """`know`: as `Names.know`; `application`: whose gateways are asked what they hold; None: there is one."""
        self._kept, self._know, self._application = kept, know, application

    async def get(self) -> State:
        return await asyncio.to_thread(self._kept.get)

    async def change(self, change: Change) -> State:
        return await asyncio.to_thread(self._kept.change, change)

    async def elsewhere(self) -> Mapping[str, str] | None:
        if self._application is None:
            return {}
        told: list[Any]
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                asked = _all_of(self._application).broadcast("look_at_adapters")
                results = await asked._fetch_replica_results_async()
                calls = [result.get_async() for result in results]  # type: ignore[no-untyped-call]
                # As results: else a call that its gateway has cancelled would end who asks.
                told = await asyncio.gather(*calls, return_exceptions=True)
        except Exception as error:  # of Ray
            told = [error]
        if (lost := next((each for each in told if isinstance(each, BaseException)), None)) is not None:
            log.warning("gateways do not say which adapters they hold: %s", type(lost).__name__)
            return None
        return {identity: directory for each in told for identity, directory in each.items()}

    def know(self, directories: Mapping[str, str]) -> None:
        self._know(directories)


async def counted(application: str) -> dict[str, Samples]:
    """What each gateway of an application that answers has counted (`Gateway.counted`), by its name. Raises what Ray does."""
    async with asyncio.timeout(ANSWER_SECONDS):
        results = await _all_of(application).broadcast("counted")._fetch_replica_results_async()
    asked = {asyncio.ensure_future(result.get_async()) for result in results}  # type: ignore[no-untyped-call]
    done, late = await asyncio.wait(asked, timeout=ANSWER_SECONDS)
    for task in late:
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # read, so that nobody tells of it
    # One that goes may cancel what it was asked.
    return dict(task.result() for task in done if not task.cancelled() and task.exception() is None)
