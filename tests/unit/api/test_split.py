"""Which version gets a request, and what becomes of one that fails at a canary: with engines that do as they are told."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.api.bodies import ChatRequest
from shoal.api.messages.bodies import MessagesRequest
from shoal.api.meter import Meter
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.service import _conversation
from shoal.api.split import Note, Split
from shoal.api.trial import Trial
from shoal.engine.events import LATER, Event, Finished, FinishReason, Request, Signals, Token
from shoal.engine.metrics import Samples, sample
from shoal.errors import (
    ContextLengthError,
    DeadlineError,
    EngineDeadError,
    EnginesLostError,
    GenerationError,
    QueueFullError,
    RequestError,
)
from shoal.loop.canary import LEAST_TIMES
from shoal.loop.canary_state import SHARES, Canary
from tests.canaries import seen

SECONDS = 60.0


class Engine:
    """Answers four tokens, of `first` on; raises `error` before the token `at`, or hangs there; ends with `end` instead."""

    def __init__(self, first: int, error: Exception | None = None, at: int = 0, end: Finished | None = None) -> None:
        self.first, self.error, self.at, self.end = first, error, at, end
        self.hangs = False
        self.asked: list[Request] = []
        self.open = 0

    async def batches(self, request: Request, on_begun: Any = None) -> AsyncGenerator[list[Event], None]:
        self.asked.append(request)
        self.open += 1
        try:
            if on_begun is not None:
                on_begun("stableweights-none")
            for place in range(len(request.answer), 4):
                if place == self.at and (self.error or self.hangs):
                    if self.hangs:
                        await asyncio.Event().wait()
                    assert self.error is not None
                    raise self.error
                yield [Token(request.id, self.first + place, "x", depth=2, ran=2 * place + 2)]
            yield [self.end or Finished(request.id, "length", depth=2, completion_tokens=4, total_seconds=1.0)]
        finally:
            self.open -= 1

    async def stats(self) -> Samples:
        return {}


def split(canary: Engine, step: int = 3, share: float | None = 1.0) -> Split:
    """Over a stable engine of tokens from 100 on; a canary of `share` of the conversations."""
    made = Split(Engine(100))  # type: ignore[arg-type]
    made.labels = {"stableweights": "1.stable"}
    made.trial = Trial(canary, "2.canary", Canary(2, step, "now"), made.pace)  # type: ignore[arg-type]
    if share is not None:
        made.trial.takes = lambda conversation: made.trial.canary.step > 0  # type: ignore[method-assign,union-attr]
    return made


async def read(made: Split, request: Request, note: Note) -> list[Event]:
    async with asyncio.timeout(SECONDS):
        return [event async for events in made.asked(note).batches(request) for event in events]


def tokens(events: list[Event]) -> list[int]:
    assert isinstance(events[-1], Finished) and all(isinstance(event, Token) for event in events[:-1])
    assert {event.request for event in events} == {"r"}
    return [event.token for event in events if isinstance(event, Token)]


@pytest.mark.parametrize(
    "error",
    [GenerationError("NaN"), EngineDeadError("lost"), KeyError("a bug"), QueueFullError("full"), DeadlineError("late")],
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_what_fails_at_the_canary_goes_on_at_the_stable_version(error: Exception, at: int) -> None:
    async def work() -> None:
        canary, note = Engine(0, error, at), Note()
        made = split(canary)
        events = await read(made, Request([5, 6], id="r"), note)
        assert tokens(events) == [*range(at), *range(100 + at, 104)]
        assert note.resumed == "canary->stable"
        assert note.version == ("2.canary" if at else "1.stable")
        (rest,) = made.stable.asked  # type: ignore[attr-defined]
        assert (rest.answer, rest.prompt) == (tuple(range(at)), [5, 6])
        assert rest.depth == (2 if at else "auto") and rest.id != "r" and rest.ran == 2 * at
        assert rest.losses == isinstance(error, EngineDeadError), "one more engine may be lost, not two"
        assert rest.sampling.seed == canary.asked[0].sampling.seed is not None, "the same draws"
        trial = made.trial
        assert trial is not None and trial.running == canary.open == 0
        stats = await made.stats()
        assert stats[sample("version_requests", version="2.canary", outcome="failed")] == 1
        assert stats[sample("release_share", version="2.canary")] == SHARES[3]
        full = isinstance(error, QueueFullError)
        assert seen(trial.evidence, "canary") == (0 if full else 1,) * 2

    asyncio.run(work())


@pytest.mark.parametrize("taken", [True, False])
def test_a_canary_that_was_never_given_a_request_is_no_loss(taken: bool) -> None:
    async def work() -> None:
        error = EngineDeadError("unavailable")
        error.taken = taken
        made = split(Engine(0, error))
        await read(made, Request([5, 6], id="r"), Note())
        (rest,) = made.stable.asked  # type: ignore[attr-defined]
        assert rest.losses == taken

    asyncio.run(work())


def test_a_request_that_two_engines_of_the_canary_were_lost_with_goes_to_no_stable_one() -> None:
    async def work() -> None:
        made = split(Engine(0, EnginesLostError("lost"), 1))
        with pytest.raises(EnginesLostError):
            await read(made, Request([5, 6], id="r"), Note())
        assert not made.stable.asked  # type: ignore[attr-defined]
        stats = await made.stats()
        assert stats[sample("version_requests", version="2.canary", outcome="failed")] == 1

    asyncio.run(work())


def test_what_became_of_the_calls_of_tools_is_told_to_the_trial_that_gave_the_answer() -> None:
    async def work() -> None:
        for side, talks in (("canary", 20), ("stable", 20), ("copies", 2)):
            made = split(Engine(0), 0 if side == "copies" else 3)
            trial = made.trial
            assert trial is not None
            trial.takes = lambda conversation, side=side: side == "canary"  # type: ignore[method-assign,misc]
            for talk in range(talks):
                note = Note()
                await read(made, Request([talk], id="r"), note)
                assert note.on_calls is not None
                for valid in (True, False):
                    note.on_calls(valid)
                if trial.decided[0] == "back":
                    break
            assert trial.decided[0] == ("back" if side == "canary" else "wait")
            other = "stable" if side == "canary" else "canary"
            assert seen(trial.evidence, other, "wrong") == (0, 0)
            assert side == "copies" or seen(trial.evidence, side, "wrong") == (talk + 1,) * 2
        made, note = split(Engine(0)), Note()
        made.trial = None
        await read(made, Request([5], id="r"), note)
        assert note.on_calls is None

    asyncio.run(work())


def test_an_end_that_is_an_error_goes_on_as_well() -> None:
    async def work() -> None:
        made, note = split(Engine(0, end=Finished("r", "error", error=GenerationError("NaN")))), Note()
        assert tokens(await read(made, Request([5], id="r"), note)) == [0, 1, 2, 3]
        assert note.resumed

    asyncio.run(work())


@pytest.mark.parametrize("error", [ContextLengthError("too long"), RequestError("top_p", param="top_p")])
def test_the_clients_own_fault_is_told_and_counted_against_nobody(error: Exception) -> None:
    async def work() -> None:
        made = split(Engine(0, error))
        with pytest.raises(type(error)):
            await read(made, Request([5], id="r"), Note())
        assert made.trial is not None and seen(made.trial.evidence, "canary") == (0, 0)
        assert made.stable.asked == []  # type: ignore[attr-defined]

    asyncio.run(work())


def test_a_canary_that_is_late_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.api.trial.LATE_SECONDS", 0.05)

    async def work() -> None:
        canary = Engine(0, at=2)
        canary.hangs = True
        made, note = split(canary), Note()
        for _ in range(LEAST_TIMES):
            made.pace.observe(0.001, 0.001)
        assert tokens(await read(made, Request([5], id="r"), note)) == [0, 1, 102, 103]
        assert note.resumed and canary.open == 0

    asyncio.run(work())


def test_one_that_is_condemned_gets_nothing_more_from_that_moment_on() -> None:
    async def work() -> None:
        canary = Engine(0, GenerationError("NaN"))
        made = split(canary)
        for talk in range(40):
            await read(made, Request([talk], id="r"), Note())
        people = len(canary.asked)
        assert 3 <= people <= 20
        assert made.condemned() is made.trial and made.trial is not None
        assert f"failures: {people} of {people} people" in made.trial.decided[1]

    asyncio.run(work())


def test_a_shadow_is_one_copy_at_a_time_that_nobody_reads() -> None:
    async def work() -> None:
        canary = Engine(0, at=1)
        canary.hangs = True
        made = split(canary, step=0)
        for _ in range(3):
            note = Note()
            assert tokens(await read(made, Request([5], id="r", payer="ann", beside="b"), note)) == [100, 101, 102, 103]
            assert (note.role, note.version, note.resumed) == ("stable", "1.stable", "")
            await asyncio.sleep(0)
        (copy,) = canary.asked
        assert (copy.priority, copy.payer, copy.beside, copy.prompt) == (LATER, "shadow", "", [5])
        trial = made.trial
        assert trial is not None and trial.shadowing is not None
        canary.hangs = False
        trial.shadowing.cancel()
        await asyncio.wait({trial.shadowing})
        await read(made, Request([5], id="r"), Note())
        assert trial.shadowing is not None
        await trial.shadowing
        assert seen(trial.evidence, "canary") == (1, 0)
        assert seen(trial.evidence, "stable") == (2, 0), "the originals of both copies, and of these alone"

    asyncio.run(work())


def test_who_leaves_ends_the_canarys_work_and_counts_against_nobody() -> None:
    async def work() -> None:
        canary = Engine(0)
        made = split(canary)
        lists = made.asked(Note()).batches(Request([5], id="r"))
        async with aclosing(lists):  # type: ignore[type-var]
            await anext(lists)
        trial = made.trial
        assert trial is not None and (canary.open, trial.running, *seen(trial.evidence, "canary")) == (0, 0, 0, 0)

    asyncio.run(work())


def as_chat(system: str, *turns: str) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "system", "content": system}, *as_turns(turns)]}
    )


def as_message(system: str, *turns: str) -> MessagesRequest:
    return MessagesRequest.model_validate(
        {"model": "m", "max_tokens": 9, "system": system, "messages": as_turns(turns)}
    )


def as_items(system: str, *turns: str) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "instructions": system, "input": as_turns(turns)})


def as_text(system: str, *turns: str) -> ResponsesRequest:
    """Its first turn a text, and of those after it what the clients send: all."""
    given = turns[0] if len(turns) == 1 else as_turns(turns)
    return ResponsesRequest.model_validate({"model": "m", "instructions": system, "input": given})


def as_turns(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]


@pytest.mark.parametrize("form", [as_chat, as_message, as_items, as_text])
def test_conversations_under_one_long_instruction_are_told_apart_in_each_form_of_chat(form: Callable[..., Any]) -> None:
    """Else all of a key's are one: drawn for one version, and one person, of whom no canary is decided."""
    access = SimpleNamespace(priority=0, key=None, facts={}, columns={})
    request: Any = SimpleNamespace(state=SimpleNamespace(access=access), client=SimpleNamespace(host="127.0.0.1"))

    def talk(*turns: str) -> bytes:
        return _conversation(request, form("You are an assistant. " * 100, *turns))

    assert talk("hello") and talk("hello") == talk("hello", "Good day", "a fish?") != talk("a fish?")
    if form is as_items:
        access.columns["conversation"] = "stored"  # its turns before
        assert talk("and then?") == talk("why?") and b"stored" in talk("why?")


