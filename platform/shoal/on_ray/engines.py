"""Engine replicas on Ray Serve, and the client of them that the gateway uses.

Notable: events cross as lists of what was ready, so the first token waits for nothing and a fast engine does not pay for
a message a token. An engine's refusal crosses as a `Finished` event and keeps its class. A client that leaves closes the
gateway's iterator, which cancels the replica's, which cancels the request in the engine. A replica that is lost takes no
request with it (`failover`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig

from shoal.engine.events import Event, Finished, Request
from shoal.errors import EngineDeadError, QueueFullError, RequestError, ShoalError
from shoal.on_ray.failover import LOSSES, PAUSES, unbroken
from shoal.on_ray.scaling import KV_USE
from shoal.on_ray.serve_config import ServeArgs

LIFE: dict[str, Any] = {  # of a replica of either kind
    "graceful_shutdown_wait_loop_s": 0.25,  # how often a replica that is to go looks whether its streams have ended
    "graceful_shutdown_timeout_s": 60.0,
    "max_constructor_retry_count": 2,  # what fails in a constructor here (a file, a setting) fails again
}
LOGGING = LoggingConfig(enable_access_log=False)  # the gateway writes one line a request itself

Events = AsyncGenerator[Event, None]


def engine_options(args: ServeArgs) -> dict[str, Any]:
    """Serve's options for the engine replicas that `args` ask for."""
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * args.max_batch,  # a batch that runs and one that waits close to it
        "max_queued_requests": args.max_queue,  # in the gateway, where any replica can take them
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        **LIFE,
    }
    if args.min_replicas == args.max_replicas:
        return {**options, "num_replicas": args.max_replicas}
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=max(1.0, 0.75 * args.max_batch),
        look_back_period_s=15.0,  # Ray wants more than the 10 s between two reports of a replica
        upscale_delay_s=5.0,
        downscale_delay_s=120.0,
        policy=AutoscalingPolicy(policy_function="shoal.on_ray.scaling:by_load"),  # type: ignore[no-untyped-call]
    )
    return {**options, "autoscaling_config": scaling}


class EngineReplica:
    """One engine with the model in memory."""

    def __init__(self, args: ServeArgs) -> None:
        import torch

        from shoal.engine.engine import Engine
        from shoal.engine.front import AsyncEngine
        from shoal.model.model import Model

        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) - 1))
        say = logging.getLogger("ray.serve").warning
        model = Model.load(args.model or "", on_fallback=say if args.precision == "auto" else None)
        if args.gpus > 0:
            model.net.to("cuda")
        # Serve bounds what reaches a replica, so the engine's own bound is only the last line
        self._engine = AsyncEngine(Engine(model, max_batch=args.max_batch, max_queue=2 * args.max_batch))

    async def generate(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """Events of one request, in lists of what was ready. An error is in the last event, never raised."""
        try:
            async for ready in batches(self._engine.generate(request)):
                yield ready
        except RequestError as error:
            yield [Finished(request.id, "error", error=error)]

    async def embed(self, prompt: list[int], depth: str | int | None) -> list[float]:
        return await self._engine.embed(prompt, depth)

    async def stats(self) -> dict[str, float]:
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        await self._engine.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {KV_USE: (await self._engine.stats())["kv_cache_usage_perc"]}

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.close()


class ReplicaClient:
    """The engine replicas behind a handle, as an `EngineClient`."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._engine = engine
        self._stream = engine.options(method_name="generate", stream=True)
        self._lost = 0  # streams that their replica left unfinished

    def generate(self, request: Request) -> Events:
        """Raises QueueFullError when all replicas and the queue are full. A request whose replica is lost goes on at another
        (`failover`); EngineDeadError says that several were lost."""

        def count() -> None:
            self._lost += 1

        return unbroken(self._open, request, on_loss=count)

    async def _open(self, request: Request) -> AsyncGenerator[list[Event], None]:
        stream = cast("DeploymentResponseGenerator[list[Event]]", self._stream.remote(request))
        try:
            async for ready in stream:
                yield ready
        except Exception as error:  # the stream is over: `cancel` would raise this again
            raise as_shoal_error(error) from error
        except BaseException:  # the caller left
            stream.cancel()  # type: ignore[no-untyped-call]
            raise

    async def embed(self, prompt: list[int], depth: str | int | None = None) -> list[float]:
        """Raises as `generate`."""
        tries = 0
        while True:
            try:
                return cast("list[float]", await self._engine.embed.remote(prompt, depth))
            except Exception as error:
                tries, reason = tries + 1, as_shoal_error(error)
                if tries == LOSSES or not isinstance(reason, EngineDeadError):
                    raise reason from error
            await asyncio.sleep(PAUSES[tries])

    async def stats(self) -> dict[str, float]:
        """Sums over the replicas; of a share (``_perc``) the mean."""
        replies = await self._engine.broadcast("stats").results_async()
        names = {name for reply in replies for name in reply}
        total = {name: sum(reply.get(name, 0.0) for reply in replies) for name in names}
        shares = {name: value / len(replies) for name, value in total.items() if name.endswith("_perc")}
        return {
            **total,
            **shares,
            "num_replicas": float(len(replies)),
            "requests_resumed_total": float(self._lost),
        }

    async def check_health(self) -> None:
        """Raises EngineDeadError when no replica is alive and well."""
        try:
            replies = await self._engine.broadcast("check_health").results_async(return_exceptions=True)
        except Exception as error:
            raise as_shoal_error(error) from error
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors and len(errors) == len(replies):
            raise as_shoal_error(errors[0])


async def batches(events: Events) -> AsyncGenerator[list[Event], None]:
    """`events` in lists: whatever has come since the last list was taken. Never waits for more."""
    ready: list[Event] = []
    some = asyncio.Event()

    async def pump() -> None:
        try:
            async for event in events:
                ready.append(event)
                some.set()
        finally:
            some.set()

    task = asyncio.create_task(pump())
    try:
        while not (task.done() and not ready):
            await some.wait()
            some.clear()
            if ready:
                taken, ready[:] = ready[:], []
                yield taken
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])
        await events.aclose()


def as_shoal_error(error: BaseException) -> BaseException:
    """An error of Ray or Serve as the one of ours that has its HTTP status; any other as it is."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ShoalError):
        return cause
    if isinstance(error, BackPressureError):
        return QueueFullError("all engines are busy and the queue is full", do="try again in a second")
    if isinstance(error, RayTaskError):
        return EngineDeadError("the engine replica failed", got=type(cause).__name__, do="try again")
    if isinstance(error, (RayError, RayServeException)):
        return EngineDeadError("the engine replica was lost", got=type(error).__name__, do="try again")
    return error
