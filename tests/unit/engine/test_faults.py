"""What goes wrong, and what then happens: one test a fault. After each the pool is as it was before, and the next request is
served.

| fault | outcome |
|---|---|
| a request that is wrong, too long, or can never fit | RequestError naming the field, at submission |
| logits that are not finite | that request ends with "error", its batch mates go on |
| a forward that raises, once | the requests of that step end with "error", all others go on |
| a forward that always raises, or broken books | every request ends with EngineDeadError, and so does every later call |
| a stuck step | the same, told by the watchdog while the step still hangs |
| ten times the load | QueueFullError, with a time to come back; what was accepted is served |
| readers that leave, all at once, or whose event loop is gone | their requests are cancelled |
| a reader that stops reading | its request waits, and gives its units to who needs them |
| a pool that holds one request | one after the other, each with its own tokens |
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.config import GROUPS
from shoal.engine.events import Event, Finished, Token
from shoal.engine.front import AsyncEngine
from shoal.engine.plan import Outcome, Plan
from shoal.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.inputs.tokenizer import PATCH_ID
from tests.unit.engine.lively import lively

MODEL = lively()
SECONDS = 120.0  # for anything here; far above what it takes


def ask(prompt: list[int] | None = None, tokens: int = 6, **more: Any) -> Request:
    return Request(prompt or [50, 51, 52], Sampling(temperature=0, max_tokens=tokens, ignore_eos=True), **more)


def naive(prompt: list[int], tokens: int, depth: str = "full") -> list[int]:
    return known(tuple(prompt), tokens, depth)


@cache
def known(prompt: tuple[int, ...], tokens: int, depth: str) -> list[int]:
    return MODEL.generate_naive(prompt, tokens, depth=depth, ignore_eos=True)


def healthy(engine: Engine) -> None:
    """The pool is back at its baseline, and the next request gets its answer."""
    assert engine.idle
    engine.scheduler.check_integrity()
    assert engine.stats()["kv_cache_usage_perc"] == 0
    (answer,) = engine.generate([ask([70, 71], 4)])
    assert answer.tokens == naive([70, 71], 4)
    assert engine.stats()["kv_cache_usage_perc"] == 0


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(MODEL, units=200)
    yield engine
    healthy(engine)


def image(rows: int, cols: int, values: int | None = None, kind: type = np.uint8) -> Patches:
    size = MODEL.config.patch_values if values is None else values
    return Patches(np.zeros((rows * cols, size), kind), rows, cols)


def encoded(*images: Patches, ids: list[int] | None = None) -> Encoded:
    return Encoded(ids or [token for picture in images for token in picture.tokens()], list(images))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (lambda: Request([50] * 380, Sampling(max_tokens=9)), "max_tokens"),
        (lambda: Request([50] * 400, Sampling(max_tokens=1)), "prompt"),
        (lambda: Request([]), "prompt"),
        (lambda: Request(""), "prompt"),
        (lambda: Request([-1]), "prompt"),
        (lambda: Request([300]), "prompt"),
        (lambda: Request([50], Sampling(stop_token_ids=[300])), "stop_token_ids"),
        (lambda: Request([50], Sampling(banned=[[50, 300]])), "banned"),
        (lambda: Request([50], Sampling(logit_bias={300: 1.0})), "logit_bias"),
        (lambda: Request([50], depth="abyss"), "depth"),
        (lambda: Request([50], answer=[PATCH_ID]), "answer"),  # a picture's patch, without the picture
        (lambda: Request(Encoded([50.5])), "prompt"),  # type: ignore[list-item]
        (lambda: Request([50], depth=3), "depth"),
        (lambda: Request([50], depth="shallow", quality_tolerance=0.1), "quality_tolerance"),
        (lambda: Request(encoded(image(5, 4))), "images"),  # more rows than an image of this model has
        (lambda: Request(encoded(image(2, 2, values=7))), "images"),
        (lambda: Request(encoded(image(2, 2, kind=np.float32))), "images"),
        (lambda: Request(encoded(image(2, 2), ids=image(2, 1).tokens())), "prompt"),
        (lambda: Request(encoded(image(1, 3), ids=image(3, 1).tokens())), "prompt"),  # as many, elsewhere
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_its_field(engine: Engine, wrong: Any, param: str) -> None:
    """What this model cannot serve; what no model can is of `test_events`."""
    with pytest.raises(RequestError) as caught:
        engine.submit(wrong())
    assert caught.value.param == param and caught.value.status == 400
    assert isinstance(caught.value, ContextLengthError) == ("together" in str(caught.value))


def test_what_was_checked_cannot_change_under_the_engine(engine: Engine) -> None:
    bias, stops, ids = {60: 1.0}, ["x"], [70]
    sampling = Sampling(logit_bias=bias, stop=stops, stop_token_ids=ids)
    bias[60], stops[0], ids[0] = 10**400, "", 10**400
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == ({60: 1.0}, ("x",), (70,))


@pytest.mark.parametrize(
    "most",
    [{"seed": 10**5000}, {"seed": -(10**400)}, {"priority": 10**400}, {"deadline": 1e308}, {"temperature": 5e-324}],
)
def test_the_largest_numbers_that_are_taken_harm_nobody(engine: Engine, most: dict[str, Any]) -> None:
    sampling = {name: most[name] for name in most.keys() & {"seed", "temperature"}}
    large = Request(
        [50], Sampling(max_tokens=4, **sampling), **{name: most[name] for name in most.keys() - sampling.keys()}
    )
    done = engine.generate([ask(), large])
    assert [answer.finish_reason in ("stop", "length") for answer in done] == [True, True]
    assert done[0].tokens == naive([50, 51, 52], 6)


def test_two_requests_of_one_id_are_refused_before_either_runs(engine: Engine) -> None:
    """With a small queue the second came when the first had ended, and took its place among the answers."""
    small = Engine(MODEL, units=200, max_batch=1, max_queue=1)
    one = ask(id="one")
    with pytest.raises(RequestError, match="the same id"):
        small.generate([one, ask(), ask(), one])
    assert small.idle


def test_a_request_that_can_never_fit_is_refused_and_the_largest_that_fits_is_served() -> None:
    pages = 3
    engine, page = Engine(MODEL, units=1 + GROUPS * pages), MODEL.config.page
    with pytest.raises(RequestError, match="never fit"):
        engine.submit(ask([50] * (pages * page), 2))
    (answer,) = engine.generate([ask([50] * (pages * page), 1)])
    assert answer.finish_reason == "length"
    healthy(engine)


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    net = copy.deepcopy(MODEL.net)
    net.groups[GROUPS - 1].blocks[0].mlp.down.weight.fill_(torch.nan)  # type: ignore[union-attr,index]
    engine = Engine(Model(MODEL.config, net, MODEL.tokenizer), units=200)
    answers = engine.generate([ask(depth=depth) for depth in ("full", "shallow", "middle", "full")])
    assert [answer.finish_reason for answer in answers] == ["error", "length", "length", "error"]
    for answer, depth in zip(answers[1:3], ("shallow", "middle"), strict=True):
        assert answer.tokens == naive([50, 51, 52], 6, depth)
    assert answers[0].finished is not None and "not finite" in str(answers[0].finished.error)
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    (good,) = engine.generate([ask(depth="middle")])
    assert good.finish_reason == "length"


@pytest.mark.parametrize("written", [False, True])
def test_a_forward_that_raises_once_ends_its_step_s_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """Also when it raises after its K/V were written, over pages that are cached."""
    prompt = list(range(50, 90))
    engine.generate([ask(prompt)])
    engine.scheduler.max_batch = 2
    asked = [engine.submit(ask([*prompt, 60 + i], 8)) for i in range(4)]
    run, failures = engine.runner.run, iter([True])

    def once(plan: Plan) -> Outcome:
        failing = next(failures, False)
        outcome = run(plan) if written or not failing else None
        if failing:
            raise FloatingPointError("a kernel failed")
        assert outcome is not None
        return outcome

    monkeypatch.setattr(engine.runner, "run", once)
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    ends = {event.request: event for event in events if isinstance(event, Finished)}
    assert [ends[request].reason for request in asked] == ["error", "error", "length", "length"]
    assert all(ends[request].error.status == 500 for request in asked[:2])  # type: ignore[union-attr]
    for i in (2, 3):
        said = [event.token for event in events if isinstance(event, Token) and event.request == asked[i]]
        assert said == naive([*prompt, 60 + i], 8)


@pytest.mark.parametrize("broken", ["run", "commit"])
def test_an_engine_that_cannot_go_on_tells_everybody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """A forward that always raises, and a scheduler whose books cannot be trusted. What is told, and logged, is where: what the
    error says may quote the prompt of another request."""
    engine = Engine(MODEL, units=200, max_batch=2)

    def fail(*_: object) -> None:
        words = ["my", "secret"]
        raise FloatingPointError(" ".join(words))

    monkeypatch.setattr(engine.runner if broken == "run" else engine.scheduler, broken, fail)
    asked = [engine.submit(ask()) for _ in range(9)]
    events: list[Event] = []
    while not engine.idle:
        events += engine.step()
    ends = [event for event in events if isinstance(event, Finished)]
    assert sorted(end.request for end in ends) == sorted(asked)
    assert all(end.reason == "error" for end in ends) and isinstance(ends[-1].error, EngineDeadError)
    assert engine.dead is not None and engine.stats()["kv_cache_usage_perc"] == 0
    engine.scheduler.check_integrity()
    with pytest.raises(EngineDeadError, match="FloatingPointError"):
        engine.submit(ask())
    assert "in fail\n" in caplog.text and "FloatingPointError" in caplog.text
    assert not any("my secret" in text for text in (caplog.text, *(str(end.error) for end in ends)))


def test_broken_books_end_every_request_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, units=200, max_batch=2)
    asked = [engine.submit(ask()) for _ in range(5)]
    engine.step()
    monkeypatch.setattr(engine.scheduler.pages, "release", lambda units: 1 / 0)
    monkeypatch.setattr(engine.scheduler, "commit", lambda plan, outcome: 1 / 0)
    ends = [event for event in engine.step() if isinstance(event, Finished)]
    assert sorted(end.request for end in ends) == sorted(asked) and engine.idle
    assert all(isinstance(end.error, EngineDeadError) for end in ends)


def test_a_pool_of_the_smallest_size_serves_one_after_the_other() -> None:
    prompts = [list(range(50 + i, 60 + i)) for i in range(4)]
    pages = -(-(10 + 14 - 1) // MODEL.config.page)
    engine = Engine(MODEL, units=1 + GROUPS * pages)
    answers = engine.generate([ask(prompt, 14, depth=("full", "shallow")[i % 2]) for i, prompt in enumerate(prompts)])
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert answer.tokens == naive(prompt, 14, ("full", "shallow")[i % 2])
    healthy(engine)


# --- behind asyncio -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def front(engine: Engine, **options: Any) -> AsyncIterator[AsyncEngine]:
    """Afterwards the pool must be back at its baseline, unless the engine is dead."""
    served = AsyncEngine(engine, **options)
    try:
        yield served
        if engine.dead is None and served._dead is None:
            while (stats := await served.stats())["num_requests_running"] + stats["num_requests_waiting"]:
                await asyncio.sleep(0.01)
            assert stats["kv_cache_usage_perc"] == 0
            assert [e.token for e in await read(served, ask([70, 71], 4)) if isinstance(e, Token)] == naive([70, 71], 4)
    finally:
        await served.close()
    engine.scheduler.check_integrity()


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, SECONDS))


async def read(engine: AsyncEngine, request: Request) -> list[Event]:
    return [event async for event in engine.generate(request)]


def test_ten_times_the_load_is_refused_and_what_was_accepted_is_served() -> None:
    async def work() -> None:
        engine = Engine(MODEL, units=400, max_batch=4, max_queue=4)
        async with front(engine) as served:
            results = await asyncio.gather(
                *[read(served, ask([50 + i % 9, 60], 12)) for i in range(80)], return_exceptions=True
            )
            refused = [result for result in results if isinstance(result, BaseException)]
            assert all(isinstance(error, QueueFullError) and error.status == 429 for error in refused)
            assert 8 <= len(results) - len(refused) < 80
            for i, result in enumerate(results):
                if not isinstance(result, BaseException):
                    tokens = [event.token for event in result if isinstance(event, Token)]
                    assert tokens == naive([50 + i % 9, 60], 12)
            assert (await served.stats())["requests_refused_total"] == len(refused)

    run(work())


def test_a_hundred_readers_that_leave_at_once_leave_nothing() -> None:
    async def work() -> None:
        engine = Engine(MODEL, units=800, max_batch=16, max_queue=200)
        async with front(engine) as served:
            readers = [asyncio.create_task(read(served, ask([50 + i % 9], 300))) for i in range(100)]
            while (await served.stats())["generation_tokens_total"] < 20:
                await asyncio.sleep(0.01)
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            while (stats := await served.stats())["requests_cancelled_total"] < 100:
                await asyncio.sleep(0.01)
            assert stats["num_requests_running"] == stats["num_requests_waiting"] == 0

    run(work())


def test_a_reader_that_stops_reading_gives_its_units_to_who_needs_them() -> None:
    async def work() -> None:
        page = MODEL.config.page
        engine = Engine(MODEL, units=1 + GROUPS * (40 // page), max_batch=2)  # for one request of 40 tokens
        async with front(engine, backlog=4) as served, aclosing(served.generate(ask(tokens=36, id="slow"))) as slow:
            got = [await anext(slow)]
            for _ in range(2):
                others = await read(served, ask([60, 61], 38))
                assert [e.token for e in others if isinstance(e, Token)] == naive([60, 61], 38)
            assert (await served.stats())["num_preemptions_total"] > 0
            got += [event async for event in slow]
            assert [e.token for e in got if isinstance(e, Token)] == naive([50, 51, 52], 36)

    run(work())


def test_a_stuck_step_is_told_to_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        engine, go_on = Engine(MODEL, units=400, max_batch=2), threading.Event()

        def stuck(plan: Plan) -> Outcome:
            go_on.wait(SECONDS)
            raise FloatingPointError

        async with front(engine, stall_seconds=0.4) as served:
            monkeypatch.setattr(engine.runner, "run", stuck)
            readers = [asyncio.create_task(read(served, ask())) for _ in range(5)]
            while engine.scheduler.idle:
                await asyncio.sleep(0.01)
            calls = [asyncio.create_task(call) for call in (served.stats(), served.cancel("x"))]
            for events in await asyncio.gather(*readers):
                (end,) = events
                assert isinstance(end, Finished) and isinstance(end.error, EngineDeadError)
                assert end.error.status == 503 and "stuck" in str(end.error)
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
            with pytest.raises(EngineDeadError, match="stuck"):
                await served.check_health()
            with pytest.raises(EngineDeadError, match="stuck"):
                await read(served, ask())
            go_on.set()

    run(work())


def test_a_reader_whose_event_loop_is_gone_is_cancelled() -> None:
    async def work() -> None:
        engine = Engine(MODEL, units=400)
        async with front(engine) as served:
            other = asyncio.new_event_loop()
            events = served.generate(ask(tokens=300, id="gone"))

            def begin_and_leave() -> None:
                other.run_until_complete(anext(events))
                other.close()

            await asyncio.to_thread(begin_and_leave)
            while (await served.stats())["requests_cancelled_total"] < 1:
                await asyncio.sleep(0.01)
            with contextlib.suppress(BaseException):  # the generator belongs to a loop that is no more
                await events.aclose()

    run(work())
