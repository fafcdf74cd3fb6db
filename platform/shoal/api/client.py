"""What the HTTP routes need of an engine: `EngineClient`, and `gather`, which runs the requests of one call through it.

Notable: closing an iterator is how a request is cancelled, so every iterator here is closed on every way out: the end, an
error, a client that left, a server that stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.types import Receive

from shoal.engine.events import Event, Finished, Request
from shoal.errors import DeadlineError, EngineDeadError

T = TypeVar("T")

UNREAD = 32  # events of several requests that wait for their one reader; then the requests wait, as a single one does
GRACE_SECONDS = 5.0  # how much later than the engine's own deadline this side gives up waiting


class EngineClient(Protocol):
    """`AsyncEngine` itself, or a Ray Serve handle wrapped by `on_ray.serve`."""

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """Events of one request, its `Finished` last. Closing the iterator cancels the request."""

    async def embed(self, prompt: list[int], depth: str | int | None = None) -> list[float]:
        """The vector of one prompt, as `Model.embed` makes it."""

    async def stats(self) -> dict[str, float]:
        """What `Engine.stats` gives: values by sample name, as Prometheus writes it."""

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine cannot serve any more."""


class ClientGone(Exception):
    """The HTTP client left before its answer was complete. Nobody is there to read an answer."""


async def gather(client: EngineClient, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Event], None]:
    """(index of the request, event) of all `requests`, as they come. A request that does not end well ends them all.

    Raises the request's own error; DeadlineError also when the engine stays silent past a request's deadline.
    """
    streams = [_watched(client, request) for request in requests]
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(UNREAD)
    tasks = [asyncio.create_task(_pump(index, events, queue)) for index, events in enumerate(streams)]
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


async def together(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`chunks`, in one piece what is ready at once: events come in lists, and each send costs every process on the way to the
    client as much as a long one. What `chunks` raises comes after all that it gave."""
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(UNREAD)

    async def fill() -> None:
        end: BaseException | None = None
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    await queue.put(chunk)
        except Exception as error:
            end = error
        await queue.put(end)

    task = asyncio.create_task(fill())
    try:
        while True:
            ready = [await queue.get()]
            while not queue.empty():
                ready.append(queue.get_nowait())
            if data := b"".join(item for item in ready if isinstance(item, bytes)):
                yield data
            if isinstance(ready[-1], BaseException):
                raise ready[-1]
            if ready[-1] is None:
                return
    finally:
        await _end([task])


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


async def _watched(client: EngineClient, request: Request) -> AsyncGenerator[Event, None]:
    loop = asyncio.get_running_loop()
    limit = None if request.deadline is None else loop.time() + request.deadline + GRACE_SECONDS
    events = client.generate(request)
    finished = False
    try:
        while True:
            # the timeout spans one step, never a yield: the steps of a generator may run in different tasks
            async with asyncio.timeout_at(limit):
                event = await anext(events, None)
            if event is None:
                break
            finished = isinstance(event, Finished)
            yield _good(event, request)
    except TimeoutError:
        raise DeadlineError("the engine did not answer in time", do="try again") from None
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
    if not finished:
        raise EngineDeadError("the engine ended the request without finishing it", do="try again")


def _good(event: Event, request: Request) -> Event:
    """`event` of `request`, or its error raised."""
    if isinstance(event, Finished) and event.reason not in ("stop", "length"):
        if event.reason == "deadline":
            got = None if request.deadline is None else f"{request.deadline:g} s"
            raise DeadlineError("the request ran out of its time", got=got, do="ask for fewer tokens or try again")
        if event.error is not None:
            raise event.error
        raise EngineDeadError(f"the request was {event.reason} by the server", do="try again")
    return event


async def _pump(
    index: int, events: AsyncGenerator[Event, None], queue: asyncio.Queue[tuple[int, Event | BaseException | None]]
) -> None:
    try:
        async with aclosing(events):
            async for event in events:
                await queue.put((index, event))
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
