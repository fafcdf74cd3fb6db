"""`AsyncEngine`: readers, cancellation and death. Whatever happens, everybody who waits is woken."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import LATER, Event, Finished, Token
from shoal.engine.front import IDLE_SECONDS, AsyncEngine, _Asked, _Reader, _there, settle
from shoal.errors import CheckpointError, EngineDeadError, GenerationError, QueueFullError, RequestError
from shoal.model.adapters import Adapter, nothing
from tests.clocks import tells

SECONDS = 120.0  # for anything here; far above what it takes, the kernels' first compilation included


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("test", seed=3)


@asynccontextmanager
async def front(model: Model, max_queue: int = 1024, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(Engine(model, max_batch=4, max_queue=max_queue), **options)
    try:
        yield engine
    finally:
        await engine.close()


def run(work: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, SECONDS))  # type: ignore[arg-type]


def ask(tokens: int, name: str = "r", **more: Any) -> Request:
    return Request([50, 51], Sampling(temperature=0, max_tokens=tokens, ignore_eos=True), id=name, **more)


async def read(engine: AsyncEngine, request: Request) -> list[Event]:
    return [event async for event in engine.generate(request)]


async def until(true: Callable[[dict[str, float]], bool], engine: AsyncEngine) -> dict[str, float]:
    while not true(stats := await engine.stats()):
        await asyncio.sleep(0.01)
    return stats


def test_many_requests_at_once_each_get_their_own_events(model: Model) -> None:
    async def work() -> list[list[Event]]:
        async with front(model) as engine:
            return await asyncio.gather(*[read(engine, ask(3 + i, str(i))) for i in range(9)])

    whole = model.generate_naive([50, 51], 12, ignore_eos=True)
    for i, events in enumerate(run(work())):
        assert {event.request for event in events} == {str(i)}
        assert [event.token for event in events if isinstance(event, Token)] == whole[: 3 + i]
        assert [type(event) for event in events].count(Finished) == 1 and isinstance(events[-1], Finished)


def test_a_refusal_is_raised_at_the_first_event_and_nothing_stays(model: Model) -> None:
    async def work() -> None:
        async with front(model) as engine:
            with pytest.raises(RequestError, match="depth"):
                await read(engine, ask(3, depth="abyss"))
            assert len(await read(engine, ask(3))) == 4
            assert (await engine.stats())["num_requests_running"] == 0

    run(work())


def test_leaving_early_cancels(model: Model) -> None:
    async def work() -> None:
        async with front(model) as engine:
            async with aclosing(engine.generate(ask(300))) as events:
                await anext(events)
            assert not engine._readers, "another may have its id at once"
            stats = await until(lambda s: s["requests_cancelled_total"] == 1, engine)
            assert stats["kv_cache_usage_perc"] == 0

    run(work())


def test_cancel_from_outside_ends_the_reader_with_finished(model: Model) -> None:
    async def work() -> None:
        async with front(model) as engine:
            reader = asyncio.create_task(read(engine, ask(300)))
            await until(lambda s: s["num_requests_running"] == 1, engine)
            assert await engine.cancel("r")
            events = await reader
            assert isinstance(events[-1], Finished) and events[-1].reason == "cancelled"
            assert not await engine.cancel("r")

    run(work())


@pytest.mark.drill
def test_a_slow_reader_waits_alone(model: Model) -> None:
    async def work() -> None:
        async with front(model, backlog=8) as engine, aclosing(engine.generate(ask(200, "slow"))) as slow:
            got: list[Event] = [await anext(slow)]
            for i in range(3):  # others go on while nobody reads the first
                assert len(await read(engine, ask(40, str(i)))) == 41
            assert (await engine.stats())["generation_tokens_total"] < 200 + 3 * 40
            got += [event async for event in slow]
            tokens = [event.token for event in got if isinstance(event, Token)]
            assert tokens == model.generate_naive([50, 51], 200, ignore_eos=True)

    run(work())


def test_the_death_of_the_engine_reaches_everybody(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with front(model) as engine:
            readers = [asyncio.create_task(read(engine, ask(300, str(i)))) for i in range(3)]
            await until(lambda s: s["num_requests_running"] == 3, engine)
            monkeypatch.setattr(engine._engine.scheduler, "plan", lambda: 1 / 0)
            for events in await asyncio.gather(*readers):
                assert isinstance(events[-1], Finished)
                assert isinstance(events[-1].error, EngineDeadError)
            for call in (engine.check_health(), engine.stats(), read(engine, ask(1))):
                with pytest.raises(EngineDeadError):
                    await call
            await asyncio.to_thread(engine._thread.join, SECONDS)
            assert not engine._thread.is_alive(), "nobody steps it any more"

    run(work())


def test_each_caller_of_a_dead_engine_gets_an_error_of_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object for all would gather the frames of every call, and what stands in them, for as long as clients try again."""

    async def work() -> None:
        async with front(model) as engine:
            readers = [asyncio.create_task(read(engine, ask(300, str(i)))) for i in range(3)]
            await until(lambda s: s["num_requests_running"] == 3, engine)
            monkeypatch.setattr(engine._engine.scheduler, "plan", lambda: 1 / 0)
            errors = [events[-1].error for events in await asyncio.gather(*readers) if isinstance(events[-1], Finished)]
            for _ in range(40):
                with pytest.raises(EngineDeadError) as caught:
                    await read(engine, ask(1))
                errors.append(caught.value)
            assert len({id(error) for error in errors}) == 43 and len({str(error) for error in errors}) == 1
            assert len(list(traceback.walk_tb(errors[-1].__traceback__))) < 12  # type: ignore[union-attr]

    run(work())


