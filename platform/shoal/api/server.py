"""The whole service in one process, without Ray: the app of `app.py` over an engine of its own, under uvicorn."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from shoal.api.access import log_to_stderr
from shoal.api.app import UiMount, build_app
from shoal.api.auth import ApiKeys
from shoal.api.limits import Limits
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.config import KvCacheDtype
from shoal.errors import ResourceError


def run_local(
    model_dir: str | Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: str | Path | None = None,
    metrics: bool = True,
    cors: Sequence[str] = (),
    runs: Path | None = None,
    ui_mount: UiMount | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    on_fallback: Callable[[str], None] | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a model directory until Ctrl-C, and writes a line a request to stderr. `on_ready` is called once with the base URL
    (port 0: a free one is taken).

    `name`: as of `ServedModel.load`; `api_keys`: a file of keys; `metrics`, `cors`, `runs`, `ui_mount`: as of `build_app`;
    `threads`: compute threads (default: all cores but one, which is left to HTTP); `kv_cache_dtype`: as of `Engine`;
    `on_fallback`: as of `Model.load`.
    Raises CheckpointError for a directory that cannot be served, ResourceError for a port in use.
    """
    import torch

    from shoal.engine.engine import Engine
    from shoal.engine.front import AsyncEngine, settle
    from shoal.model.model import Model

    keys = ApiKeys.load(api_keys)
    served = ServedModel.load(model_dir, name)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 2) - 1))
    engine = AsyncEngine(Engine(Model.load(model_dir, on_fallback=on_fallback), kv_cache_dtype=kv_cache_dtype))
    settle()

    log_to_stderr()

    async def serve() -> None:
        app = build_app(
            [Hosted(served, engine)],
            api_keys=keys,
            limits=limits,
            metrics=metrics,
            cors=cors,
            runs=runs,
            ui_mount=ui_mount,
        )
        try:
            async with serving(app, host, port) as running:
                if on_ready:
                    on_ready(running.url)
                await asyncio.wait([running.stopped])
        finally:
            await engine.close()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())


@dataclass(frozen=True)
class Running:
    """A server inside the running event loop."""

    url: str  # http://HOST:PORT, without /v1
    stopped: asyncio.Task[None]  # done when the server has ended, by itself or by a signal


@asynccontextmanager
async def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Running]:
    """Serves `app` inside the running event loop for as long as the context lasts. Port 0: a free one.

    Raises ResourceError when the port is in use.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",  # httptools keeps headers of any length, and loses the body of a request that asks for h2c
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
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
        yield Running(f"http://{host}:{listener.getsockname()[1]}", task)
    finally:
        server.should_exit = True
        await asyncio.wait([task])
        listener.close()
