"""Engine replicas on Ray Serve.

Notable: events cross as lists of what was ready. A first token waits for nothing; after it a replica sends some `LISTS` of them
a second, so that a fast engine with many streams does not pay for a message a token. The weights are not an argument of a
replica but what Serve calls the user config, which can change while the replica serves; a call says which it wants (`calls`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.context import ReplicaContext
from ray.serve.schema import LoggingConfig

from shoal import config
from shoal.api.serve_args import ServeArgs
from shoal.data import models
from shoal.engine.events import Event, Finished, Request
from shoal.engine.metrics import Samples, sample
from shoal.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    RequestError,
    ResourceError,
    ShoalError,
    first_line,
    frames,
)
from shoal.machine import cores, threads
from shoal.on_ray import calls
from shoal.on_ray.calls import Begun, OtherModelError, Wanted
from shoal.on_ray.failover import other_weights
from shoal.on_ray.following import follow, stable
from shoal.on_ray.loaded import LastLoaded
from shoal.on_ray.replica_adapters import ReplicaAdapters
from shoal.on_ray.routing import router_config
from shoal.on_ray.scaling import KV_USE, replicas
from shoal.on_ray.serve_config import Weights

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine
    from shoal.vllm_plugin.serving import VllmEngine

log = logging.getLogger("ray.serve")

ANOTHER = "serve it under another name (args.models), or start the service anew"

LISTS = 50 * cores()  # a second, of all streams of a replica together: each takes 1.9 ms from the cores
GAP_SECONDS = 0.2  # between two lists of one stream at most, however many there are: nobody reads faster

HELD = 4096  # requests that a replica may hold: those that run, that wait, and that nobody reads

LEAVE_SECONDS = 0.1  # how often an engine that leaves looks whether its streams have ended

# Ray gives every worker niceness 15: a replica that computes goes before the processes that send its tokens on
FIRST = {"RAY_worker_niceness": "0"}

LIFE: dict[str, Any] = {  # of a replica of either kind
    "graceful_shutdown_wait_loop_s": 0.25,  # how often a replica that is to go looks whether its streams have ended
    "graceful_shutdown_timeout_s": 60.0,
}
LOGGING = LoggingConfig(enable_access_log=False)  # the gateway writes one line a request itself


def engine_options(args: ServeArgs, model: str, page: int) -> dict[str, Any]:
    """Serve's options for the engine replicas that `args` ask for, which serve the model directory `model`, of pages of
    `page` tokens."""
    # our engine takes in all that come: only where it sees them its order counts, and who is refused is its to say
    ongoing = HELD if args.engine == "shoal" else 2 * args.max_batch  # a batch that runs and one that waits close to it
    options: dict[str, Any] = {
        "max_ongoing_requests": ongoing,
        "user_config": {"model": model},  # the one thing that can change while a replica serves
        "request_router_config": router_config(page, args.max_queue, may_be_none=args.min_replicas == 0),
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": args.cpus, "num_gpus": args.gpus, "runtime_env": {"env_vars": FIRST}},
        "health_check_period_s": 2.0,  # Serve replaces a replica that fails three times in a row
        "health_check_timeout_s": 30.0,
        **LIFE,
    }
    return options | replicas(args.min_replicas, args.max_replicas, max(1.0, 0.75 * args.max_batch))


def surge(args: ServeArgs) -> dict[str, Any]:
    """Serve's option that starts a new replica before an old one goes, so that a failing update takes none along. Not where the
    cluster has no room for one more: it would wait for ever."""
    free: dict[str, float] = ray.available_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    room = free.get("CPU", 0.0) >= args.cpus and free.get("GPU", 0.0) >= args.gpus
    return {"max_surge_percent": 1} if room and free else {}  # 1 %, rounded up: one


class EngineReplica:
    """One engine with the model in memory. Serve calls `reconfigure` before it sends the first request."""

    def __init__(self, args: ServeArgs, model: str) -> None:
        """`model`: the directory that the gateway reads the tokenizer of."""
        self._args, self._gateways = args, model
        self._engine: AsyncEngine | VllmEngine | None = None
        self._told = ("", "")  # `_identities` of what serves
        self._reads = ""
        self._weights = ""  # what a call names: files, how they are computed with, and in what
        self._leaving: dict[str, AsyncEngine | VllmEngine] = {}  # weights -> an engine whose last streams go on
        self._ending: set[asyncio.Task[None]] = set()
        self._running = Counter[str]()  # weights -> streams that are with their engine
        self._asked: dict[str, Any] = {}  # the newest user config
        self._changes: set[asyncio.Task[None]] = set()
        self._following: asyncio.Task[None] | None = None
        self._refused = False
        self._streams = 0  # that have begun and not ended
        self._changing = asyncio.Lock()
        self._last = LastLoaded(model)
        replica = _context()
        self._name = "" if replica is None else replica.replica_id.unique_id
        self._adapters = ReplicaAdapters(args, self._name)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serves the weights of the model directory in `user_config`, loaded beside those that serve, so nothing stops: streams
        that run end on the weights that they began with, and requests that come later get the new ones.

        Returns at once where weights serve already, and loads them meanwhile: until it returns Serve sends a replica nothing,
        and of one replica that would be nobody. `info` says which weights serve, `stats` whether others are on their way.

        What cannot be loaded changes nothing, and the log and `stats` say so: a slip in a new directory's name is no reason to
        end a service. A replica that starts then takes what the deployment loaded last. Raises CheckpointError and ConfigError
        in one that starts where nothing was loaded before.
        """
        self._asked, release = user_config, self._args.release
        if release and self._following is None:
            self._asked = {"model": await asyncio.to_thread(stable, release)}
        if self._engine is None:
            await self._change()
            if release and self._following is None:
                serves = "" if self._refused else self._asked["model"]  # else it is tried again
                self._following = asyncio.create_task(follow(release, serves, self._take_stable))
            return
        task = asyncio.create_task(self._change())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _change(self) -> None:
        """Takes the weights that were asked for last, when its turn comes."""
        async with self._changing:
            directory = ""
            try:
                directory = config.load(Weights, self._asked, "user_config").model
                await self._take(directory)
                self._refused = False
                return
            except Exception as error:
                before = None if self._engine is not None else self._last.get()
                if self._engine is None and before in (None, directory):
                    raise
                what = str(error) if isinstance(error, ShoalError) else frames(error)
                log.error("the weights stay as they are: %s", what)
                self._refused = True
            await _settle()  # the error held what was loaded until here
            if before is not None:
                await self._take(before)

    async def _take_stable(self, directory: str) -> None:
        """Raises CheckpointError where the weights stay as they are: it is asked again then."""
        self._asked = {"model": directory}
        await self._change()
        if self._refused:
            raise CheckpointError(f"{directory} is not served", do="see above: it is tried again")

    async def _take(self, directory: str) -> None:
        """Loads the weights of `directory` and gives new requests to them. Nothing has changed when it raises."""
        told = await asyncio.to_thread(_identities, directory, self._gateways, self._args)
        if told == self._told:  # Serve also calls this when nothing of it changed
            return
        engine = await asyncio.to_thread(self._load, directory)
        try:
            if await asyncio.to_thread(_identities, directory, self._gateways, self._args) != told:
                raise CheckpointError(
                    f"{directory} changed while it was loaded", do="write a model beside it, and rename it"
                )
            await self._adapters.load_known(engine)
            how = [info["quantization"] for info in await engine.info()]  # in fp32, say, where INT8 cannot be trusted
        except BaseException:
            await engine.close()  # or its threads would hold its memory as long as this process lives
            raise
        before, old = self._engine, self._weights
        self._engine, self._told, self._reads = engine, told, told[0]
        self._weights = "-".join([told[1], *how])
        if before is not None:
            log.info("new requests get the weights of %s", directory)
            self._leaving[old] = before
            before = None  # no longer ours: it may be gone before this returns
            task = asyncio.create_task(self._leave(old))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        try:
            await asyncio.to_thread(self._last.put, directory)
        except Exception as error:  # they serve: one that starts later may have to take others
            log.error("it is not kept which weights were loaded last: %s", type(error).__name__)

    async def _leave(self, weights: str) -> None:
        """Ends the engine of `weights` when no stream is with it, at the latest when the longest request's time is over. Until
        then it takes streams that began with its weights elsewhere."""
        engine, until = self._leaving[weights], asyncio.get_running_loop().time() + self._args.seconds
        while self._running[weights] and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(LEAVE_SECONDS)
        if self._leaving.get(weights) is engine:
            del self._leaving[weights]
        await engine.close()
        del engine
        await _settle()

    def _load(self, directory: str) -> AsyncEngine | VllmEngine:
        place = str(models.here(directory))
        if self._args.engine == "vllm":
            if self._engine is not None:
                raise ConfigError(
                    "user_config.model", got=directory, do="deploy anew: vLLM holds the memory of one model"
                )
            from shoal.vllm_plugin.start import start

            return start(place, self._args.served(place), self._args)
        import torch

        from shoal.engine.engine import Engine
        from shoal.engine.front import AsyncEngine, settle
        from shoal.model.model import Model
        from shoal.open_weights.served_adapter import read

        args = self._args
        torch.set_num_threads(threads(args.threads))
        say = log.warning
        model = Model.load(place, on_fallback=say if args.precision == "auto" else None)
        batch, queue, kv = args.max_batch, args.max_batch + args.max_queue, args.kv_cache_dtype
        try:
            if args.gpus > 0:
                model.on_gpu(args.dtype)
            own = Engine(model, max_batch=batch, max_queue=queue, kv_cache_dtype=kv, gpu_share=args.engine_share)
        except torch.OutOfMemoryError as error:
            do = "give what runs beside it less (gpu_share: 0.45 each for two engines), or take a larger GPU"
            allowed = "weights that fit what is free of it"
            raise ResourceError("the GPU's memory", got=first_line(error), allowed=allowed, do=do) from None
        engine = AsyncEngine(own, read_adapter=read)
        settle()
        return engine

    def _chosen(self, wanted: Wanted) -> tuple[AsyncEngine | VllmEngine, str]:
        """The engine that a call wants, and its weights. Raises OtherModelError where there is none."""
        if wanted.reads != self._reads and self._engine is not None:
            error = OtherModelError("the engines serve a model of another tokenizer, template or shape", do="try again")
            error.replica = self._name
            raise error
        if wanted.weights in (None, self._weights):
            return self._serving, self._weights
        if (leaving := self._leaving.get(wanted.weights)) is None:
            raise other_weights(self._name)
        return leaving, wanted.weights

    @property
    def _serving(self) -> AsyncEngine | VllmEngine:
        if self._engine is None:
            error = EngineDeadError("the replica has no weights yet", do="try again")
            error.taken = False
            raise error
        return self._engine

    async def generate(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        """Events of one request, in lists of what was ready, `Begun` in front. An error is in the last event, never raised."""
        begun, weights = False, ""
        try:
            engine, weights = self._chosen(wanted)
            self._running[weights] += 1
            await self._adapters.need(engine, *wanted.adapter)
            async with aclosing(engine.batches(request, self._gap)) as lists:
                async for events in lists:
                    if begun:
                        yield [*events]
                    else:
                        begun, self._streams = True, self._streams + 1
                        yield [Begun(self._name, weights), *events]
        except RequestError as error:
            # vLLM's end raises: it had the request, and may have ended by it
            died = bool(weights) and isinstance(error, EngineDeadError) and error.taken
            front = [Begun(self._name, weights)] if died and not begun else []
            yield [*front, Finished(request.id, "error", error=error)]
        except Exception as error:
            raise _failed(error) from None
        finally:
            self._streams -= begun
            if weights:
                self._running[weights] -= 1

    def _gap(self) -> float:
        return min(GAP_SECONDS, self._streams / LISTS)

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int,
        wanted: Wanted,
        payer: str = "",
        client: str = "",
        priority: int = 0,
    ) -> tuple[str, list[list[float]]]:
        """The weights, and a vector for each of `prompts`, all by one engine, which does not leave before the last."""
        engine, weights = self._chosen(wanted)
        self._running[weights] += 1
        held = {"adapter": wanted.adapter[0]} if wanted.adapter[0] else {}  # vLLM's takes none
        try:
            await self._adapters.need(engine, *wanted.adapter)
            vectors = await engine.embed(prompts, depth, payer=payer, client=client, priority=priority, **held)
            return weights, vectors
        except RequestError:
            raise
        except Exception as error:
            raise _failed(error) from None
        finally:
            self._running[weights] -= 1

    async def load_adapter(self, directory: str) -> str:
        """As `ReplicaAdapters.load`."""
        return await self._adapters.load(self._serving, directory)

    async def keep_adapters(self, known: dict[str, str], held: list[str], at: int) -> None:
        """As `ReplicaAdapters.keep`."""
        await self._adapters.keep(self._serving, known, held, at)

    async def stats(self) -> Samples:
        """Each sample with this replica's name: one that goes takes its counters along, and no sum of others drops."""
        told = {sample("weights_update_refused"): float(self._refused)}
        found = {**await self._serving.stats(), **told, sample("weights_loading"): float(bool(self._changes))}
        return {key.beside(replica=self._name): value for key, value in found.items()} if self._name else found

    async def info(self) -> dict[str, str]:
        (info,) = await self._serving.info()
        return {**info, "weights": self._weights}

    async def reads(self) -> str:
        """`calls.reads` of what it serves."""
        return self._reads

    async def check_reads(self, reads: str) -> None:
        """Raises EngineDeadError for an engine that is dead, OtherModelError for one that reads anything else."""
        await self.check_health()
        self._chosen(Wanted("", reads))

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        await self._serving.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {KV_USE: (await self._serving.stats())[sample("kv_cache_usage_perc")]}

    async def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            await self._serving.close()


