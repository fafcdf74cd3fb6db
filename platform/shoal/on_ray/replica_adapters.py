"""The adapters of one engine replica: what gateways have it load and drop, and what a request finds missing.

Where an engine is given, it is one of the replica's: while weights change there are two.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from shoal.api.serve_args import ServeArgs
from shoal.errors import CheckpointError, DataError, ResourceError, ShoalError
from shoal.on_ray.calls import OtherModelError
from shoal.on_ray.known_adapters import KnownAdapters

if TYPE_CHECKING:
    from shoal.engine.front import AsyncEngine
    from shoal.vllm_plugin.serving import VllmEngine  # `ServeArgs` has no adapters with it

log = logging.getLogger("ray.serve")


class ReplicaAdapters:
    """Of the replica `name`; without a name the process is none."""

    def __init__(self, args: ServeArgs, name: str) -> None:
        self._args, self._name = args, name
        self._loading = asyncio.Lock()
        self._at = 0  # as of when it was told which there are (`State.at`)

    async def load_known(self, engine: AsyncEngine | VllmEngine) -> None:
        """Loads those that the service has, by what it started with and by what requests changed since."""
        known = (await asyncio.to_thread(KnownAdapters(self._args).get)).known if self._name else {}
        for adapter in known.values():
            await self._load_one(cast("AsyncEngine", engine), adapter.identity, adapter.directory)

    async def load(self, engine: AsyncEngine | VllmEngine, directory: str) -> str:
        """The identity of the adapter in `directory`, once it is loaded. Raises what reading it does."""
        async with self._loading:
            return await cast("AsyncEngine", engine).load_adapter(directory)

    async def keep(self, engine: AsyncEngine | VllmEngine, known: dict[str, str], held: list[str], at: int) -> None:
        """Drops all but those `known`, identity -> directory, and those `held`, and loads those `known` that are missing: a
        gateway may have had one dropped that another was about to make known. What is older than what was told before (`at`)
        is not heard, since gateways' messages overtake each other."""
        async with self._loading:
            if at < self._at:
                return
            self._at, own = at, cast("AsyncEngine", engine)
            await own.keep_adapters(known, dict.fromkeys(held, ""))
            for identity, directory in known.items():
                await self._load_one(own, identity, directory)

    async def need(self, engine: AsyncEngine | VllmEngine, identity: str, directory: str) -> None:
        """Loads an adapter that an `engine` lacks, which started after it was loaded. Raises OtherModelError where it is not
        there any more, or cannot be read: a replica that has it may go on."""
        if not identity or not directory:
            return  # the engine itself refuses what it does not know
        async with self._loading:
            own = cast("AsyncEngine", engine)
            if own.knows_adapter(identity):
                return
            try:
                await own.load_adapter(directory, identity)
            except (CheckpointError, DataError, ResourceError) as error:
                log.error("an adapter is not loaded: %s", error.message)
                changed = "the adapter is not what it was when it was loaded"
                what = changed if isinstance(error, CheckpointError) else "the adapter cannot be read now"
                refused = OtherModelError(what, do="load it anew")
                refused.replica = self._name
                raise refused from None

    async def _load_one(self, engine: AsyncEngine, identity: str, directory: str) -> None:
        """Where that fails, it was there once: the others are served all the same."""
        try:
            if not engine.knows_adapter(identity):
                await engine.load_adapter(directory, identity)
        except ShoalError as error:
            log.error("an adapter is not loaded: %s", error.message)