def test_a_conversation_stays_and_whom_few_reach_many_reach_as_well() -> None:
    talks = [f"talk {number}".encode() for number in range(4000)]
    before: set[bytes] = set()
    for step, share in enumerate(SHARES):
        trial = Trial(None, "2.canary", Canary(2, step, "now"), Split(None).pace)  # type: ignore[arg-type]
        taken = {talk for talk in talks if trial.takes(talk)}
        assert before <= taken and abs(len(taken) / len(talks) - share) < 0.03
        before = taken
    other = Trial(None, "3.other", Canary(3, 1, "now"), Split(None).pace)  # type: ignore[arg-type]
    first = {talk for talk in talks if Trial(None, "2.canary", Canary(2, 1, "now"), other.pace).takes(talk)}  # type: ignore[arg-type]
    assert len(first & {talk for talk in talks if other.takes(talk)}) < len(first) / 2, "another canary, other people"


@pytest.mark.parametrize(
    ("said", "invalid"), [([], True), ([7] * 15, False), ([1, *[7] * 16], True), ([*range(20)], False)]
)
def test_an_answer_of_nothing_or_of_one_token_for_ever_is_none(said: list[int], invalid: bool) -> None:
    meter = Meter()
    meter.take([Token("r", token, "x") for token in said])
    assert meter.invalid is invalid