async def _settle() -> None:
    """Free what an engine that is gone has held, on a GPU too: it was out of the collector's sight."""
    from shoal.engine.device import give_back
    from shoal.engine.front import settle

    settle()
    await asyncio.to_thread(give_back)


def _failed(error: Exception) -> EngineDeadError:
    """What to raise for a bug: Serve logs what a replica raises with its text, which may quote the prompt."""
    log.error("a request failed\n%s", frames(error))
    return EngineDeadError("the engine replica failed", got=type(error).__name__, do="try again")


def _context() -> ReplicaContext | None:
    """Serve's; None in a process that is no replica."""
    return serve.get_replica_context() if ray.is_initialized() else None


def _identities(directory: str, gateways: str, args: ServeArgs) -> tuple[str, str]:
    """`calls.reads` and `calls.weights` of a model directory. Raises CheckpointError for one that cannot be served, ConfigError
    for one that reads other tokens than `gateways` does: the gateway encodes for both."""
    new, known = args.served(directory), args.served(gateways)
    for what in ("config", "chat_template"):
        if getattr(new, what) != getattr(known, what):
            raise ConfigError(f"user_config.model: {what}", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    read = calls.reads(new, directory)
    if read != calls.reads(known, gateways):
        raise ConfigError("user_config.model: tokenizer", got=directory, allowed=f"that of {gateways}", do=ANOTHER)
    return read, calls.weights(directory, args)
