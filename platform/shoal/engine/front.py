"""`AsyncEngine`: an engine in a thread of its own, behind asyncio.

    event loop(s)                         engine thread                     watchdog thread
    generate() ── inbox: submit ────────> step, step, step ...              is a step older than `stall_seconds`?
       ^             cancel, resume        │                                then the engine is dead, for everybody
       └──────── reader <── one call per loop and step ──┘

Only the engine thread touches the engine. A reader that falls `backlog` events behind pauses its own request and nobody
else's. Whoever waits is woken: by events, by the end of its request, or by the death of the engine.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from shoal.engine.events import Event, Finished, Request, Token
from shoal.errors import EngineDeadError, QueueFullError, RequestError, frames

if TYPE_CHECKING:
    from shoal.engine.engine import Engine
    from shoal.engine.sequence import Sequence

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.05  # how often deadlines are looked at while no request can run


class _Reader:
    """Events on their way to one `generate` call: the engine thread puts, the event loop takes. Only a reader that waits has to
    be woken: one that takes its time finds at its end what has come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sent = self.taken = 0
        self.paused = False
        self._coming: deque[Event | RequestError] = deque()
        self._waits = False
        self._some, self._last = asyncio.Event(), asyncio.Event()

    def put(self, item: Event | RequestError) -> bool:
        """Add `item`, in the engine thread. Must `wake` be called in the event loop?"""
        self._coming.append(item)
        return self._waits or not isinstance(item, Token)

    def wake(self, ends: bool) -> None:
        """Look at what has come: in the event loop. `ends`: the last of it is there."""
        self._some.set()
        if ends:
            self._last.set()

    async def get(self, gap: float) -> list[Event]:
        """All events that have come, once there is one: the last one, or any when `gap` seconds are over. Raises the error
        that refused the request."""
        if gap > 0 and not self._last.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(gap):
                    await self._last.wait()
        self._waits = True  # before the look: what comes after it wakes this reader
        while not self._coming:
            self._some.clear()
            await self._some.wait()
        self._waits = False
        events: list[Event] = []
        while self._coming:
            item = self._coming.popleft()
            if isinstance(item, RequestError):
                raise item
            events.append(item)
        return events


