"""`AsyncEngine`: an engine in a thread of its own, behind asyncio.

    event loop(s)                         engine thread                     watchdog thread
    generate() ── inbox: submit ────────> step, step, step ...              is a step older than `stall_seconds`?
       ^             cancel, resume        │                                then the engine is dead, for everybody
       └──────── reader <── one call per loop and step ──┘

Only the engine thread steps, changes or looks into the engine. What others use of it, `Engine.prepare` and `Engine.info`,
reads nothing that ever changes, and may run in any thread. A reader that falls `backlog` events behind pauses its own request
and nobody else's. Whoever waits is woken: by events, by the end of its request, or by the death of the engine.
"""

# long: what crosses from thread to thread is read in one place, in both directions
from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.config import FULL
from shoal.engine.events import LATER, Event, Finished, Request, Token
from shoal.engine.metrics import Samples
from shoal.engine.turns import Turns
from shoal.errors import CheckpointError, EngineDeadError, QueueFullError, RequestError, again, frames, of_request

if TYPE_CHECKING:
    from shoal.engine.engine import Engine
    from shoal.engine.running import Running
    from shoal.model.adapters import Adapter
    from shoal.model.model import Model

log = logging.getLogger(__name__)

LATER_SHARE = 0.1  # of the time that embeddings which may wait take, while answers that may not are written
IDLE_SECONDS = 0.05  # how often deadlines are looked at while no request can run


class _Asked:
    """Something to be done in the engine thread, and its answer."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        """`ask` gives the answer, or a generator that returns it and yields between the pieces of its work."""
        self._ask = ask
        self._pieces: Generator[None, None, Any] | None = None
        self.answer: Future[Any] = Future()

    def __call__(self) -> bool:
        """Do it, or the next piece of it. Returns whether nothing is left to do; nothing is for a caller that has left."""
        if self.answer.cancelled():
            return True
        try:
            found = self._ask() if self._pieces is None else self._pieces
            if isinstance(found, Generator):
                self._pieces = found
                next(found)
                return False
        except StopIteration as last:
            found = last.value
        except Exception as error:
            self.fail(error)
            return True
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(found)
        return True

    def fail(self, error: Exception) -> None:
        """Tell whoever waits that it was not done, because of `error`."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class _Pooling(Turns[_Asked]):
    """Embeddings that wait. The one that has begun goes on to its end before the next: each holds keys and values."""

    begun: _Asked | None = None

    def __len__(self) -> int:
        return super().__len__() + (self.begun is not None)

    def take(self) -> _Asked:
        begun, self.begun = self.begun, None
        return super().take() if begun is None else begun


