"""A stream outlives the replicas that give it. Real engines stand for the replicas; what is made up is how they are lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import Engine, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import LATER, Completion, Event, Finished, Token
from shoal.engine.front import AsyncEngine
from shoal.engine.plan import Outcome, Plan
from shoal.errors import DeadlineError, EngineDeadError, EnginesLostError, GenerationError, QueueFullError
from shoal.on_ray import failover
from shoal.on_ray.calls import Begun, OtherModelError, Wanted
from shoal.on_ray.failover import LOSSES, Pin, Progress, other_weights, unbroken
from shoal.on_ray.routing import eligible
from tests import oracle
from tests.unit.engine.test_oracle import MODEL, REQUESTS, near

PAUSES = failover.PAUSES  # as they are outside tests
LONG = Request("abc", Sampling(temperature=1, seed=1, max_tokens=24, ignore_eos=True), depth="middle")


@cache
def said_of_long() -> Completion:
    return naive.generate(MODEL, LONG)


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

    async def stream(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
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
    same(tokens, end, oracle.answer(MODEL, request, [token.token for token in tokens]))
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
    same(tokens, end, said_of_long())


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

    async def dying(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
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


@pytest.mark.parametrize("said", [0, 2], ids=["in its prompt", "in its answer"])
def test_a_request_that_ends_two_engines_is_sent_to_no_third(said: int) -> None:
    """Their threads end as it runs: in its prompt before it has given any event."""
    sent = list[Request]()

    async def stream(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        sent.append(request)
        engine = AsyncEngine(own := Engine(MODEL, units=400))
        run, begun = own.runner.run, False

        def fatal(plan: Plan) -> Outcome:
            if plan.works[0].running.answered >= said:
                raise SystemExit
            return run(plan)

        own.runner.run = fatal  # type: ignore[method-assign]
        try:
            async for events in engine.batches(request):  # as `EngineReplica.generate` gives them
                yield [*events] if begun else [Begun("a", "w"), *events]
                begun = True
        finally:
            await engine.close()

    with pytest.raises(EnginesLostError, match="the engine thread ended") as caught:
        asyncio.run(read(unbroken(stream, dataclasses.replace(LONG, deadline=30.0))))
    assert len(sent) == LOSSES == 2 and caught.value.status == 500
    assert sent[1].id != sent[0].id and len(sent[1].answer) == said


def test_a_request_that_another_version_s_engine_was_lost_with_is_sent_on_no_more() -> None:
    replicas = Told([[[TOKEN], [DEAD]], [[END]]])
    with pytest.raises(EnginesLostError):
        asyncio.run(read(unbroken(replicas.stream, dataclasses.replace(LONG, losses=1))))
    assert len(replicas.got) == 1


def test_what_was_never_given_to_an_engine_is_no_loss() -> None:
    """However often it is refused. Another version is told whether an engine was lost with it."""
    refused = EngineDeadError("unavailable")
    refused.taken = False
    replicas = Told([[refused]] * (LOSSES + 1) + [[[TOKEN], [DEAD]], [refused], [[END]]])  # type: ignore[arg-type]
    tokens, _ = asyncio.run(read(unbroken(replicas.stream, LONG)))
    assert len(tokens) == 1 and len(replicas.got) == LOSSES + 4
    other = Finished("x", "error", error=other_weights("a"))
    for lost, calls in ((False, [[[other]]] * 2), (True, [[[TOKEN], [DEAD]], [[other]], [[other]]])):
        with pytest.raises(OtherModelError) as caught:
            asyncio.run(read(unbroken(Told(calls).stream, LONG)))  # type: ignore[arg-type]
        assert caught.value.taken is lost


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

    async def sometimes(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        if len(replica.got) == 1 and answers:
            if isinstance(answer := answers.pop(0), Exception):
                raise answer
            yield [answer]
            return
        async for ready in replica.stream(request, wanted):
            yield ready

    async def full(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        raise QueueFullError("full")
        yield []

    async def work() -> tuple[list[Token], Finished]:
        try:
            with pytest.raises(QueueFullError):
                await read(unbroken(full, LONG))
            return await read(unbroken(sometimes, LONG))
        finally:
            await replica.engine.close()

    same(*asyncio.run(work()), said_of_long())
    assert not answers


def test_a_deadline_spans_all_replicas() -> None:
    async def dead(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        yield [Finished(request.id, "error", error=EngineDeadError("dead"))]

    with pytest.raises(DeadlineError):
        asyncio.run(read(unbroken(dead, dataclasses.replace(LONG, deadline=0.05))))


@pytest.mark.parametrize(
    ("deadline", "error", "after"),
    [(5.0, DeadlineError, 5.0), (2000.0, DeadlineError, 2000.0), (None, QueueFullError, 60.0)],
)
def test_nobody_waits_for_a_full_replica_beyond_his_time(
    monkeypatch: pytest.MonkeyPatch, deadline: float | None, error: type[Exception], after: float
) -> None:
    """One that a replica has lost is told by another to come back in a quarter of an hour."""
    now = [100.0]

    async def sleep(seconds: float) -> None:
        now[0] += max(seconds, 0.001)

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(failover, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked = list[float]()

    async def full(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        asked.append(now[0])
        if len(asked) == 1:
            yield [Token(request.id, 65, "a", depth=2)]
            raise EngineDeadError("lost")
        refused = QueueFullError("full")
        refused.retry_after = 900.0
        raise refused

    with pytest.raises(error):
        asyncio.run(read(unbroken(full, dataclasses.replace(LONG, deadline=deadline))))
    assert now[0] - 100.0 == pytest.approx(after, abs=0.01)
    assert len(asked) <= 5


def test_times_are_those_of_the_whole_request() -> None:
    had: list[float] = []

    async def slow(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        if not request.answer:
            yield [Token(request.id, 65, "a", depth=2)]
            had.append(time.perf_counter() - began)
            await asyncio.sleep(0.2)
            raise EngineDeadError("lost")
        yield [Finished(request.id, "length", first_token_seconds=1000.0, total_seconds=0.02)]

    began = time.perf_counter()
    _, end = asyncio.run(read(unbroken(slow, LONG)))
    assert end.first_token_seconds <= had[0] and end.total_seconds > 0.2


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


class Fleet:
    """Replicas by name, each of some weights, over one engine; the first that may get a call does."""

    def __init__(self, weights: dict[str, str], cuts: Iterator[int]) -> None:
        self.weights, self.one = weights, Replica(cuts)
        self.sent: list[str] = []

    async def stream(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        name = eligible(self.weights, wanted.avoid, ())[0]
        self.sent.append(name)
        if wanted.weights not in (None, self.weights[name]):
            yield [Finished(request.id, "error", error=other_weights(name))]
            return
        first = True
        async for events in self.one.stream(request, wanted):
            yield [Begun(name, self.weights[name]), *events] if first else events
            first = False


def serve_by(fleet: Fleet, pin: Pin, before: Callable[[list[Token]], None] = lambda _: None) -> list[Token] | Exception:
    """The tokens of `LONG`, or why it ended. `before` each event it may change the fleet."""

    async def work() -> list[Token] | Exception:
        tokens = list[Token]()
        try:
            async for events in unbroken(fleet.stream, LONG, pin=pin):
                tokens += [event for event in events if isinstance(event, Token)]
                before(tokens)
        except EngineDeadError as error:
            return error
        finally:
            await fleet.one.engine.close()
        return tokens

    return asyncio.run(work())


def test_a_stream_goes_on_only_with_the_weights_that_it_began_with() -> None:
    fleet = Fleet({"a": "old", "b": "new", "c": "old"}, iter([3]))

    def replace_the_first(tokens: list[Token]) -> None:
        fleet.weights["a"] = "new"

    tokens = serve_by(fleet, Pin(), replace_the_first)
    assert isinstance(tokens, list)
    assert [token.token for token in tokens] == said_of_long().tokens
    assert fleet.sent == ["a", "a", "b", "c"]


def test_a_stream_whose_weights_are_gone_says_so_and_one_that_has_not_begun_takes_others() -> None:
    for told, wanted in ((3, "served no more"), (0, None)):
        fleet = Fleet({"a": "old", "b": "old"}, iter([told]))

        def roll(tokens: list[Token], fleet: Fleet = fleet) -> None:
            fleet.weights = dict.fromkeys(fleet.weights, "new")

        found = serve_by(fleet, Pin(), roll)
        if wanted is None:
            assert isinstance(found, list)
        else:
            assert isinstance(found, OtherModelError)
            assert wanted in str(found)


def test_choices_of_one_answer_have_the_same_weights() -> None:
    """The second begins where the first could not; and ends where none is left, though it said nothing itself."""
    pin = Pin()
    assert isinstance(serve_by(Fleet({"a": "old"}, iter([])), pin), list)
    fleet = Fleet({"b": "new", "a": "old"}, iter([]))
    assert isinstance(serve_by(fleet, pin), list)
    assert fleet.sent == ["b", "a"]
    assert isinstance(serve_by(Fleet({"b": "new"}, iter([])), pin), OtherModelError)


def test_two_choices_that_begin_at_once_with_different_weights_end_with_one() -> None:
    async def work() -> set[str]:
        pin, told = Pin(), set[str]()
        both = asyncio.Barrier(2)

        async def choice(first: str, other: str) -> None:
            async def stream(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
                name = eligible([first, other], wanted.avoid, ())[0]
                if wanted.weights not in (None, name):
                    yield [Finished(request.id, "error", error=other_weights(name))]
                    return
                if wanted.weights is None:
                    await both.wait()
                told.add(name)
                yield [Begun(name, name), Token(request.id, 65, name, depth=2)]
                yield [Finished(request.id, "length")]

            texts = [event.text async for events in unbroken(stream, LONG, pin=pin) for event in events]
            assert "".join(texts) == pin.weights

        await asyncio.gather(choice("old", "new"), choice("new", "old"))
        return told

    assert asyncio.run(work()) == {"old", "new"}  # each had begun


AUTO = dataclasses.replace(LONG, id="r", depth="auto", quality_tolerance=0.2, deadline=10.0, priority=3)


def at_100() -> Progress:
    return Progress(AUTO, Pin(), "", began=100.0, last=100.0)


def test_what_is_sent_first_is_the_request_itself() -> None:
    assert at_100().to_send(103.0) is AUTO


def test_before_its_first_token_a_request_is_sent_again_before_others_with_what_is_left_of_its_time() -> None:
    progress = at_100()
    progress.losses = 1
    assert progress.to_send(104.0) == dataclasses.replace(AUTO, id="r.1.0.0", deadline=6.0, priority=2)


def test_what_may_wait_for_all_others_still_may_where_it_goes_on() -> None:
    """Such as a shadow, which else kept its place and its units from live requests."""
    for priority, sooner in ((LATER, LATER), (LATER + 1, LATER), (LATER - 1, LATER - 2), (0, -1)):
        progress = at_100()
        progress.request, progress.losses = dataclasses.replace(AUTO, priority=priority), 1
        assert progress.to_send(104.0).priority == sooner


def test_a_request_that_was_only_refused_is_another_call_too_with_what_is_left_of_its_time() -> None:
    """No replica was lost and none was waited for: the one that has other weights may still hold the first."""
    progress = at_100()
    progress.refuse(other_weights("a"))
    assert progress.to_send(104.0) == dataclasses.replace(AUTO, id="r.0.0.1", deadline=6.0, priority=2)


def test_after_it_the_depth_is_the_one_that_the_first_replica_chose_and_the_answer_goes_on() -> None:
    progress = at_100()
    for token, now in ((65, 101.0), (66, 105.0)):
        progress.take(Token("r", token, "x", depth=2), now)
    # of the whole time, whatever came meanwhile
    for losses, now, left in ((1, 106.0, 4.0), (2, 107.5, 2.5), (2, 109.75, 0.25)):
        progress.losses = losses
        assert progress.to_send(now) == dataclasses.replace(
            AUTO, id=f"r.{losses}.0.0", deadline=left, priority=2, answer=(65, 66), depth=2, routed=True
        )
    with pytest.raises(DeadlineError):
        progress.to_send(110.0)


def test_an_answer_whose_tolerance_is_measured_takes_along_what_it_has_spent() -> None:
    progress = at_100()
    for token, spent, ran in ((65, 0.0, 4), (66, 0.35, 9)):
        progress.take(Token("r", token, "x", depth=4, spent=spent, ran=ran), 101.0)
    progress.losses = 1
    rest = progress.to_send(102.0)
    assert (rest.answer, rest.depth, rest.quality_tolerance, rest.spent, rest.ran) == ((65, 66), 4, 0.2, 0.35, 9)


def test_what_had_begun_at_another_version_keeps_its_beginning_when_its_replica_is_lost() -> None:
    begun = dataclasses.replace(AUTO, answer=(63, 64), depth=2, routed=True)
    progress = Progress(begun, Pin(), "", began=100.0, last=100.0)
    progress.take(Token("r", 65, "x", depth=2), 101.0)
    progress.losses = 1
    rest = progress.to_send(102.0)
    assert (rest.answer, rest.depth, rest.routed, rest.quality_tolerance) == ((63, 64, 65), 2, True, 0.2)


def test_patience_is_what_is_left_of_the_time_or_a_minute_from_the_last_event_and_no_less_than_none() -> None:
    ended, endless = at_100(), Progress(LONG, Pin(), "", began=100.0, last=130.0)
    assert [ended.patience(now) for now in (100.0, 104.0, 110.0, 115.0)] == [10.0, 6.0, 0.0, 0.0]
    assert [endless.patience(now) for now in (130.0, 189.5, 190.0, 200.0)] == [60.0, 0.5, 0.0, 0.0]


def test_without_a_deadline_there_is_none_left() -> None:
    progress = Progress(LONG, Pin(), "", began=100.0, last=100.0)
    progress.losses = 1
    assert progress.to_send(1e9).deadline is None


@pytest.mark.parametrize(("told_at", "first"), [([101.0, 103.0], 1.0), ([], 4.5)])
def test_times_of_an_end_are_counted_from_the_beginning(told_at: list[float], first: float) -> None:
    progress = at_100()
    for now in told_at:
        progress.take(Token("r", 65, "x", depth=2), now)
    progress.losses = 1
    sent = progress.to_send(104.0)
    end = progress.take(Finished(sent.id, "length", first_token_seconds=0.5, total_seconds=2.0), 106.0)
    assert end == Finished("r", "length", first_token_seconds=first, total_seconds=6.0)


def test_what_the_first_replica_says_is_left_as_it_is() -> None:
    progress = at_100()
    progress.to_send(101.0)
    for event in (Token("r", 65, "x", depth=2), Finished("r", "length", first_token_seconds=0.5, total_seconds=2.0)):
        assert progress.take(event, 104.0) is event


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("gap", "lost"), [(50.0, False), (60.0, False), (61.0, True)])
def test_patience_is_counted_from_the_last_event(monkeypatch: pytest.MonkeyPatch, gap: float, lost: bool) -> None:
    """An answer that has been long under way is not given up for a moment's loss."""
    clock = Clock()
    monkeypatch.setattr(failover, "time", clock)

    async def slow(request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        if request.answer:
            yield [Finished(request.id, "length")]
            return
        for _ in range(2):
            clock.now += 50
            yield [Token(request.id, 65, "a", depth=2)]
        clock.now += gap
        raise EngineDeadError("lost")

    if lost:
        with pytest.raises(EngineDeadError, match="lost"):
            asyncio.run(read(unbroken(slow, LONG)))
    else:
        tokens, end = asyncio.run(read(unbroken(slow, LONG)))
        assert (len(tokens), end.reason) == (2, "length")


@dataclasses.dataclass
class Told:
    """Calls in turn, each of which is told such lists, and then fails if the last of them is an error."""

    calls: list[list[list[Event | Begun] | Exception]]
    got: list[tuple[Request, Wanted]] = dataclasses.field(default_factory=list)

    async def stream(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        self.got.append((request, wanted))
        for told in self.calls[len(self.got) - 1]:
            if isinstance(told, Exception):
                raise told
            yield told


TOKEN, END = Token("x", 65, "a", depth=2), Finished("x", "length")
DEAD, FULL = (Finished("x", "error", error=error) for error in (EngineDeadError("dead"), QueueFullError("full")))


def test_the_pauses_of_tries_in_a_row_grow_and_begin_anew_after_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first after a loss is the shortest; a replica that refuses, or is full, is not asked again as soon."""
    slept, resumed, lost = list[float](), list[int](), EngineDeadError("lost")

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(failover, "PAUSES", PAUSES)
    monkeypatch.setattr(failover, "LOSSES", 3)
    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=sleep))
    patient = QueueFullError("full")
    patient.retry_after = 7.0
    refusals = [[[DEAD]] for _ in range(5)]
    replicas = Told(
        [[[DEAD]], [[TOKEN], lost], *refusals, [patient], [QueueFullError("full")], [[TOKEN], lost], [[END]]]
    )
    tokens, end = asyncio.run(
        read(unbroken(replicas.stream, LONG, on_resume=lambda: resumed.append(len(replicas.got))))
    )
    assert slept == [0.25, 0.1, 0.5, 1.0, 2.0, 2.0, 2.0, 7.0, 2.0, 0.1] and (len(tokens), end.reason) == (2, "length")
    assert {event.request for event in (*tokens, end)} == {LONG.id}
    assert resumed == [2, 10], "once a loss, and not for a replica that did nothing"
    assert [request.id.removeprefix(LONG.id) for request, _ in replicas.got] == [
        "", ".0.1.0", ".1.1.0", ".1.2.0", ".1.3.0", ".1.4.0", ".1.5.0", ".1.6.0", ".1.7.0", ".1.8.0", ".2.1.0",
    ]  # fmt: skip


def test_a_replica_of_other_weights_is_passed_over_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=sleep))
    replicas = Told([[[Finished("x", "error", error=other_weights(name))]] for name in "ab"] + [[[END]]])
    asyncio.run(read(unbroken(replicas.stream, LONG)))
    assert [(request.id, wanted.avoid) for request, wanted in replicas.got] == [
        (LONG.id, set()), (f"{LONG.id}.0.0.1", {"a"}), (f"{LONG.id}.0.0.2", {"a", "b"}),
    ]  # fmt: skip
    assert not slept


def test_a_loss_after_many_refusals_waits_as_long_as_any_try(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(failover, "PAUSES", PAUSES)
    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=sleep))
    replicas = Told([*[[[DEAD]]] * 6, [EngineDeadError("lost")], [[END]]])
    asyncio.run(read(unbroken(replicas.stream, LONG)))
    assert slept == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("end", ["dead", "cancelled"])
def test_a_request_that_ends_two_replicas_in_the_middle_of_its_answer_is_given_up(
    end: str, apart: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the end comes with a token or alone: that is no refusal, and none is asked a third time."""

    async def sleep(seconds: float) -> None: ...

    monkeypatch.setattr(failover, "asyncio", SimpleNamespace(sleep=sleep))
    last = DEAD if end == "dead" else Finished("x", "cancelled")
    replicas, resumed = Told([[[TOKEN], [last]] if apart else [[TOKEN, last]]] * 4), list[int]()
    caplog.set_level(logging.WARNING)
    with pytest.raises(EnginesLostError, match="2 engine replicas were lost while they had this request") as caught:
        asyncio.run(read(unbroken(replicas.stream, LONG, on_resume=lambda: resumed.append(len(replicas.got)))))
    assert caught.value.status == 500, "nobody is asked to come back with it"
    assert [len(request.answer) for request, _ in replicas.got] == [0, 1] and resumed == [1]
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" tokens: ")[0].rpartition(" ")[2] for line in told] == ["1"]


