"""What the HTTP routes need of an engine: `EngineClient`, and `gather`, which runs the requests of one call through it.

Notable: closing an iterator is how a request is cancelled, so every iterator here is closed on every way out: the end, an
error, a client that left, a server that stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from shoal.config import FULL
from shoal.engine.events import Event, Finished, Request
from shoal.engine.metrics import Samples
from shoal.errors import DeadlineError, EngineDeadError

T = TypeVar("T")
Events = AsyncGenerator[tuple[int, list[Event]], None]  # (choice, what was ready of it), of `gather`

UNREAD = 32  # lists of several requests that wait for their one reader; then the requests wait, as a single one does
GRACE_SECONDS = 5.0  # how much later than the engine's own deadline this side gives up waiting


class EngineClient(Protocol):
    """`AsyncEngine` itself, or `on_ray.clients.ReplicaClient` over the handle of a Ray Serve deployment."""

    def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        """Events of one request in lists of what was ready, its `Finished` last. Closing the iterator cancels the request."""

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
        """The vector of each prompt, as `Model.embed` makes it, all by the same weights: else they could not be compared.
        `payer`, `client` and `priority` are whose turn it takes, and when, and `adapter` is its identity, as of `Request`."""

    async def load_adapter(self, directory: str) -> str:
        """Loads the adapter in `directory`, and returns its identity once each engine has it that serves now. Raises
        CheckpointError for one that cannot be used."""

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        """Drops all adapters but these, identity -> directory: those that are served, and those that requests still hold. `at`:
        microseconds since 1970 as of `known`; one of before is not heard."""

    async def stats(self) -> Samples:
        """What `Engine.stats` gives; of several engines together."""

    async def info(self) -> list[dict[str, str]]:
        """What `Engine.info` gives, of each engine that answers."""

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine cannot serve any more."""


class ClientGone(Exception):
    """The HTTP client left before its answer was complete. Nobody is there to read an answer."""


async def gather(client: EngineClient, requests: Sequence[Request]) -> Events:
    """(index of the request, its events that were ready) of all `requests`, as they come. A request that does not end well ends
    them all.

    Raises the request's own error; DeadlineError also when the engine stays silent past a request's deadline.
    """
    streams = [_watched(client, request) for request in requests]
    if len(streams) == 1:
        async with aclosing(streams[0]) as lists:
            async for events in lists:
                yield 0, events
        return
    queue: asyncio.Queue[tuple[int, list[Event] | BaseException | None]] = asyncio.Queue(UNREAD)
    tasks = [asyncio.create_task(_pump(index, lists, queue)) for index, lists in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        await _end(tasks)


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientGone raised.

    The request's body must have been read: the next ASGI message is then the disconnect. (Starlette's
    ``request.is_disconnected`` would have to be polled, and its ``StreamingResponse`` looks only when it sends.)
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end([task, gone])


async def must_be_there(receive: Receive) -> None:
    """Raises ClientGone where the client has left already, as far as two turns of the loop tell. The request's body must have
    been read."""
    gone = asyncio.create_task(_disconnect(receive))
    for _ in range(2):  # its first step, and what came on its connection behind the body
        await asyncio.sleep(0)
    left = gone.done()
    await _end([gone])
    if left:
        raise ClientGone


async def _watched(client: EngineClient, request: Request) -> AsyncGenerator[list[Event], None]:
    loop = asyncio.get_running_loop()
    limit = None if request.deadline is None else loop.time() + request.deadline + GRACE_SECONDS
    lists = client.batches(request)
    finished = False
    try:
        while True:
            # the timeout spans one step, never a yield: the steps of a generator may run in different tasks
            async with asyncio.timeout_at(limit):
                events = await anext(lists, None)
            if events is None:
                break
            end = events[-1]
            finished = isinstance(end, Finished)
            if isinstance(end, Finished) and (error := _fault(end, request)):
                if events[:-1]:
                    yield events[:-1]
                raise error
            yield events
    except TimeoutError:
        raise DeadlineError("the engine did not answer in time", do="try again") from None
    finally:
        if isinstance(lists, AsyncGenerator):
            await lists.aclose()
    if not finished:
        raise EngineDeadError("the engine ended the request without finishing it", do="try again")


def _fault(end: Finished, request: Request) -> Exception | None:
    """Why `request` did not end well, if it did not."""
    if end.reason in ("stop", "length"):
        return None
    if end.reason == "deadline":
        got = None if request.deadline is None else f"{request.deadline:g} s"
        return DeadlineError("the request ran out of its time", got=got, do="ask for fewer tokens or try again")
    return end.error or EngineDeadError(f"the request was {end.reason} by the server", do="try again")


async def _pump(
    index: int,
    lists: AsyncGenerator[list[Event], None],
    queue: asyncio.Queue[tuple[int, list[Event] | BaseException | None]],
) -> None:
    try:
        async with aclosing(lists):
            async for events in lists:
                await queue.put((index, events))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels `tasks` and waits until each has closed what it held; their results and errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # marks it as seen
