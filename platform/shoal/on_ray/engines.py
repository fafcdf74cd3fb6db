"""Engine replicas on Ray Serve.

Notable: events cross as lists of what was ready. A first token waits for nothing; after it a replica sends some `LISTS` of them
a second, so that a fast engine with many streams does not pay for a message a token. The weights are not an argument of a
replica but what Serve calls the user config, which can change while the replica serves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from shoal import config
from shoal.engine.events import Event, Finished, Request
from shoal.errors import ConfigError, EngineDeadError, RequestError, ShoalError, frames
from shoal.on_ray.routing import router_config
from shoal.on_ray.scaling import KV_USE
from shoal.on_ray.serve_config import ServeArgs, Weights

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine
    from shoal.vllm_plugin.serving import VllmEngine

log = logging.getLogger("ray.serve")

ANOTHER = "serve it under another name (args.models), or start the service anew"

LISTS = 50 * (os.cpu_count() or 1)  # a second, of all streams of a replica together: each takes 1.9 ms from the cores
GAP_SECONDS = 0.2  # between two lists of one stream at most, however many there are: nobody reads faster

# Ray gives every worker niceness 15: a replica that computes goes before the processes that send its tokens on
FIRST = {"RAY_worker_niceness": "0"}

LIFE: dict[str, Any] = {  # of a replica of either kind
    "graceful_shutdown_wait_loop_s": 0.25,  # how often a replica that is to go looks whether its streams have ended
    "graceful_shutdown_timeout_s": 60.0,
    "max_constructor_retry_count": 2,  # what fails in a constructor here (a file, a setting) fails again
}
LOGGING = LoggingConfig(enable_access_log=False)  # the gateway writes one line a request itself


def engine_options(args: ServeArgs, model: str, page: int) -> dict[str, Any]:
    """Serve's options for the engine replicas that `args` ask for, which serve the model directory `model`, of pages of
    `page` tokens."""
    options: dict[str, Any] = {
        "max_ongoing_requests": 2 * args.max_batch,  # a batch that runs and one that waits close to it
        "user_config": {"model": model},  # the one thing that can change while a replica serves
        # who waits does so in the gateway, where any replica can take him
        "request_router_config": router_config(page, args.max_queue),
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus, "runtime_env": {"env_vars": FIRST}},
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
        self._engine: AsyncEngine | VllmEngine | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # engines whose last streams go on
        self._refused = False
        self._streams = 0  # that have begun and not ended

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serves the weights of the model directory in `user_config` from now on, loaded beside those that serve, so nothing
        stops: streams that run end on the weights that they began with, and requests that come later get the new ones.

        Raises CheckpointError and ConfigError in a replica that has no weights yet. One that has goes on with them, and says
        so in the log and in `stats`: a slip in a new directory's name is no reason to end a service.
        """
        try:
            directory = config.load(Weights, user_config, "user_config").model
            weights = await asyncio.to_thread(_identity, directory, self._gateways, self._args)
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

    def _load(self, directory: str) -> AsyncEngine | VllmEngine:
        if self._args.engine == "vllm":
            if self._engine is not None:
                raise ConfigError(
                    "user_config.model", got=directory, do="deploy anew: vLLM holds the memory of one model"
                )
            from shoal.vllm_plugin.start import start

            return start(directory, self._args.served(directory), self._args)
        import torch

        from shoal.engine.engine import Engine
        from shoal.engine.front import AsyncEngine, settle
        from shoal.model.model import Model

        args = self._args
        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) - 1))
        say = log.warning
        model = Model.load(directory, on_fallback=say if args.precision == "auto" else None)
        if args.gpus > 0:
            model.net.to("cuda")
        # Serve bounds what reaches a replica, so the engine's own bound is only the last line
        batch, kv = args.max_batch, args.kv_cache_dtype
        engine = AsyncEngine(Engine(model, max_batch=batch, max_queue=2 * batch, kv_cache_dtype=kv))
        settle()
        return engine

    @property
    def _serving(self) -> AsyncEngine | VllmEngine:
        if self._engine is None:
            raise EngineDeadError("the replica has no weights yet", do="try again")
        return self._engine

    async def generate(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """Events of one request, in lists of what was ready. An error is in the last event, never raised."""
        begun = False
        try:
            async with aclosing(self._serving.batches(request, self._gap)) as lists:
                async for events in lists:
                    if not begun:
                        begun, self._streams = True, self._streams + 1
                    yield events
        except RequestError as error:
            yield [Finished(request.id, "error", error=error)]
        except Exception as error:
            raise _failed(error) from None
        finally:
            self._streams -= begun

    def _gap(self) -> float:
        return min(GAP_SECONDS, self._streams / LISTS)

    async def embed(self, prompt: list[int], depth: str | int | None) -> list[float]:
        try:
            return await self._serving.embed(prompt, depth)
        except RequestError:
            raise
        except Exception as error:
            raise _failed(error) from None

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


def _failed(error: Exception) -> EngineDeadError:
    """What to raise for a bug: Serve logs what a replica raises with its text, which may quote the prompt."""
    log.error("a request failed\n%s", frames(error))
    return EngineDeadError("the engine replica failed", got=type(error).__name__, do="try again")


def _identity(directory: str, gateways: str, args: ServeArgs) -> str:
    """What tells a model directory's weights from others. Raises CheckpointError for none that can be served, ConfigError for
    one that reads other tokens than `gateways` does: the gateway encodes for both."""
    new, known = args.served(directory), args.served(gateways)
    for what in ("config", "chat_template"):
        if getattr(new, what) != getattr(known, what):
            raise ConfigError(f"user_config.model: {what}", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    if (Path(directory) / "tokenizer.json").read_bytes() != (Path(gateways) / "tokenizer.json").read_bytes():
        raise ConfigError("user_config.model: tokenizer", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    manifest = Path(directory) / "manifest.json"
    return directory + (manifest.read_text(encoding="utf-8") if manifest.is_file() else "")


async def _leave(engine: AsyncEngine | VllmEngine, seconds: float) -> None:
    from shoal.engine.front import settle

    await engine.drain(seconds)
    await engine.close()
    del engine
    settle()  # it was out of the collector's sight
