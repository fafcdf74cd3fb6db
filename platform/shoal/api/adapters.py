"""LoRA adapters as models of their own beside the one that they were trained from: which there are, and the routes that load
and drop them, which are vLLM's.

A name stands for an identity, which engines know the weights by; so requests that have begun end with what they began with,
whatever the name comes to mean: engines keep an adapter as long as a request holds it. What a request may load lies below one
folder, or prefix of S3, that the operator names.

Of several gateways each has an `Adapters` over the same `Names`: what one changes the others are told of before it answers, and
look for once a second in any case.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from shoal.api.adapter_names import Alone, Known, Names, State
from shoal.api.bodies import LoadAdapterRequest, UnloadAdapterRequest
from shoal.api.client import EngineClient
from shoal.api.document import POSTED, body_of, refused
from shoal.api.served import MODEL_NAME, MOST_ADAPTERS
from shoal.api.service import Hosted, Service
from shoal.api.wire import ModelNotFoundError, NotFoundError
from shoal.config import FULL
from shoal.data.sources import s3
from shoal.data.sources.s3 import is_remote
from shoal.engine.events import Event
from shoal.engine.events import Request as Asked
from shoal.engine.metrics import Samples
from shoal.errors import ConfigError, RequestError, ShoalError, frames
from shoal.model.adapter_files import CONFIG, WEIGHTS

SAID: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

LOOK_SECONDS = 1.0  # how often it is looked who still holds an adapter that is served no more

_PATH = re.compile(r"/?[\w.-]+(/[\w.-]+)*/?", re.ASCII)


log = logging.getLogger("shoal.api")


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

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        await self._client.keep_adapters(known, held, at)

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
        state: State | None = None,
        place: str | Path | None = None,
        names: Names | None = None,
    ) -> None:
        """`state`: those that its engine has; `place`: what requests load lies below it; None: they may not; `names`: where the
        state is kept (default: here). Raises ConfigError for a place that is none, and for a name that cannot be or is another
        model's."""
        self._service, self._base = service, service.models[0]
        self._place = None if place is None else _place(place)
        self._names = names or Alone(state or State())
        self._known: dict[str, Known] = {}
        self._number, self._at = -1, 0
        self._left: list[tuple[Known, Hosted]] = []  # shown no more, and held by requests when that was looked at last
        self._unsure = False  # what requests of other gateways hold
        self._clearing: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        for name in (state or State()).known:
            if problem := self._wrong(name):
                raise ConfigError(f"adapters: {problem}", got=name)
        self._take(state or State())

    async def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Take in the adapter in the directory `path` below the place. Raises NotFoundError where that is switched off,
        RequestError for a name or a directory that will not do; then nothing has changed."""
        root = self._root()
        async with self._changing:
            if problem := self._wrong(name):
                raise RequestError(f"lora_name: {problem}", param="lora_name", got=name[:100])
            _need_free(name, (await self._names.get()).known, in_place)
            directory = _below(root, path)
            try:
                identity = await self._base.client.load_adapter(directory)
                found = Known(identity, directory, int(time.time()))
                state = await self._names.change(lambda known: _with(name, found, known, in_place))
            except ShoalError as error:
                with suppress(ShoalError):  # no engine is to have it for nothing
                    await self._keep()
                if isinstance(error, RequestError):
                    raise
                message = error.message.replace(f"{root}/", "")  # where it lies is the operator's
                raise RequestError(message, param="lora_path") from error
            await self._told(state)

    async def unload(self, name: str) -> None:
        """Raises ModelNotFoundError for one that is not loaded."""
        self._root()
        async with self._changing:
            await self._told(await self._names.change(lambda known: _without(name, known)))

    async def look(self) -> dict[str, str]:
        """Takes what others have changed; what requests here still hold of what is shown no more, identity -> directory."""
        self._take(await self._names.get())
        return {known.identity: known.directory for known, hosted in self._left if hosted.held}

    async def run(self) -> None:
        """Looks until it is cancelled: a gateway that changed something may have been unable to tell of it."""
        said = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
                said = ""
            except Exception as error:  # of who keeps the names: what is known goes on
                what = error.message if isinstance(error, ShoalError) else frames(error)
                if what != said:
                    log.error("adapters that other gateways change are not seen: %s", what)
                said = what

    def _root(self) -> Path | str:
        if self._place is None:
            raise NotFoundError(
                "loading and unloading adapters is switched off",
                do="start the service with --adapters-from DIR, or args.adapters_from",
            )
        return self._place

    def _wrong(self, name: str) -> str | None:
        """Why an adapter cannot be called so."""
        if not MODEL_NAME.fullmatch(name):
            return "letters, digits and . _ - are allowed, at most 64"
        if name in self._service.names and name not in self._known:
            return "a model has that name"
        return None

    def _take(self, state: State) -> None:
        """Show what `state` has, unless a newer one is shown."""
        if state.number <= self._number:
            return
        self._number, self._at = state.number, state.at
        before = {name: (known, self._service.names.pop(name)) for name, known in self._known.items()}
        self._known = dict(state.known)
        for name, known in self._known.items():
            kept = before.get(name)
            if kept is not None and kept[0] == known:
                self._service.names[name] = before.pop(name)[1]
            else:
                base = self._base
                served = replace(base.served, name=name, aliases=(), created=known.created, parent=base.served.name)
                self._service.names[name] = base.beside(served, WithAdapter(base.client, known.identity))
        self._left += [each for each in before.values() if each[1].held]
        self._names.know({each.identity: each.directory for each in (*self._known.values(), *self._still())})
        self._clear_later()

    def _still(self) -> list[Known]:
        return [known for known, _ in self._left]

    async def _told(self, state: State) -> None:
        """Show `state`, and tell the other gateways and the engine."""
        self._take(state)
        await self._keep()
        self._clear_later()

    async def _keep(self) -> None:
        """Have the engine drop what is neither shown nor held, at any gateway. Where one does not say what it holds nothing is
        dropped now."""
        others = await self._names.elsewhere()
        self._unsure = others is None
        if others is not None:
            self._left = [(known, hosted) for known, hosted in self._left if hosted.held]
            held = {**others, **{known.identity: known.directory for known in self._still()}}
            known = {each.identity: each.directory for each in self._known.values()}
            await self._base.client.keep_adapters(known, held, self._at)

    def _clear_later(self) -> None:
        if (self._left or self._unsure) and (self._clearing is None or self._clearing.done()):
            self._clearing = asyncio.create_task(self._clear())

    async def _clear(self) -> None:
        """Have those dropped that are held no more, until there are none."""
        while self._left or self._unsure:
            await asyncio.sleep(LOOK_SECONDS)
            async with self._changing:
                if self._unsure or not all(hosted.held for _, hosted in self._left):
                    with suppress(ShoalError):  # an engine that is dead keeps nothing
                        await self._keep()


def _need_free(name: str, known: Mapping[str, Known], in_place: bool) -> None:
    """Raises RequestError where `name` cannot be added to what is known."""
    if name in known and not in_place:
        do = "unload it first, or set load_inplace"
        raise RequestError("lora_name is loaded already", param="lora_name", got=name, do=do)
    if name not in known and len(known) >= MOST_ADAPTERS:
        raise RequestError("adapters", got=len(known), allowed=f"at most {MOST_ADAPTERS}", do="unload one")


def _with(name: str, found: Known, known: Mapping[str, Known], in_place: bool) -> dict[str, Known]:
    _need_free(name, known, in_place)
    return {**known, name: found}


def _without(name: str, known: Mapping[str, Known]) -> dict[str, Known]:
    if name not in known:
        raise ModelNotFoundError(
            "no such adapter", param="lora_name", got=name[:100], allowed=[*known] or "none is loaded"
        )
    return {each: known[each] for each in known if each != name}


def _place(given: str | Path) -> Path | str:
    """The folder, or the address in S3 without a slash at its end. Raises ConfigError."""
    if is_remote(given):
        s3.split(str(given))
        return str(given).rstrip("/")
    if not Path(given).is_dir():
        raise ConfigError(
            "adapters_from", got=str(given), allowed="a folder that holds adapters, or s3://BUCKET/PREFIX"
        )
    return Path(given).resolve()


def _below(root: Path | str, path: str) -> str:
    """The directory `path`, absolute or from `root`, that with its files lies below `root`; of S3 the address, which only who
    reads it finds empty. Raises RequestError."""
    allowed = "a directory below the folder of --adapters-from"
    inside = path.removeprefix(f"{root}/") if isinstance(root, str) else path
    if len(path) > 1000 or not _PATH.fullmatch(inside) or ".." in path.split("/"):
        raise RequestError("lora_path", param="lora_path", got=path[:100], allowed=allowed)
    if isinstance(root, str):
        parts = [part for part in inside.split("/") if part not in ("", ".")]
        if not parts or inside.startswith("/"):
            raise RequestError("lora_path", param="lora_path", got=path[:100], allowed=allowed)
        return "/".join([root, *parts])
    try:
        directory = (root / path).resolve()
        places = [directory, *((directory / name).resolve() for name in (CONFIG, WEIGHTS))]
        lies = directory != root and all(place.is_relative_to(root) for place in places) and directory.is_dir()
    except (OSError, RuntimeError):  # a name that is too long, a link to itself, a folder that may not be read
        lies = False
    if not lies:
        raise RequestError("lora_path", param="lora_path", got=path[:100], allowed=allowed)
    return str(directory)


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


async def loaded(client: EngineClient, directories: Mapping[str, str]) -> State:
    """The adapters in `directories`, by name, once the engine of `client` has them. Raises CheckpointError."""
    now = int(time.time())
    known = {name: Known(await client.load_adapter(path), path, now) for name, path in directories.items()}
    return State(known=known)