class _Reader:
    """Events on their way to one `generate` call: the engine thread puts, the event loop takes. Only a reader that waits has to
    be woken: one that pauses between two lists looks by itself afterwards."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.sent = self.taken = 0
        self.paused = False
        self._coming: deque[Event | RequestError] = deque()
        self._waits = False
        self._some, self._last = asyncio.Event(), asyncio.Event()

    def put(self, item: Event | RequestError) -> bool:
        """Add `item`, in the engine thread. Returns whether `wake` must be called in the event loop."""
        self._coming.append(item)
        return self._waits or not isinstance(item, Token)

    def wake(self, ends: bool) -> None:
        """Called in the event loop when something has come; `ends`: with the last of it."""
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


def _there(give: Callable[[], _Asked | None]) -> _Asked | None:
    """The first that `give` gives whose caller is still there: one that has left has no place to give."""
    asked = give()
    while asked is not None and asked.answer.cancelled():
        asked = give()
    return asked


def _embedded(
    model: Model, prompt: list[int], depth: str | int, adapter: Adapter | None, rows: int
) -> Generator[None, None, list[float]]:
    """The vector of `prompt`, at most `rows` tokens at a time."""
    if len(prompt) <= rows:
        vector = model.embed(prompt, depth, adapter)
    else:
        vector = yield from model.embed_in_pieces(rows, prompt, depth, adapter)
    found: list[float] = vector.tolist()
    return found


def settle() -> None:
    """Hide everything that is in memory now from Python's garbage collector. A process calls this when it has loaded what it
    serves: to look through all of that would take 0.1 s, in which no request gets a token."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class AsyncEngine:
    """The front of an engine for asyncio code, of one event loop or of several."""

    def __init__(
        self,
        engine: Engine,
        *,
        backlog: int = 256,
        stall_seconds: float = 120.0,
        gap: float = 0.0,
        read_adapter: Callable[[str, Model], Adapter] | None = None,
    ) -> None:
        """`backlog`: unread events after which a request waits for its reader. `stall_seconds`: a step that takes longer
        means that the engine is stuck, and dead. `gap`: of `batches`, where its caller says none; a request that could fall
        `backlog` events behind in that time would wait. `read_adapter` makes one of a directory, for `load_adapter`."""
        self._engine, self._backlog, self._stall, self._gap = engine, backlog, stall_seconds, gap
        self._read_adapter = read_adapter
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._pooling = _Pooling()  # of `embed`; a piece of one is run between two steps
        self._pooling_later = _Pooling()  # those that may wait for all others
        self._most_embeddings = 1 + engine.scheduler.max_queue  # one runs
        self._pooling_again = self._later_again = 0.0  # when the next may be run, while answers are in the engine
        self._readers: dict[str, _Reader] = {}
        self._embeddings = 0  # calls of `embed` that wait or run
        self._lock = threading.Lock()  # of `_readers`, `_pooling`, `_embeddings` and `_dead`
        self._dead: EngineDeadError | None = None
        self._closing = False
        self._stopped = threading.Event()
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="shoal-watchdog", daemon=True)
        self._thread.start()
        self._watchdog.start()

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """The request's events, its `Finished` last. Closing the iterator cancels the request. Raises at the first event:
        RequestError for a request that cannot be served, QueueFullError, EngineDeadError."""
        async with aclosing(self.batches(request)) as lists:
            async for events in lists:
                for event in events:
                    yield event

    async def batches(
        self, request: Request, gap: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """The events of `generate` in lists: each holds what was ready when the list before it had been read. The first list
        and the last one come at once; `gap` says how many seconds are to lie between two others."""
        self._check_open()
        running = await asyncio.to_thread(self._engine.prepare, request)
        reader = _Reader(asyncio.get_running_loop())
        with self._lock:  # from here on the death of the engine reaches the reader
            self._check_open()
            if request.id in self._readers:
                raise RequestError("request id is in use", param="id", got=request.id)
            self._readers[request.id] = reader
        self._inbox.put(lambda: self._submit(running, reader))
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
                    self._inbox.put(lambda: self._engine.pause(running, False))
                events = await reader.get(self._gap if gap is None else gap())
        except RequestError:
            ended = True
            raise
        finally:
            if not ended:
                with self._lock:
                    if self._readers.get(request.id) is reader:  # else it has ended, and the id may be another's by now
                        del self._readers[request.id]
                self._inbox.put(lambda: self._engine.cancel(running))

    async def cancel(self, request: str) -> bool:
        """End a request: its reader gets `Finished` with reason "cancelled". False when it is not live."""
        return bool(await self._call(lambda: self._engine.cancel(request)))

    async def stats(self) -> Samples:
        """`Engine.stats`. Raises EngineDeadError."""
        stats: Samples = await self._call(self._engine.stats)
        return stats

    async def info(self) -> list[dict[str, str]]:
        """`Engine.info`, of this one."""
        return [self._engine.info()]

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
        """`Model.embed` of each prompt, with the `adapter` of that identity, in the engine thread, between two steps one, or a
        piece of one with as many tokens as a step may have. So answers go on meanwhile; they take at most half of the time.
        Payers, and of one payer clients, take turns prompt by prompt. Those of a `priority` from `LATER` on come after all
        others, and have `LATER_SHARE` of the time beside answers that may not wait. Raises RequestError, QueueFullError when
        as many calls wait as the engine's queue may hold and no other payer, nor of this one another client, has more prompts
        there, EngineDeadError."""
        held = self._engine.find_adapter(adapter)
        later = priority >= LATER
        pooling = self._pooling_later if later else self._pooling
        with self._lock:
            self._check_open()
            if self._embeddings >= self._most_embeddings:
                error = QueueFullError("too many embeddings wait", got=self._embeddings, do="try again")
                last = None if later else _there(self._pooling_later.give_last)
                last = last or _there(partial(pooling.give_place, payer, client))
                if last is None:
                    raise error
                last.fail(error)
            self._embeddings += 1
        model = self._engine.model
        rows = self._engine.scheduler.max_batch_tokens
        asked = [_Asked(partial(_embedded, model, prompt, depth, held, rows)) for prompt in prompts]
        try:
            with self._lock:
                for each in asked:
                    pooling.put(each, payer, client)
            self._inbox.put(lambda: None)  # wakes the engine thread
            return await self._answers(asked)
        finally:
            with self._lock:
                self._embeddings -= 1

    async def load_adapter(self, directory: str, identity: str = "") -> str:
        """Load the adapter in a directory, and return its identity. Raises what `read_adapter` does, EngineDeadError, and
        CheckpointError for another than that of `identity`, where one is given."""
        if self._read_adapter is None:
            raise RequestError("this engine takes no adapters", do="give it read_adapter")
        self._check_open()
        adapter = await asyncio.to_thread(self._read_adapter, directory, self._engine.model)
        if identity not in ("", adapter.identity):
            raise CheckpointError(f"{directory} is not what was loaded from there before", do="load it anew")
        loaded: str = await self._call(lambda: self._engine.load_adapter(adapter))
        return loaded

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int = 0) -> None:
        """Drop all adapters but those `known` and those `held` (identity -> directory). Raises EngineDeadError."""
        await self._call(lambda: self._engine.keep_adapters({*known, *held}))

    def knows_adapter(self, identity: str) -> bool:
        """Is it loaded? No adapter always is."""
        return not identity or identity in self._engine.adapters

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine cannot serve any more, a stuck step included."""
        self._check_open()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait until the live ones have ended. False when `timeout` seconds were not enough."""
        self._closing = True
        until = time.monotonic() + timeout
        while not (done := not self._readers and not self._embeddings) and time.monotonic() < until:
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
            error = again(self._dead)
        elif self._closing:
            error = EngineDeadError("the engine is shutting down", do="send the request to another replica")
        else:
            return
        error.taken = False
        raise error

    async def _call(self, ask: Callable[[], Any]) -> Any:
        """The result of `ask` in the engine thread. Raises as `_answers`."""
        asked = _Asked(ask)
        self._inbox.put(asked)
        return (await self._answers([asked]))[0]

    async def _answers(self, asked: Sequence[_Asked]) -> list[Any]:
        """What `asked` gives, which the engine thread has or will have. Raises the first error, and that of a stuck or dead
        engine, which would keep its caller. A caller that leaves takes back what has not been done."""
        waiting = [asyncio.wrap_future(each.answer) for each in asked]
        try:
            left = {*waiting}
            while left:
                if self._dead is not None or not self._thread.is_alive():
                    raise again(self._dead or EngineDeadError("the engine was closed"))
                done, left = await asyncio.wait(left, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
                for each in done:
                    each.result()
            return [each.result() for each in waiting]
        finally:
            for each in waiting:
                if not each.cancel() and not each.cancelled():
                    each.exception()  # it is seen

    # --- in the engine thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._commands(wait=None if self._engine.idle and not self._embedding else 0)
                if self._stopped.is_set():
                    continue
                self._step_began = time.monotonic()
                if self._may_pool(self._step_began):
                    self._pool()
                    self._step_began = time.monotonic()
                events = self._engine.step()  # of an idle engine: the ends of requests that a command cancelled
                self._step_began = None
                if (dead := self._engine.dead) is not None:
                    with self._lock:
                        self._dead = self._dead or dead  # before anybody hears of it by an event
                self._deliver(events)
                if dead is not None:
                    self._die(dead)
                    return
                if not self._engine.ran and not events and not self._embedding:
                    self._commands(wait=IDLE_SECONDS)  # all are paused: wait for a reader or a deadline
            for request in list(self._readers):
                self._engine.cancel(request)
            self._deliver(self._engine.step())
            self._die(EngineDeadError("the engine was closed"))
        except BaseException as error:
            # a panic of a library in Rust is no Exception; whoever waits is to hear of it, too
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

    @property
    def _embedding(self) -> bool:
        """Does an embedding wait?"""
        return bool(self._pooling or self._pooling_later)

    def _may_pool(self, now: float) -> bool:
        """Does an embedding wait, and leave answers their part of the time?"""
        return self._embedding and (
            not self._engine.ran or now >= (self._pooling_again if self._pooling else self._later_again)
        )

    def _pool(self) -> None:
        """Run the next embedding that somebody still waits for, or its next piece. Answers then have as long for themselves;
        what may wait gives most of the time to answers that may not."""
        began = time.monotonic()
        asked: _Asked | None = None
        pooling = self._pooling
        with self._lock:
            while self._embedding and (asked is None or asked.answer.cancelled()):
                pooling = self._pooling or self._pooling_later
                asked = pooling.take()
        if asked is not None and not asked():
            with self._lock:
                pooling.begun = asked
        ended = time.monotonic()
        share = LATER_SHARE if self._engine.urgent else 0.5
        self._pooling_again = ended + (ended - began)
        self._later_again = ended + (ended - began) * (1 - share) / share

    def _submit(self, running: Running, reader: _Reader) -> None:
        try:
            self._engine.submit(running)
        except Exception as raised:
            if not isinstance(raised, RequestError):  # `submit` changes nothing before it raises: the others go on
                log.error("a request was not taken\n%s", frames(raised))
            error = of_request(raised, "the request was not taken")
            with self._lock:
                there = self._readers.get(running.id) is reader
                if there:
                    del self._readers[running.id]
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
            gone = {item.request for _, item in items if isinstance(item, Token)}
            self._inbox.put(lambda: [self._engine.cancel(request) for request in gone])  # wakes an idle engine

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
            self._hand(reader.loop, [(reader, Finished(request, "error", error=again(error)))])
