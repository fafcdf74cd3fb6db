"""The whole service in one process, without Ray: the app of `app.py` over an engine of its own, under uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from shoal.api.access import log_to_stderr
from shoal.api.adapters import loaded
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.client import EngineClient
from shoal.api.connection import KEEP_ALIVE_SECONDS, Connection
from shoal.api.door import Door
from shoal.api.drain import STREAM_SECONDS, Drain
from shoal.api.follow import Follower
from shoal.api.limits import Limits
from shoal.api.local import Changing, Here
from shoal.api.middleware import OPEN_PATHS
from shoal.api.page import chat_page
from shoal.api.serve_args import ServeArgs
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.data import models
from shoal.errors import ConfigError, ResourceError
from shoal.loop.release import Release
from shoal.machine import need_free_port, threads

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine

Ends = Callable[[], Coroutine[Any, Any, None]]

# fields of ServeArgs that only Ray Serve can follow: here are one engine, its queue, and the cores of this process
ON_RAY = (
    "models", "min_replicas", "max_replicas", "min_gateways", "max_gateways", "max_queue", "cpus", "gpus", "engine", "vllm",
)  # fmt: skip
# asyncio accepts as many connections in one go as it was told may wait: at uvicorn's two thousand, who connects and leaves
# again and again would have the loop for seconds before anybody else's turn
ACCEPTED = 2
BACKLOG = 2048  # connections that may wait all the same
CLOSE_SECONDS = 5  # for what was said last to be sent


def run_local(
    args: ServeArgs, *, host: str = "127.0.0.1", port: int = 8000, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serves the model of `args` until Ctrl-C or SIGTERM, a line a request to stderr; `on_ready` gets the base URL (port 0: a
    free one). Then it takes no new work and gives what runs `STREAM_SECONDS`; a second signal is KeyboardInterrupt at once.

    Raises ConfigError for `args` that one process cannot follow, CheckpointError, DataError, and ResourceError for a used port.
    """
    from shoal.engine.front import settle

    args = args.at_stable()
    model = str(models.here(_one_model(args)))
    port = _free_port(host, port)  # now, since the page is told where the API is
    page = chat_page(args.ui_api or f"http://{host}:{port}/v1", mount=args.ui_mount) if args.ui else None
    keys = ApiKeys.load(args.api_keys)
    args.begin_capture()
    served = args.served(model, args.name)
    engine = _engine(model, args)
    settle()
    log_to_stderr()

    async def serve() -> bool:
        drain = Drain(OPEN_PATHS)
        try:
            adapters = await loaded(engine, args.adapters)
        except BaseException:
            await engine.close()
            raise
        client, follower, ends = _followed(args, engine)
        app = build_app(
            [Hosted(served, client)],
            follower=follower,
            api_keys=keys,
            limits=Limits(seconds=args.seconds),
            metrics=args.metrics,
            cors=args.cors,
            runs=Path(args.runs) if args.runs else None,
            batches=Path(args.batches) if args.batches else None,
            at_once=args.max_batch,
            capture=args.captured,
            adapters=adapters,
            adapters_from=args.adapters_from,
            run_code=args.run_code,
            tools=args.tools,
            ui_mount=page,
            drain=drain,
        )
        first, second = _signals()
        try:
            async with serving(app, host, port) as running:
                if on_ready:
                    on_ready(running.url)
                await _any(running.stopped, first.wait())
                await _leave(running, drain, ends, second)
        finally:
            await ends()
        return second.is_set()

    if asyncio.run(serve()):
        raise KeyboardInterrupt


def _free_port(host: str, port: int) -> int:
    """`port`, or of 0 one that is free. Raises ResourceError for one that is not, before a model is loaded."""
    if port:
        need_free_port(host, port)
        return port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _one_model(args: ServeArgs) -> str:
    """The directory that one process is to serve. Raises ConfigError for what only Ray Serve can follow."""
    for field in dataclasses.fields(args):
        given = getattr(args, field.name)
        if field.name in ON_RAY and given not in (field.default, {}):
            raise ConfigError(f"args.{field.name}", got=given, do="serve it on Ray, or leave it out")
    if not args.model:
        raise ConfigError("args.model", got="nothing", do="give a model directory")
    return args.model