def test_time_that_was_spent_at_the_canary_is_the_requests() -> None:
    meter = Meter()
    meter.began -= 5.0
    assert meter.rest(Request([5], id="r", deadline=9.0)).deadline == pytest.approx(4.0, abs=0.5)
    with pytest.raises(DeadlineError):
        meter.rest(Request([5], id="r", deadline=4.0))
    end = meter.ours(Finished("r.stable", "length", first_token_seconds=1.0, total_seconds=2.0), Request([5], id="r"))
    assert isinstance(end, Finished)
    assert (end.request, end.total_seconds > 6.9, end.first_token_seconds > 5.9) == ("r", True, True)


def test_thumbs_on_answers_of_the_trial_are_evidence_and_the_newest_of_a_person_counts() -> None:
    async def work() -> None:
        made = split(Engine(0))
        trial = made.trial
        assert trial is not None
        for answer in ("a", "a2", "b"):
            trial.takes = lambda conversation, answer=answer: answer != "b"  # type: ignore[method-assign,misc]
            await read(made, Request([5], id="r"), Note(id=answer, conversation=answer.encode()))
        made.voted("a", "ann", "down")
        made.voted("a", "ann", "down")
        made.voted("a2", "ann", "down")
        made.voted("a", "bob", "up")
        made.voted("b", "cid", "down")
        made.voted("b", "cid", "up")
        made.voted("b", "ann", "down")
        made.voted("before the trial", "dan", "down")
        assert [seen(trial.evidence, side, "down") for side in ("canary", "stable")] == [(1, 1), (1, 0)]
        made.voted("a", "ann", None)
        assert seen(trial.evidence, "canary", "down") == (0, 0)
        trial.takes = lambda conversation: True  # type: ignore[method-assign]
        for person in range(40):
            await read(made, Request([5], id="r"), Note(id=f"{person}", conversation=b"%d" % person))
            made.voted(f"{person}", f"{person}", "down")
        assert made.condemned() is trial and "thumbs down" in trial.decided[1]

    asyncio.run(work())