def test_a_replica_that_gives_a_request_back_at_once_has_not_begun_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of its weights binds nobody: others may answer. Beside a token it does, in the same list or before."""
    of = {name: Begun(name, name) for name in ("old", "new")}
    lost = EngineDeadError("lost")
    monkeypatch.setattr(failover, "LOSSES", 3)
    for first, after in (
        ([[DEAD]], "new"),
        ([[of["old"], DEAD]], "new"),
        ([[of["old"], FULL]], "new"),
        ([[of["old"], TOKEN, DEAD]], "old"),
        ([[of["old"], TOKEN], [DEAD]], "old"),
        ([[of["old"], TOKEN], lost], "old"),
    ):
        pin, replicas = Pin(), Told([[[TOKEN], lost], first, [[of["new"], TOKEN], [END]], [[of["old"], END]]])  # type: ignore[list-item]
        tokens, _ = asyncio.run(read(unbroken(replicas.stream, LONG, pin=pin)))
        assert pin.weights == after
        assert [wanted.weights for _, wanted in replicas.got[:3]] == [None, None, "old" if after == "old" else None]
        assert len(tokens) == 2 and len(replicas.got) == (4 if after == "old" else 3)


def test_a_full_replica_that_says_so_in_an_event_is_as_one_that_raises_it() -> None:
    """What no replica has lost is refused; what one has is waited for, and an answer that has begun is not given back."""
    with pytest.raises(QueueFullError, match="full"):
        asyncio.run(read(unbroken(Told([[[FULL]]]).stream, LONG)))
    replicas = Told([[[TOKEN], EngineDeadError("lost")], [[FULL]], [[TOKEN], [END]]])
    tokens, end = asyncio.run(read(unbroken(replicas.stream, LONG)))
    assert (len(tokens), end.reason, len(replicas.got)) == (2, "length", 3)
    _, end = asyncio.run(read(unbroken(Told([[[TOKEN, FULL]]]).stream, LONG)))
    assert end.error is FULL.error


def test_a_stream_that_ends_without_an_end_is_a_loss() -> None:
    replicas = Told([[[TOKEN]], [[TOKEN]], [[TOKEN]]])
    with pytest.raises(EngineDeadError, match="ended the stream without finishing"):
        asyncio.run(read(unbroken(replicas.stream, LONG)))
    assert [len(request.answer) for request, _ in replicas.got] == [0, 1]


def test_a_replica_that_refuses_a_request_again_ends_it_for_there_is_no_other() -> None:
    progress = at_100()
    for name in "ab":
        progress.refuse(other_weights(name))
    assert progress.wanted().avoid == {"a", "b"} and progress.call == "r.0.0.2"
    with pytest.raises(OtherModelError, match=r"served no more.*send the request again"):
        progress.refuse(other_weights("a"))
