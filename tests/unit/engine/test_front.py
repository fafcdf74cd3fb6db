"""`AsyncEngine`: readers, cancellation and death. Whatever happens, everybody who waits is woken."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn

import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import LATER, Event, Finished, Token
from shoal.engine.front import AsyncEngine
from shoal.errors import CheckpointError, EngineDeadError, GenerationError, QueueFullError, RequestError
from shoal.model.adapters import Adapter, nothing

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