@pytest.mark.parametrize("person", ["", "ann"])
def test_of_one_who_asks_one_votes_whatever_names_and_answers_there_are(person: str) -> None:
    """A version is drawn once for a conversation, and for a person once a step: forty names that vote on it are no forty."""

    async def work() -> None:
        made = split(Engine(0))
        assert (trial := made.trial) is not None
        for turn in range(3):
            await read(made, Request([5], id="r"), Note(id=f"{turn}", conversation=b"one", person=person))
            for name in range(40):
                made.voted(f"{turn}", f"invented {turn} {name}", "down")
        assert seen(trial.evidence, "canary", "down") == (1, 1) and made.condemned() is None
        assert len(trial.evidence.own) == 2, "nor do they take the place of those who ask"

    asyncio.run(work())


def test_votes_on_answers_of_a_trial_before_are_no_evidence_of_this_one() -> None:
    """Those of a version that was taken back counted as the stable one's."""

    async def work() -> None:
        made = split(Engine(0))
        await read(made, Request([5], id="r"), Note(id="a", conversation=b"a"))
        assert made.trial is not None
        for label in ("3.canary", "2.canary"):
            made.trial = Trial(Engine(0), label, Canary(int(label[0]), 3, "now", began=9), made.pace)  # type: ignore[arg-type]
            made.voted("a", "ann", "down")
            assert not made.trial.evidence.own

    asyncio.run(work())