def settle() -> None:
    """Take all that is in memory now out of the sight of Python's garbage collector, for a process that has loaded what it
    serves: to look through it takes 0.1 s, in which no request gets a token."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class AsyncEngine:
    """The front of an engine for asyncio code, of one event loop or of several."""

    def __init__(self, engine: Engine, *, backlog: int = 256, stall_seconds: float = 120.0) -> None:
        """`backlog`: unread events after which a request waits for its reader. `stall_seconds`: a step that takes longer
        means that the engine is stuck, and dead."""
        self._engine, self._backlog, self._stall = engine, backlog, stall_seconds
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._pooling: deque[Callable[[], object]] = deque()  # of `embed`; one is run between two steps
        self._readers: dict[str, _Reader] = {}
        self._lock = threading.Lock()  # of `_readers` and `_dead`
        self._dead: EngineDeadError | None = None
        self._closing = False
        self._stopped = threading.Event()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="shoal-watchdog", daemon=True)
        self._thread.start()
        self._watchdog.start()

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """The request's events, its `Finished` last. Closing the iterator cancels the request.

        Raises at the first event: RequestError for a request that cannot be served, QueueFullError, EngineDeadError.
        """
        async with aclosing(self.batches(request)) as lists:
            async for events in lists:
                for event in events:
                    yield event

    async def batches(
        self, request: Request, gap: Callable[[], float] = lambda: 0.0
    ) -> AsyncGenerator[list[Event], None]:
        """The events of `generate` in lists of what was ready when the last list had been read. The first waits for nothing,
        nor does that of the last event; `gap` says how many seconds another is to come after the one before it."""
        self._check_open()
        seq = await asyncio.to_thread(self._engine.prepare, request)
        reader = _Reader(asyncio.get_running_loop())
        with self._lock:  # from here on the death of the engine reaches the reader
            self._check_open()
            if request.id in self._readers:
                raise RequestError("request id is in use", param="id", got=request.id)
            self._readers[request.id] = reader
        self._inbox.put(lambda: self._submit(seq, reader))
        ended = False
        try:
            events = await reader.get(0.0)
            while True:
                ended = isinstance(events[-1], Finished)
                yield events
                if ended:
                    return
                reader.taken += len(events)
                if reader.paused and reader.sent - reader.taken <= self._backlog // 2:
                    reader.paused = False
                    self._inbox.put(lambda: self._engine.pause(request.id, False))
                events = await reader.get(gap())
        except RequestError:
            ended = True
            raise
        finally:
            if not ended:
                with self._lock:
                    self._readers.pop(request.id, None)
                self._inbox.put(lambda: self._engine.cancel(request.id))

    async def cancel(self, request: str) -> bool:
        """End a request: its reader gets `Finished` with reason "cancelled". False when it is not live."""
        return bool(await self._call(lambda: self._engine.cancel(request)))

    async def stats(self) -> dict[str, float]:
        """`Engine.stats`. Raises EngineDeadError."""
        stats: dict[str, float] = await self._call(self._engine.stats)
        return stats

    async def embed(self, prompt: list[int], depth: str | int | None = None) -> list[float]:
        """`Model.embed` in the engine thread, one prompt between two steps, so that answers go on meanwhile. Raises
        RequestError, QueueFullError when as many wait as the engine's queue may hold, EngineDeadError."""
        self._check_open()
        if len(self._pooling) >= self._engine.scheduler.max_queue:
            raise QueueFullError("too many embeddings wait", got=len(self._pooling), do="try again")
        vector: list[float] = await self._call(
            lambda: self._engine.model.embed(prompt, depth).tolist(),
            lambda run: self._inbox.put(lambda: self._pooling.append(run)),
        )
        return vector

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine cannot serve any more, a stuck step included."""
        self._check_open()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until the live ones have ended. False when `timeout` seconds were not enough."""
        self._closing = True
        until = time.monotonic() + timeout
        while not (done := not self._readers and self._engine.idle) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return done

    async def close(self, timeout: float = 10.0) -> None:
        """Cancel what is live, and stop the threads. Safe to call twice."""
        self._closing = True
        self._stopped.set()
        self._inbox.put(lambda: None)  # wakes the engine thread
        await asyncio.to_thread(self._thread.join, timeout)

    # --- in the event loops -------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._closing:
            raise EngineDeadError("the engine is shutting down", do="send the request to another replica")

    async def _call(self, ask: Callable[[], Any], put: Callable[[Callable[[], object]], None] | None = None) -> Any:
        """The result of `ask` in the engine thread, which gets it by `put` (None: with the next commands). A stuck or dead
        engine raises instead of keeping its caller; a caller that leaves takes `ask` back."""
        answer: Future[Any] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(ask())
            except Exception as error:
                answer.set_exception(error)

        (put or self._inbox.put)(run)
        waiting = asyncio.wrap_future(answer)
        try:
            while not waiting.done():
                if self._dead is not None or not self._thread.is_alive():
                    raise self._dead or EngineDeadError("the engine was closed")
                await asyncio.wait({waiting}, timeout=0.1)
            return waiting.result()
        finally:
            waiting.cancel()

    # --- in the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._commands(wait=None if self._engine.idle and not self._pooling else 0)
                if self._stopped.is_set():
                    continue
                self._step_began = time.monotonic()
                if self._pooling:
                    self._pooling.popleft()()
                events = self._engine.step()  # of an idle engine: the ends of requests that a command cancelled
                self._step_began = None
                if (dead := self._engine.dead) is not None:
                    with self._lock:
                        self._dead = self._dead or dead  # before anybody hears of it by an event
                self._deliver(events)
                if dead is not None:
                    self._die(dead)
                    return
                if not self._engine.ran and not events and not self._pooling:
                    self._commands(wait=IDLE_SECONDS)  # all are paused: wait for a reader or a deadline
            for request in list(self._readers):
                self._engine.cancel(request)
            self._deliver(self._engine.step())
            self._die(EngineDeadError("the engine was closed"))
        except Exception as error:
            log.error("the engine thread ended\n%s", frames(error))
            self._die(EngineDeadError("the engine thread ended", got=type(error).__name__))

    def _commands(self, wait: float | None) -> None:
        """Do what came in; first wait for something, for at most `wait` seconds (None: without end)."""
        try:
            self._inbox.get(block=wait != 0, timeout=wait)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def _submit(self, seq: Sequence, reader: _Reader) -> None:
        try:
            self._engine.submit(seq)
        except RequestError as error:
            with self._lock:
                there = self._readers.get(seq.id) is reader
                if there:
                    del self._readers[seq.id]
            if there:  # else its caller left, or was told of the engine's death
                self._hand(reader.loop, [(reader, error)])

    def _deliver(self, events: list[Event]) -> None:
        """Hand the events of a step to their readers, one call for each event loop."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Event | RequestError]]] = defaultdict(list)
        with self._lock:
            for event in events:
                reader = self._readers.get(event.request)
                if reader is None:
                    continue  # its caller left, or was told of the engine's death
                if isinstance(event, Finished):
                    del self._readers[event.request]
                reader.sent += 1
                if reader.sent - reader.taken > self._backlog and not reader.paused:
                    reader.paused = True
                    self._engine.pause(event.request)
                batches[reader.loop].append((reader, event))
        for loop, items in batches.items():
            self._hand(loop, items)

    def _hand(self, loop: asyncio.AbstractEventLoop, items: list[tuple[_Reader, Event | RequestError]]) -> None:
        """Give `items` to readers of `loop`, and wake at once those that wait: one call for all."""
        waiting = [(reader, not isinstance(item, Token)) for reader, item in items if reader.put(item)]

        def wake() -> None:
            for reader, ends in waiting:
                reader.wake(ends)

        try:
            if waiting or loop.is_closed():  # then the call raises
                loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the loop was closed, so nobody reads: these requests go too
            for _, item in items:
                if isinstance(item, Token):
                    self._engine.cancel(item.request)

    # --- death --------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._stall / 4)):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._stall:
                self._die(
                    EngineDeadError("the engine is stuck", got=f"a step of over {self._stall:g} s", do="restart it")
                )
                return

    def _die(self, error: EngineDeadError) -> None:
        """Tell everybody. Every live request ends with `Finished`, whatever the engine thread still does."""
        with self._lock:
            if self._dead is None:
                self._dead = error
            readers, self._readers = self._readers, {}
        self._stopped.set()
        for request, reader in readers.items():
            self._hand(reader.loop, [(reader, Finished(request, "error", error=error))])
