"""A stream outlives the replicas that give it. Real engines stand for the replicas; what is made up is how they are lost."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import Engine, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Completion, Event, Finished, Token
from shoal.engine.front import AsyncEngine
from shoal.errors import DeadlineError, EngineDeadError, GenerationError, QueueFullError
from shoal.on_ray import failover
from shoal.on_ray.failover import LOSSES, unbroken
from tests.unit.engine.test_oracle import MODEL, REQUESTS, near

LONG = Request("abc", Sampling(temperature=1, seed=1, max_tokens=24, ignore_eos=True), depth="middle")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "PAUSES", (0.0,))


class Replica:
    """An engine; it is lost after as many events as `cuts` says for each stream in turn, and then lives on for the next."""

    def __init__(
        self, cuts: Iterator[int], how: Callable[[], Event | Exception] = lambda: EngineDeadError("lost")
    ) -> None:
        self.engine = AsyncEngine(Engine(MODEL, units=400))
        self._cuts, self._how = cuts, how
        self.got: list[Request] = []
        self.open = 0

    async def stream(self, request: Request) -> AsyncGenerator[list[Event], None]:
        self.got.append(request)
        left, self.open = next(self._cuts, 1 << 30), self.open + 1
        try:
            async for event in self.engine.generate(request):
                if left == 0:
                    end = self._how()
                    if isinstance(end, Exception):
                        raise end
                    yield [end]
                    return
                left -= 1
                yield [event]
        finally:
            self.open -= 1


async def read(lists: AsyncGenerator[list[Event], None]) -> tuple[list[Token], Finished]:
    *tokens, end = [event async for events in lists for event in events]
    assert isinstance(end, Finished)
    return [token for token in tokens if isinstance(token, Token)], end


def run(replica: Replica, request: Request) -> tuple[list[Token], Finished]:
    async def work() -> tuple[list[Token], Finished]:
        try:
            return await read(unbroken(replica.stream, request))
        finally:
            await replica.engine.close()

    return asyncio.run(work())


def same(tokens: list[Token], end: Finished, wanted: Completion) -> None:
    assert [token.token for token in tokens] == wanted.tokens
    assert "".join(token.text for token in tokens) + end.text == wanted.text
    assert (end.reason, end.completion_tokens) == (wanted.finish_reason, len(wanted.tokens))
    near([token.logprob for token in tokens if token.logprob], wanted.logprobs)
    assert wanted.finished is not None
    near(end.prompt_logprobs, wanted.finished.prompt_logprobs)


@settings(max_examples=15)
@given(REQUESTS, st.lists(st.integers(0, 9), max_size=LOSSES - 1))
def test_any_losses_give_the_undisturbed_stream(request: Request, cuts: list[int]) -> None:
    replica = Replica(iter(cuts))
    tokens, end = run(replica, request)
    same(tokens, end, naive.generate(MODEL, request))
    assert {event.request for event in [*tokens, end]} == {request.id}
    assert len({sent.id for sent in replica.got}) == len(replica.got)
    assert replica.open == 0


@pytest.mark.parametrize(
    "how",
    [
        lambda: Finished("x", "error", error=EngineDeadError("stuck")),  # the engine died
        lambda: Finished("x", "cancelled", text="half"),  # the replica was stopped
    ],
)
def test_an_end_that_only_a_lost_replica_gives_is_none(how: Callable[[], Event]) -> None:
    tokens, end = run(Replica(iter([5]), how), LONG)
    same(tokens, end, naive.generate(MODEL, LONG))


def test_a_request_without_a_seed_gets_one_that_it_keeps() -> None:
    replica = Replica(iter([4]))
    tokens, _ = run(replica, dataclasses.replace(LONG, sampling=dataclasses.replace(LONG.sampling, seed=None)))
    first, second = (sent.sampling.seed for sent in replica.got)
    assert first is not None and first == second
    assert len(tokens) == 24
    assert replica.got[1].answer == tuple(token.token for token in tokens[:4])


def test_who_is_cancelled_while_its_replica_is_lost_resumes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves: Serve may end the replica's call before the gateway's own."""
    monkeypatch.setattr(failover, "PAUSES", (60.0,))
    lost, resumed = asyncio.Event(), list[None]()

    async def dying(request: Request) -> AsyncGenerator[list[Event], None]:
        yield [Token(request.id, 65, "a", depth=2)]
        lost.set()
        raise EngineDeadError("lost")

    async def work() -> None:
        task = asyncio.create_task(read(unbroken(dying, LONG, on_resume=lambda: resumed.append(None))))
        await lost.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert resumed == []


def test_a_request_that_kills_what_it_touches_is_given_up() -> None:
    replica = Replica(iter([2, 3, 1, 5]))
    with pytest.raises(EngineDeadError, match="lost"):
        run(replica, LONG)
    assert len(replica.got) == LOSSES


def test_an_error_of_the_request_itself_is_no_loss() -> None:
    replica = Replica(iter([3]), lambda: Finished("x", "error", error=GenerationError("not finite")))
    _, end = run(replica, LONG)
    assert isinstance(end.error, GenerationError)
    assert len(replica.got) == 1


def test_a_dead_engine_refuses_as_often_as_it_takes_and_a_full_queue_is_waited_for() -> None:
    """Before it has begun a request is refused for a full queue; after that it is waited for."""
    replica = Replica(iter([6]))
    refusals = [Finished("x", "error", error=EngineDeadError("dead"))] * (LOSSES + 2)
    answers: list[Finished | Exception] = [*refusals, QueueFullError("full")]

    async def sometimes(request: Request) -> AsyncGenerator[list[Event], None]:
        if len(replica.got) == 1 and answers:
            if isinstance(answer := answers.pop(0), Exception):
                raise answer
            yield [answer]
            return
        async for ready in replica.stream(request):
            yield ready

    async def full(request: Request) -> AsyncGenerator[list[Event], None]:
        raise QueueFullError("full")
        yield []

    async def work() -> tuple[list[Token], Finished]:
        try:
            with pytest.raises(QueueFullError):
                await read(unbroken(full, LONG))
            return await read(unbroken(sometimes, LONG))
        finally:
            await replica.engine.close()

    same(*asyncio.run(work()), naive.generate(MODEL, LONG))
    assert not answers


def test_a_deadline_spans_all_replicas() -> None:
    async def dead(request: Request) -> AsyncGenerator[list[Event], None]:
        yield [Finished(request.id, "error", error=EngineDeadError("dead"))]

    with pytest.raises(DeadlineError):
        asyncio.run(read(unbroken(dead, dataclasses.replace(LONG, deadline=0.05))))


def test_times_are_those_of_the_whole_request() -> None:
    async def slow(request: Request) -> AsyncGenerator[list[Event], None]:
        if not request.answer:
            yield [Token(request.id, 65, "a", depth=2)]
            await asyncio.sleep(0.2)
            raise EngineDeadError("lost")
        yield [Finished(request.id, "length", first_token_seconds=0.01, total_seconds=0.02)]

    _, end = asyncio.run(read(unbroken(slow, LONG)))
    assert end.first_token_seconds < 0.2 < end.total_seconds


def test_who_leaves_closes_the_stream_of_the_present_replica() -> None:
    async def work() -> int:
        replica = Replica(iter([3]))
        events = unbroken(replica.stream, LONG)
        for _ in range(6):
            await anext(events)
        assert replica.open == 1
        await events.aclose()
        await replica.engine.close()
        return replica.open

    assert asyncio.run(work()) == 0