def test_users_that_one_key_invents_condemn_no_canary_where_other_keys_ask_too() -> None:
    async def work(keys: int) -> bool:
        made = split(Engine(0))
        for place in range(60):
            note = Note(id=str(place), conversation=str(place).encode(), api_key=f"key {place % keys}")
            await read(made, Request([5], id="r"), note)
            if not place % keys:
                made.voted(str(place), f"invented {place}", "down")
        return made.condemned() is not None

    assert asyncio.run(work(1)) and not asyncio.run(work(2))


@pytest.mark.parametrize("named", [True, False])
def test_one_person_counts_once_whatever_becomes_of_her_conversations(named: bool) -> None:
    """One whose every answer fails, or who rates every answer down, in fifty conversations with the canary; where nobody says
    who asks each conversation is another's, and votes without a name are one person's."""

    async def work() -> None:
        made = split(Engine(0, GenerationError("NaN")) if named else Engine(0))
        trial = made.trial
        assert trial is not None
        for talk in range(50):
            note = Note(id=str(talk), conversation=str(talk).encode(), person="ann" if named else "")
            await read(made, Request([5], id="r"), note)
            made.voted(str(talk), None, "down")
        assert trial.decided[0] == "wait", trial.decided
        assert seen(trial.evidence, "canary") == ((1, 1) if named else (50, 0))
        assert seen(trial.evidence, "canary", "down")[1] == (0 if named else 1)

    asyncio.run(work())


class Sure(Engine):
    """One that says how sure it is of an answer, where it is asked, and ends as `reasons` has it."""

    def __init__(self, mean: float, reasons: Sequence[FinishReason] = ("stop",)) -> None:
        super().__init__(100)
        self.mean, self.reasons, self.draws = mean, itertools.cycle(reasons), random.Random(mean)

    async def batches(self, request: Request, on_begun: Any = None) -> AsyncGenerator[list[Event], None]:
        async for events in super().batches(request, on_begun):
            if isinstance(events[-1], Finished):
                told = Signals(answer_nll=self.draws.gauss(self.mean, 0.5)) if request.signals else None
                yield [replace(events[-1], reason=next(self.reasons), signals=told)]
            else:
                yield events


def in_turns(stable: Engine, canary: Engine, count: int, talk: Callable[[int], str]) -> Trial:
    """`count` requests to each in turns, after some that were before the trial; as many of its first as condemn it."""
    made = split(canary)
    made.stable, trial = stable, made.trial  # type: ignore[assignment]
    assert trial is not None
    turn = itertools.count()
    trial.pace.is_slow = lambda first, token: None  # type: ignore[method-assign]
    trial.takes = lambda conversation: next(turn) % 2 > 0  # type: ignore[method-assign]

    async def work() -> None:
        for number in range(count):
            for each in "sc":
                note = Note(conversation=f"{each} {talk(number)}".encode())
                await read(made, Request([5], id="r"), note)
            if made.condemned() is not None:
                return

    asyncio.run(work())
    return trial


