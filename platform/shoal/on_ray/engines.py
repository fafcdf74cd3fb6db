"""Engine replicas on Ray Serve.

Notable: events cross as lists of what was ready, so the first token waits for nothing and a fast engine does not pay for
a message a token. The weights are not an argument of a replica but what Serve calls the user config, which can change while
the replica serves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from shoal import config
from shoal.api.served import ServedModel
from shoal.engine.events import Event, Finished, Request
from shoal.errors import ConfigError, EngineDeadError, RequestError, ShoalError
from shoal.on_ray.routing import router_config
from shoal.on_ray.scaling import KV_USE
from shoal.on_ray.serve_config import ServeArgs, Weights

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine

log = logging.getLogger("ray.serve")

ANOTHER = "serve it under another name (args.models), or start the service anew"

LIFE: dict[str, Any] = {  # of a replica of either kind
    "graceful_shutdown_wait_loop_s": 0.25,  # how often a replica that is to go looks whether its streams have ended
    "graceful_shutdown_timeout_s": 60.0,
    "max_constructor_retry_count": 2,  # what fails in a constructor here (a file, a setting) fails again
}
LOGGING = LoggingConfig(enable_access_log=False)  # the gateway writes one line a request itself

Events = AsyncGenerator[Event, None]


def engine_options(args: ServeArgs, model: str, page: int) -> dict[str, Any]:
    """Serve's options for the engine replicas that `args` ask for, which serve the model directory `model`, of pages of
    `page` tokens."""
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * args.max_batch,  # a batch that runs and one that waits close to it
        "max_queued_requests": args.max_queue,  # in the gateway, where any replica can take them
        "user_config": {"model": model},  # the one thing that can change while a replica serves
        "request_router_config": router_config(page),
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus},
        "health_check_period_s": 2.0,  # Serve replaces a replica that fails three times in a row
        "health_check_timeout_s": 30.0,
        **LIFE,
    }
    if args.min_replicas == args.max_replicas:
        return {**options, "num_replicas": args.max_replicas}
    with warnings.catch_warnings():
        # what is to replace `metrics_interval_s` are variables of a whole cluster's environment
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=max(1.0, 0.75 * args.max_batch),
            metrics_interval_s=2.0,
            look_back_period_s=6.0,
            upscale_delay_s=2.0,
            downscale_delay_s=120.0,
            downscale_to_zero_delay_s=300.0,  # the next request then waits for a model to load
            policy=AutoscalingPolicy(policy_function="shoal.on_ray.scaling:by_load"),  # type: ignore[no-untyped-call]
        )
    return {**options, "autoscaling_config": scaling}


class EngineReplica:
    """One engine with the model in memory. Serve calls `reconfigure` before it sends the first request."""

    def __init__(self, args: ServeArgs, model: str) -> None:
        """`model`: the directory that the gateway reads the tokenizer of."""
        self._args, self._gateways = args, model
        self._weights = ""  # identity of those that serve
        self._engine: AsyncEngine | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # engines whose last streams go on
        self._refused = False

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serves the weights of the model directory in `user_config` from now on, loaded beside those that serve, so nothing
        stops: streams that run end on the weights that they began with, and requests that come later get the new ones.

        Raises CheckpointError and ConfigError in a replica that has no weights yet. One that has goes on with them, and says
        so in the log and in `stats`: a slip in a new directory's name is no reason to end a service.
        """
        try:
            directory = config.load(Weights, user_config, "user_config").model
            weights = await asyncio.to_thread(_identity, directory, self._gateways)
            if weights == self._weights:  # Serve also calls this when nothing of it changed
                return
            engine = await asyncio.to_thread(self._load, directory)
        except ShoalError as error:
            if self._engine is None:
                raise
            self._refused = True
            log.error("the weights stay as they are: %s", error)
            return
        before, self._engine, self._weights, self._refused = self._engine, engine, weights, False
        if before is not None:
            log.info("new requests get the weights of %s", directory)
            task = asyncio.create_task(_leave(before, self._args.seconds))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def _load(self, directory: str) -> AsyncEngine:
        import torch

        from shoal.engine.engine import Engine
        from shoal.engine.front import AsyncEngine
        from shoal.model.model import Model

        args = self._args
        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) - 1))
        say = log.warning
        model = Model.load(directory, on_fallback=say if args.precision == "auto" else None)
        if args.gpus > 0:
            model.net.to("cuda")
        # Serve bounds what reaches a replica, so the engine's own bound is only the last line
        limits = {"max_batch": args.max_batch, "max_queue": 2 * args.max_batch}
        return AsyncEngine(Engine(model, kv_cache_dtype=args.kv_cache_dtype, **limits))

    @property
    def _serving(self) -> AsyncEngine:
        if self._engine is None:
            raise EngineDeadError("the replica has no weights yet", do="try again")
        return self._engine

    async def generate(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """Events of one request, in lists of what was ready. An error is in the last event, never raised."""
        try:
            async for ready in batches(self._serving.generate(request)):
                yield ready
        except RequestError as error:
            yield [Finished(request.id, "error", error=error)]

    async def embed(self, prompt: list[int], depth: str | int | None) -> list[float]:
        return await self._serving.embed(prompt, depth)

    async def stats(self) -> dict[str, float]:
        return {**await self._serving.stats(), "weights_update_refused": float(self._refused)}

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        await self._serving.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {KV_USE: (await self._serving.stats())["kv_cache_usage_perc"]}

    async def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            await self._serving.close()


def _identity(directory: str, gateways: str) -> str:
    """What tells a model directory's weights from others. Raises CheckpointError for none that can be served, ConfigError for
    one that reads other tokens than `gateways` does: the gateway encodes for both."""
    new, known = ServedModel.load(directory), ServedModel.load(gateways)
    for what in ("config", "chat_template"):
        if getattr(new, what) != getattr(known, what):
            raise ConfigError(f"user_config.model: {what}", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    if (Path(directory) / "tokenizer.json").read_bytes() != (Path(gateways) / "tokenizer.json").read_bytes():
        raise ConfigError("user_config.model: tokenizer", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    manifest = Path(directory) / "manifest.json"
    return directory + (manifest.read_text(encoding="utf-8") if manifest.is_file() else "")


async def _leave(engine: AsyncEngine, seconds: float) -> None:
    await engine.drain(seconds)
    await engine.close()


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