def test_draining_refuses_the_new_and_lets_the_old_end(model: Model) -> None:
    async def work() -> None:
        async with front(model) as engine:
            reader = asyncio.create_task(read(engine, ask(100)))
            await until(lambda s: s["num_requests_running"] == 1, engine)
            drained = asyncio.create_task(engine.drain(SECONDS))
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="shutting down"):
                await read(engine, ask(1, "late"))
            with pytest.raises(EngineDeadError, match="shutting down"):  # whatever it asks for
                await read(engine, ask(1, "late", depth="abyss"))
            assert await drained
            assert len(await reader) == 101

    run(work())


def test_the_engine_thread_s_end_is_told_without_what_the_error_says(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> NoReturn:
        words = ["my", "secret"]
        raise KeyError(" ".join(words))

    async def work() -> None:
        async with front(model) as engine:
            monkeypatch.setattr(engine._engine, "step", fail)
            (end,) = await read(engine, ask(3))
            assert isinstance(end, Finished) and isinstance(end.error, EngineDeadError)
            assert "KeyError" in end.error.message and "secret" not in end.error.message

    run(work())
    assert "in fail\n" in caplog.text and "my secret" not in caplog.text


class Panic(BaseException):
    """As a library in Rust raises it."""


def test_a_panic_that_is_no_exception_is_told_to_who_waits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise Panic

    async def work() -> None:
        async with front(model) as engine:
            monkeypatch.setattr(engine._engine, "step", fail)
            (end,) = await read(engine, ask(3))
            assert isinstance(end, Finished) and isinstance(end.error, EngineDeadError)

    run(work())


def test_a_request_that_cannot_be_taken_harms_no_other(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged where the fault is ours, and not where the request is refused."""
    caplog.set_level("ERROR", logger="shoal.engine.front")

    def refuse(running: Any) -> NoReturn:
        raise RequestError("no room")

    async def work() -> None:
        async with front(model) as engine:
            other = asyncio.create_task(read(engine, ask(40, "other")))
            await until(lambda s: s["num_requests_running"] == 1, engine)
            submit = engine._engine.submit
            monkeypatch.setattr(engine._engine, "submit", refuse)
            with pytest.raises(RequestError, match="no room"):
                await read(engine, ask(3, "refused"))
            assert "a request was not taken" not in caplog.text
            monkeypatch.setattr(engine._engine, "submit", lambda running: 1 / 0)
            with pytest.raises(GenerationError, match="ZeroDivisionError"):
                await read(engine, ask(3, "bad"))
            monkeypatch.setattr(engine._engine, "submit", submit)
            assert len(await other) == 41 and len(await read(engine, ask(3, "bad"))) == 4
            assert "a request was not taken" in caplog.text and "ZeroDivisionError" in caplog.text

    run(work())


def test_who_leaves_late_takes_nothing_from_a_later_request_of_that_id(model: Model) -> None:
    """The first has ended, and its reader does not know it yet, when another takes its id."""

    async def work() -> None:
        async with front(model) as engine:
            first = engine.generate(ask(3))
            await anext(first)
            await until(lambda s: s["num_requests_running"] == 0, engine)
            second = engine.generate(ask(200))
            got = [await anext(second)]
            await first.aclose()
            got += [event async for event in second]
            assert isinstance(got[-1], Finished) and got[-1].reason == "length" and len(got) == 201

    run(work())


def test_embeddings_are_bounded_from_their_call_on_and_draining_waits_for_them(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine thread hears of them only between two steps."""
    hold = threading.Event()

    async def work() -> None:
        async with front(model, max_queue=3) as engine:
            step = engine._engine.step
            monkeypatch.setattr(engine._engine, "step", lambda: (hold.wait(SECONDS), step())[1])
            calls = [asyncio.create_task(engine.embed([[50, 51]])) for _ in range(9)]
            await asyncio.sleep(0)
            drained = asyncio.create_task(engine.drain(SECONDS))
            await asyncio.sleep(0.05)
            assert not drained.done()
            hold.set()
            assert await drained
            done = await asyncio.gather(*calls, return_exceptions=True)
            refused = [answer for answer in done if isinstance(answer, BaseException)]
            assert len(refused) == 5 and all(isinstance(error, QueueFullError) for error in refused)

    run(work())


def test_who_has_all_places_for_embeddings_gives_one_to_another_client_and_none_is_taken_from_who_has_left(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one payer, as without keys. Those that left hold no place, so to take theirs would free none."""
    hold = threading.Event()

    async def work() -> None:
        async with front(model, max_queue=3) as engine:
            step = engine._engine.step
            monkeypatch.setattr(engine._engine, "step", lambda: (hold.wait(SECONDS), step())[1])
            await asyncio.sleep(0.05)
            gone = [asyncio.create_task(engine.embed([[50, 51]] * 9, client="gone")) for _ in range(3)]
            await asyncio.sleep(0.05)
            for call in gone:
                call.cancel()
            await asyncio.wait(gone)
            many = [asyncio.create_task(engine.embed([[50, 51]], client="many")) for _ in range(4)]
            await asyncio.sleep(0.05)
            other = asyncio.create_task(engine.embed([[50, 52]], client="other"))
            await asyncio.sleep(0.05)
            assert engine._embeddings <= 4
            hold.set()
            assert len(await other) == 1
            done = await asyncio.gather(*many, return_exceptions=True)
            assert [type(answer) for answer in done] == [list, list, list, QueueFullError]

    run(work())


def test_embeddings_that_may_wait_come_after_all_others_and_give_them_their_places(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, order = threading.Event(), list[int]()
    monkeypatch.setattr("shoal.engine.front._embedded", lambda _, prompt, *__: order.append(prompt[0]) or [0.0])

    async def work() -> None:
        async with front(model, max_queue=3) as engine:
            step = engine._engine.step
            monkeypatch.setattr(engine._engine, "step", lambda: (hold.wait(SECONDS), step())[1])
            later = [asyncio.create_task(engine.embed([[50]] * 3, payer="l", priority=LATER)) for _ in range(3)]
            await asyncio.sleep(0)
            live = []
            for i in range(3):
                live.append(asyncio.create_task(engine.embed([[60]] * 2, payer=str(i))))
                await asyncio.sleep(0.01)  # what has given its place leaves
            hold.set()
            assert [len(vectors) for vectors in await asyncio.gather(*live)] == [2, 2, 2], "none is refused"
            done = await asyncio.gather(*later, return_exceptions=True)
            assert sorted(type(answer).__name__ for answer in done) == ["QueueFullError", "QueueFullError", "list"]
        assert order[:7].count(60) == 6, "the first of all may have been run before they came"

    run(work())


@pytest.mark.parametrize("urgent", [True, False])
def test_embeddings_that_may_wait_have_a_tenth_of_the_time_beside_answers_that_may_not(
    urgent: bool, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that may not are not kept by it."""
    engine = AsyncEngine(Engine(model))
    run(engine.close())  # and what its thread did is called here
    now = iter([10.0, 12.0] * 2)
    tells(monkeypatch, "shoal.engine.front", monotonic=lambda: next(now))
    monkeypatch.setattr(Engine, "urgent", urgent)
    engine._engine.ran = True
    engine._pooling_later.put(_Asked(lambda: [0.0]), "", "")
    engine._pooling_later.put(_Asked(lambda: [0.0]), "", "")
    engine._pool()
    free = 12.0 + (18.0 if urgent else 2.0)
    assert [engine._may_pool(at) for at in (free - 0.01, free + 0.01)] == [False, True]
    engine._pooling.put(_Asked(lambda: [0.0]), "", "")
    assert [engine._may_pool(at) for at in (13.99, 14.01)] == [False, True]


def test_closing_ends_what_is_live(model: Model) -> None:
    async def work() -> None:
        async with front(model) as engine:
            reader = asyncio.create_task(read(engine, ask(300)))
            await until(lambda s: s["num_requests_running"] == 1, engine)
            await engine.close()
            events = await reader
            assert isinstance(events[-1], Finished) and events[-1].reason in ("cancelled", "error")

    run(work())


@pytest.mark.parametrize("said_by", ["caller", "engine"])
def test_lists_hold_every_event_in_order_and_wait_only_between_tokens(model: Model, said_by: str) -> None:
    """A gap longer than the test: but for the second list, which the last event cuts short, nothing would ever come."""

    async def work() -> None:
        theirs = {"gap": 10 * SECONDS} if said_by == "engine" else {}
        mine = (lambda: 10 * SECONDS) if said_by == "caller" else None
        async with front(model, **theirs) as engine, aclosing(engine.batches(ask(30), mine)) as lists:
            first, second = [events async for events in lists]
        tokens = [event.token for event in [*first, *second] if isinstance(event, Token)]
        assert tokens == model.generate_naive([50, 51], 30, ignore_eos=True)
        assert isinstance(second[-1], Finished)

    run(work())


def test_a_gap_hides_no_refusal_and_no_death(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with front(model) as engine:
            with pytest.raises(RequestError, match="depth"):
                await anext(engine.batches(ask(3, depth="abyss"), lambda: 10 * SECONDS))
            lists = engine.batches(ask(300), lambda: 10 * SECONDS)
            await anext(lists)
            monkeypatch.setattr(engine._engine.scheduler, "plan", lambda: 1 / 0)
            (*_, end) = await anext(lists)
            assert isinstance(end, Finished) and isinstance(end.error, EngineDeadError)

    run(work())


def test_an_adapter_is_read_from_its_directory_and_is_the_one_that_was_there_before(model: Model) -> None:
    async def work() -> None:
        found = {name: Adapter(name, nothing(model.net).pairs) for name in "ab"}

        def reads(directory: str, of: Model) -> Adapter:
            assert of is model
            return found[directory]

        async with front(model) as plain:
            with pytest.raises(RequestError, match="takes no adapters"):
                await plain.load_adapter("a")
        async with front(model, read_adapter=reads) as engine:
            assert engine.knows_adapter("") and not engine.knows_adapter("a")
            assert [await engine.load_adapter(*given) for given in (("a",), ("b", "b"))] == ["a", "b"]
            with pytest.raises(CheckpointError, match="not what was loaded"):
                await engine.load_adapter("a", "b")
            assert engine.knows_adapter("a") and engine.knows_adapter("b")
            await engine.keep_adapters({"b": "there"}, {})
            assert not engine.knows_adapter("a") and engine.knows_adapter("b")
            await engine.load_adapter("a")
            await engine.keep_adapters({}, {"a": "here"})
            assert engine.knows_adapter("a") and not engine.knows_adapter("b")

    run(work())


# --- what the engine thread does, by hand: none runs -----------------------------------------------------------------------


class Knot:
    """What only the garbage collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.drill
def test_what_is_loaded_is_hidden_from_the_garbage_collector_and_garbage_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.engine.front.gc", gc)  # and not as tests are run (tests/at_import.py)
    gc.disable()  # by itself it would look for garbage as well
    try:
        kept = Knot()
        left, hidden = weakref.ref(Knot()), weakref.ref(kept)
        settle()
        assert left() is None and gc.get_freeze_count()
        del kept
        gc.collect()
        assert hidden() is not None, "nobody looks through what was loaded"
        settle()
        assert hidden() is None, "but who loads anew"
    finally:
        gc.enable()


def test_a_gap_lies_between_two_lists_unless_the_last_event_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = list[float]()
    monkeypatch.setattr(asyncio, "timeout", lambda gap: gaps.append(gap) or contextlib.nullcontext())

    async def work() -> None:
        reader, token, end = _Reader(asyncio.get_running_loop()), Token("r", 60, "a"), Finished("r", "stop")
        reader.put(token)
        assert await reader.get(0.0) == [token] and gaps == []
        reader.put(token)
        later = asyncio.create_task(reader.get(0.25))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not later.done() and gaps == [0.25], "a token is there, and waits for more"
        assert reader.put(end)
        reader.wake(ends=True)
        assert await later == [token, end]

    asyncio.run(work())


def test_commands_are_done_at_once_or_waited_for_as_long_as_is_said() -> None:
    engine, done = still(), list[int]()
    engine._commands(wait=0)
    for number in (1, 2):
        engine._inbox.put(partial(done.append, number))
    engine._commands(wait=0)
    assert done == [1, 2]
    for number, wait in ((3, None), (4, SECONDS)):
        threading.Timer(0.05, engine._inbox.put, [partial(done.append, number)]).start()
        engine._commands(wait=wait)
        assert done[-1] == number


@pytest.mark.parametrize(
    ("idle", "embeds", "ran", "events", "waits"),
    [
        (True, False, False, 0, [None, IDLE_SECONDS, None]),
        (True, True, False, 0, [0, 0, 0]),
        (False, False, True, 0, [0, 0, 0]),
        (False, False, False, 1, [0, 0, 0]),
        (False, False, False, 0, [0, IDLE_SECONDS, 0]),
        (False, True, False, 0, [0, 0, 0]),
    ],
)
def test_the_engine_s_thread_waits_only_where_there_is_nothing_to_do(
    idle: bool, embeds: bool, ran: bool, events: int, waits: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without end where no request is live, and for a moment where all are paused. Who is told to stop steps once more, for the
    ends of what is cancelled."""
    waited, steps = list[float | None](), list[int]()
    engine = still(idle=idle, dead=None, step=lambda: steps.append(1) or [Token("gone", 60, "a")] * events)
    engine._engine.ran = ran
    monkeypatch.setattr(AsyncEngine, "_embedding", embeds)
    monkeypatch.setattr(engine, "_may_pool", lambda now: False)

    def commands(wait: float | None) -> None:
        waited.append(wait)
        if len(waited) == len(waits):
            engine._stopped.set()

    monkeypatch.setattr(engine, "_commands", commands)
    engine._run()
    assert waited == waits and len(steps) == waits.count(waits[0])


class Loop:
    """An event loop that keeps what it is to call."""

    def __init__(self, closed: bool = False) -> None:
        self.closed, self.calls = closed, list[Callable[[], None]]()

    def is_closed(self) -> bool:
        return self.closed

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.calls.append(call)


def still(**engine: Any) -> AsyncEngine:
    """Without its threads, before an engine of which nothing else is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: None)
        there: Any = SimpleNamespace(scheduler=SimpleNamespace(max_queue=3), ran=True, urgent=False, **engine)
        return AsyncEngine(there, backlog=4)


def reading(engine: AsyncEngine, name: str, loop: Any) -> _Reader:
    engine._readers[name] = _Reader(loop)
    return engine._readers[name]


def test_a_reader_that_falls_behind_is_paused_once_and_each_loop_is_called_once_for_all_that_wait() -> None:
    paused, one, two = list[str](), Loop(), Loop()
    engine = still(pause=paused.append)
    slow, quick, other = reading(engine, "slow", one), reading(engine, "quick", one), reading(engine, "other", two)
    token = Token("slow", 60, "a")
    engine._deliver([token] * 4)
    assert (paused, slow.paused, slow.sent, one.calls) == ([], False, 4, []), "nobody waits, and four may be unread"
    slow.taken = 1
    engine._deliver([token])
    assert paused == [], "one was read meanwhile"
    engine._deliver([token])
    assert (paused, slow.paused) == (["slow"], True)
    engine._deliver([token])
    assert paused == ["slow"] and slow.sent == 7 and len(slow._coming) == 7
    slow._waits = quick._waits = True
    ends = Finished("other", "stop")
    engine._deliver([token, Token("quick", 61, "b"), Token("gone", 62, ""), Token("quick", 63, ""), ends])
    assert {*engine._readers} == {"slow", "quick"} and (quick.sent, other.sent) == (2, 1)
    assert (len(one.calls), len(two.calls)) == (1, 1)
    for call in (*one.calls, *two.calls):
        call()
    woken = [(each._some.is_set(), each._last.is_set()) for each in (slow, quick, other)]
    assert woken == [(True, False), (True, False), (True, True)], "the last event cuts a pause short"


def test_requests_of_a_loop_that_was_closed_are_ended() -> None:
    """Nobody reads them any more; one that has ended is none."""
    cancelled, closed = list[str](), Loop(closed=True)
    engine = still(cancel=cancelled.append, pause=lambda request: None)
    for name in ("a", "b"):
        reading(engine, name, closed)
    engine._deliver([Token("a", 60, "x"), Token("a", 61, "y"), Finished("b", "stop")])
    engine._inbox.get_nowait()()
    assert cancelled == ["a"] and engine._inbox.empty()
    engine._deliver([Token("a", 62, "z")])  # which nobody waits for
    engine._inbox.get_nowait()()
    assert cancelled == ["a", "a"]


def test_of_embeddings_those_whose_callers_left_are_passed_over_and_those_that_may_wait_come_last() -> None:
    engine, ran = still(), list[str]()
    engine._pool()
    assert ran == [] and not engine._may_pool(1e9), "nobody waits"
    for name, pooling, left in (
        ("later", engine._pooling_later, False), ("left", engine._pooling, True), ("first", engine._pooling, False),
        ("second", engine._pooling, False),
    ):  # fmt: skip
        pooling.put(asked := _Asked(lambda name=name: ran.append(name)), "", "")  # type: ignore[misc]
        assert not left or asked.answer.cancel()
    for wanted in (["first"], ["first", "second"], ["first", "second", "later"]):
        engine._engine.ran = False
        assert engine._may_pool(-1e9), "whoever runs does not"
        engine._pool()
        assert ran == wanted
    engine._pooling.put(asked := _Asked(lambda: ran.append("gone")), "", "")
    asked.answer.cancel()
    engine._pool()
    assert len(ran) == 3 and not engine._embedding


def test_a_place_is_given_by_the_first_whose_caller_is_there_and_who_left_hears_nothing() -> None:
    left, there = _Asked(lambda: 1), _Asked(lambda: 2)
    left.answer.cancel()
    for given, found in (([left, left, there], there), ([left, None], None), ([None], None), ([there, left], there)):
        assert _there(iter(given).__next__) is found
    ran = list[int]()
    late = _Asked(lambda: ran.append(1))
    late.answer.cancel()
    late()
    left.fail(ValueError("no place"))
    assert ran == [] and late.answer.cancelled() and left.answer.cancelled()
    there.fail(error := ValueError("no place"))
    assert there.answer.exception(0) is error
    wrong = _Asked(lambda: 1 / 0)
    wrong()
    assert isinstance(wrong.answer.exception(0), ZeroDivisionError)