def test_answers_that_the_canary_is_far_less_sure_of_take_it_back() -> None:
    bad = in_turns(Sure(1.0), Sure(1.5), 200, str)
    assert bad.decided[0] == "back" and "unsure answers: " in bad.decided[1]
    assert seen(bad.evidence, "canary")[0] < 100
    good = in_turns(Sure(1.0), Sure(1.1), 200, str)
    assert good.decided[0] != "back" and seen(good.evidence, "canary", "unsure")[0] > 150


def test_answers_that_do_not_end_take_it_back_unless_the_stable_ones_do_not_either() -> None:
    ends, cut = Sure(1.0, ("stop", "stop", "stop", "length")), Sure(1.0, ("length",))
    bad = in_turns(ends, cut, 100, str)
    assert bad.decided[0] == "back" and "cut answers: " in bad.decided[1]
    asked_so = in_turns(Sure(1.0, ("stop", *["length"] * 9)), cut, 300, str)
    assert asked_so.decided[0] != "back" and seen(asked_so.evidence, "canary", "cut") == (300, 300)


def test_of_a_talk_one_answer_says_how_sure_a_version_is() -> None:
    """Somebody who asks the canary the same hard thing a hundred times condemns nothing."""
    one = in_turns(Sure(1.0), Sure(4.0), 100, lambda number: "the same")
    assert one.decided[0] != "back"
    assert [seen(one.evidence, side, "cut")[0] for side in ("canary", "stable")] == [1, 1]


def test_an_answer_of_two_authors_is_no_evidence_of_either() -> None:
    async def work() -> None:
        made = split(Engine(0, GenerationError("NaN"), 2))
        await read(made, Request([5], id="r"), Note(id="a"))
        made.voted("a", "ann", "down")
        assert made.trial is not None
        assert [seen(made.trial.evidence, side, "down")[0] for side in ("canary", "stable")] == [0, 0]

    asyncio.run(work())


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_is_told_with_the_version_that_it_went_to(fails: bool) -> None:
    async def work() -> None:
        made, told = split(Engine(0, GenerationError("NaN") if fails else None, 2), step=0, share=None), list[Any]()
        await read(made, Request([5], id="r"), Note(shadowed=lambda *what: told.append(what)))
        assert made.trial is not None and made.trial.shadowing is not None
        await made.trial.shadowing
        ((label, meter, end, failed),) = told
        assert (label, failed, len(meter.tokens), end is None) == ("2.canary", fails, 2 if fails else 4, fails)

    asyncio.run(work())


def test_a_vote_on_an_answer_of_another_gateway_is_counted_there() -> None:
    async def work() -> None:
        told: list[tuple[str, str | None, str | None]] = []
        here, there = split(Engine(0)), split(Engine(0))
        for made in (here, there):
            made._vote_elsewhere = lambda *vote: told.append(vote)
        await read(there, Request([5], id="r"), Note(id="a"))
        here.voted("a", "ann", "down")
        assert told == [("a", "ann", "down")] and here.trial is not None
        assert seen(here.trial.evidence, "canary", "down") == (0, 0)
        assert [made.counts_vote(*told[0]) for made in (here, there)] == [False, True]
        assert there.trial is not None and seen(there.trial.evidence, "canary", "down") == (1, 1)
        there.voted("a", "ann", "up")
        here.trial = None
        here.voted("a", "ann", "up")
        assert len(told) == 1, "what is counted here goes nowhere, and without a trial nothing does"

    asyncio.run(work())


def test_of_several_gateways_each_is_asked_what_it_counted() -> None:
    async def work() -> None:
        alone = split(Engine(0))
        several = Split(alone.stable, lambda *vote: None)
        several.trial = alone.trial
        for made in (alone, several):
            await read(made, Request([5], id="r"), Note())
        counts = sample("version_requests", version="2.canary", outcome="ok")
        share = sample("release_share", version="2.canary")
        assert alone.counted()[counts] == several.counted()[counts] == 1
        assert {counts, share} <= (await alone.stats()).keys()
        assert counts not in await several.stats() and share in await several.stats()

    asyncio.run(work())