def _engine(model: str, args: ServeArgs) -> AsyncEngine:
    """The engine over the weights in a model directory; where `args.precision` is "auto", stderr is told of fp32."""
    import torch

    from shoal.engine.engine import Engine
    from shoal.engine.front import AsyncEngine
    from shoal.model.model import Model
    from shoal.open_weights.served_adapter import read

    torch.set_num_threads(threads(args.threads))
    say = partial(print, "shoal: in fp32, since", file=sys.stderr) if args.precision == "auto" else None
    held = Model.load(model, on_fallback=say)
    engine = Engine(held, max_batch=args.max_batch, kv_cache_dtype=args.kv_cache_dtype)
    return AsyncEngine(engine, read_adapter=read)


def _followed(args: ServeArgs, engine: AsyncEngine) -> tuple[EngineClient, Follower | None, Ends]:
    """`engine` as a client; who follows the release, where `args` name one, and puts other versions in its place; and what ends
    all engines."""
    if not args.release:
        return engine, None, engine.close
    release = Release(args.release)
    stable = release.stable()
    serving = Changing(engine, stable.label)
    split = Split(serving)
    here = Here(serving, partial(_engine, args=args))
    return split, Follower(release, split, here, serves=stable.number), here.close


async def _leave(running: Running, drain: Drain, ends: Ends, second: asyncio.Event) -> None:
    """Takes no new work, lets what runs end, `ends` the engines, and ends the server; each wait is over with a `second`
    signal."""
    drain.close()
    await _any(running.stopped, drain.ended(STREAM_SECONDS), second.wait())
    await ends()  # what is left is told
    await _any(drain.ended(CLOSE_SECONDS), second.wait())
    running.end(at_once=second.is_set())


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and by the second Ctrl-C or SIGTERM that the running event loop's process gets."""
    first, second = asyncio.Event(), asyncio.Event()

    def got() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, got)
    return first, second


async def _any(*waits: Awaitable[object]) -> None:
    """Returns when one of `waits` has ended; those that are not tasks of the caller end with it."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: it would stop listening at the first signal, and nobody would be told
    why."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class Running:
    """A server inside the running event loop."""

    url: str  # http://HOST:PORT, without /v1
    stopped: asyncio.Task[None]  # done when the server has ended
    server: uvicorn.Server

    def end(self, *, at_once: bool) -> None:
        """Listens no more, and waits `CLOSE_SECONDS` for what is still being sent; `at_once`: not at all. Work has ended by
        then, so what uvicorn says of the rest, such as pages that are open, is for nobody."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        self.server.config.timeout_graceful_shutdown = 0 if at_once else CLOSE_SECONDS
        self.server.should_exit = True


@asynccontextmanager
async def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Running]:
    """Serves `app` inside the running event loop for as long as the context lasts. Port 0: a free one.

    Raises ResourceError when the port is in use.
    """
    config = uvicorn.Config(
        Door(app),
        host=host,
        port=port,
        http=Connection,  # by h11: httptools keeps headers of any length, and loses the body where h2c is offered
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=ACCEPTED,
    )
    server = _Server(config)
    try:
        listener = config.bind_socket()
    except SystemExit:  # uvicorn's way to say it
        raise ResourceError(f"port {port} on {host} is in use", do="stop what uses it or choose another port") from None
    # asyncio sets it for sockets that name their protocol, which uvicorn's do not; connections inherit it. Without it a body
    # waits for the client's delayed acknowledgement of the headers: 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                raise ResourceError("the HTTP server stopped while starting", got=task.exception())
            await asyncio.sleep(0.01)
        listener.listen(BACKLOG)
        yield Running(f"http://{host}:{listener.getsockname()[1]}", task, server)
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        listener.close()
