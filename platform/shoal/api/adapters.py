"""LoRA adapters as models of their own beside the one that they were trained from: which there are, and the routes that load
and drop them, which are vLLM's.

A name stands for an identity, which engines know the weights by; so requests that have begun end with what they began with,
whatever the name comes to mean: engines keep an adapter as long as a request holds it. What a request may load lies below one
folder that the operator names.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from shoal.api.bodies import LoadAdapterRequest, UnloadAdapterRequest
from shoal.api.client import EngineClient
from shoal.api.document import POSTED, body_of, refused
from shoal.api.served import MODEL_NAME, MOST_ADAPTERS
from shoal.api.service import Hosted, Service
from shoal.api.wire import ModelNotFoundError, NotFoundError
from shoal.config import FULL
from shoal.engine.events import Event
from shoal.engine.events import Request as Asked
from shoal.engine.metrics import Samples
from shoal.errors import ConfigError, RequestError, ShoalError
from shoal.model.adapter_files import CONFIG, WEIGHTS

SAID: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

LOOK_SECONDS = 1.0  # how often it is looked who still holds an adapter that is served no more

_PATH = re.compile(r"/?[\w.-]+(/[\w.-]+)*/?", re.ASCII)


@dataclass(frozen=True)
class Known:
    """An adapter that has been loaded."""

    identity: str
    directory: str
    created: int  # Unix seconds


OnChange = Callable[[Mapping[str, Known]], Awaitable[None]]


class WithAdapter:
    """An engine whose requests all have one adapter, as an `EngineClient`."""

    def __init__(self, client: EngineClient, identity: str) -> None:
        self._client, self._identity = client, identity

    def batches(self, request: Asked) -> AsyncIterator[list[Event]]:
        return self._client.batches(replace(request, adapter=self._identity))

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int = FULL,
        *,
        payer: str = "",
        client: str = "",
        priority: int = 0,
        adapter: str = "",
    ) -> list[list[float]]:
        held = adapter or self._identity
        return await self._client.embed(prompts, depth, payer=payer, client=client, priority=priority, adapter=held)

    async def load_adapter(self, directory: str) -> str:
        return await self._client.load_adapter(directory)

    async def keep_adapters(self, known: Mapping[str, str]) -> None:
        await self._client.keep_adapters(known)

    async def stats(self) -> Samples:
        return await self._client.stats()

    async def info(self) -> list[dict[str, str]]:
        return await self._client.info()

    async def check_health(self) -> None:
        await self._client.check_health()


class Adapters:
    """Those of the first model of a service."""

    def __init__(
        self,
        service: Service,
        known: Mapping[str, Known],
        folder: Path | None = None,
        on_change: OnChange | None = None,
    ) -> None:
        """`known`: those that its engine has, by name. `folder`: what requests load lies below it; None: they may not.
        `on_change` is told of all there are when that has changed. Raises ConfigError for a folder that is none, and for a name
        that cannot be or is another model's."""
        if folder is not None and not folder.is_dir():
            raise ConfigError("adapters_from", got=str(folder), allowed="a folder that holds adapters")
        self._service, self._base = service, service.models[0]
        self._folder = folder.resolve() if folder else None
        self._on_change = on_change
        self._known: dict[str, Known] = {}
        self._left: list[tuple[Known, Hosted]] = []  # shown no more, and held by requests when that was looked at last
        self._clearing: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        for name, adapter in known.items():
            if problem := self._wrong(name):
                raise ConfigError(f"adapters: {problem}", got=name)
            self._show(name, adapter)

    async def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Take in the adapter in the directory `path` below the folder. Raises NotFoundError where that is switched off,
        RequestError for a name or a directory that will not do; then nothing has changed."""
        root = self._root()
        async with self._changing:
            if problem := self._wrong(name):
                raise RequestError(f"lora_name: {problem}", param="lora_name", got=name[:100])
            if name in self._known and not in_place:
                do = "unload it first, or set load_inplace"
                raise RequestError("lora_name is loaded already", param="lora_name", got=name, do=do)
            if name not in self._known and len(self._known) >= MOST_ADAPTERS:
                raise RequestError(
                    "adapters", got=len(self._known), allowed=f"at most {MOST_ADAPTERS}", do="unload one"
                )
            directory = _below(root, path)
            try:
                identity = await self._base.client.load_adapter(str(directory))
            except RequestError:
                raise
            except ShoalError as error:
                message = error.message.replace(f"{root}/", "")  # where it lies is the operator's
                raise RequestError(message, param="lora_path") from error
            self._show(name, Known(identity, str(directory), int(time.time())))
            await self._told()

    async def unload(self, name: str) -> None:
        """Raises ModelNotFoundError for one that is not loaded."""
        self._root()
        async with self._changing:
            if name not in self._known:
                raise ModelNotFoundError(
                    "no such adapter", param="lora_name", got=name[:100], allowed=[*self._known] or "none is loaded"
                )
            self._hide(name)
            await self._told()

    def _root(self) -> Path:
        if self._folder is None:
            raise NotFoundError(
                "loading and unloading adapters is switched off",
                do="start the service with --adapters-from DIR, or args.adapters_from",
            )
        return self._folder

    def _wrong(self, name: str) -> str | None:
        """Why an adapter cannot be called so."""
        if not MODEL_NAME.fullmatch(name):
            return "letters, digits and . _ - are allowed, at most 64"
        if name in self._service.names and name not in self._known:
            return "a model has that name"
        return None

    def _show(self, name: str, known: Known) -> None:
        if name in self._known:
            self._hide(name)
        base = self._base
        served = replace(base.served, name=name, aliases=(), created=known.created, parent=base.served.name)
        self._known[name] = known
        self._service.names[name] = base.beside(served, WithAdapter(base.client, known.identity))

    def _hide(self, name: str) -> None:
        self._left.append((self._known.pop(name), self._service.names.pop(name)))

    async def _told(self) -> None:
        """Tell the engine, and whoever else wants to know, of all there are now."""
        await self._keep()
        if self._left and (self._clearing is None or self._clearing.done()):
            self._clearing = asyncio.create_task(self._clear())
        if self._on_change is not None:
            await self._on_change(dict(self._known))

    async def _keep(self) -> None:
        """Have the engine drop what is neither shown nor held."""
        self._left = [(known, hosted) for known, hosted in self._left if hosted.held]
        kept = [*(known for known, _ in self._left), *self._known.values()]
        await self._base.client.keep_adapters({each.identity: each.directory for each in kept})

    async def _clear(self) -> None:
        """Have those dropped that are held no more, until there are none."""
        while self._left:
            await asyncio.sleep(LOOK_SECONDS)
            async with self._changing:
                if not all(hosted.held for _, hosted in self._left):
                    with suppress(ShoalError):  # an engine that is dead keeps nothing
                        await self._keep()


def _below(root: Path, path: str) -> Path:
    """The directory `path`, absolute or from `root`, that with its files lies below `root`. Raises RequestError."""
    allowed = "a directory below the folder of --adapters-from"
    if len(path) > 1000 or not _PATH.fullmatch(path) or ".." in path.split("/"):
        raise RequestError("lora_path", param="lora_path", got=path[:100], allowed=allowed)
    try:
        directory = (root / path).resolve()
        places = [directory, *((directory / name).resolve() for name in (CONFIG, WEIGHTS))]
        lies = directory != root and all(place.is_relative_to(root) for place in places) and directory.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, a link to itself, a folder that may not be read
        lies = False
    if not lies:
        raise RequestError("lora_path", param="lora_path", got=path[:100], allowed=allowed)
    return directory


def adapter_routes(service: Service, adapters: Adapters) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["adapters"])

    @router.post(
        "/load_lora_adapter",
        openapi_extra=body_of(LoadAdapterRequest),
        response_class=Response,  # of PlainTextResponse the document would say that errors are text, too
        responses=SAID | refused(*POSTED),
    )
    async def load_lora_adapter(request: Request) -> PlainTextResponse:
        """Serves a LoRA adapter of the first model under a name of its own, from the next request on."""
        body = await service.read_body(request, LoadAdapterRequest)
        await adapters.load(body.lora_name, body.lora_path, in_place=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/unload_lora_adapter",
        openapi_extra=body_of(UnloadAdapterRequest),
        response_class=Response,  # of PlainTextResponse the document would say that errors are text, too
        responses=SAID | refused(*POSTED),
    )
    async def unload_lora_adapter(request: Request) -> PlainTextResponse:
        """Serves it no more. Answers that have begun end with it."""
        body = await service.read_body(request, UnloadAdapterRequest)
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


async def loaded(client: EngineClient, directories: Mapping[str, str]) -> dict[str, Known]:
    """The adapters in `directories`, by name, once the engine of `client` has them. Raises CheckpointError."""
    now = int(time.time())
    return {name: Known(await client.load_adapter(path), path, now) for name, path in directories.items()}
