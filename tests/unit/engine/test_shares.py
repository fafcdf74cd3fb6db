"""Neighbours: who asks for little is not behind who asks for much."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.events import LATER, Finished, Request, Sampling, Token
from shoal.engine.pace import WARM_UP
from shoal.engine.plan import Work
from shoal.engine.shares import KEPT, Seconds, Shares, clearly_before
from shoal.errors import QueueFullError
from tests.unit.engine.test_scheduler import Harness, end, next_token

LONG = Sampling(max_tokens=24, ignore_eos=True)
SHORT = Sampling(max_tokens=2, ignore_eos=True)


def steps_until_first(h: Harness, request: str) -> int:
    for step in range(1, 400):
        if any(isinstance(event, Token) and event.request == request for event in h.step()):
            return step
    raise AssertionError("it never ran")


def test_a_payer_with_one_request_is_not_behind_another_s_many() -> None:
    """All places are taken, and many wait: it has its first token in the second step, as if nobody was there."""
    h = Harness(2000, max_batch=8, max_queue=40, max_batch_tokens=40)
    many = [h.submit([50, i], sampling=LONG, payer="a") for i in range(30)]
    for _ in range(6):
        h.step()
    assert steps_until_first(h, h.submit([70], sampling=SHORT, payer="b")) <= 2
    ended = h.run()
    assert {event.request for event in ended if not isinstance(event, Token)} >= set(many)  # and none is lost
    assert h.pages.available == h.pages.total


def test_clients_of_one_payer_share_what_is_its_own() -> None:
    h = Harness(2000, max_batch=8, max_queue=60, max_batch_tokens=40)
    for i in range(20):
        h.submit([50, i], sampling=LONG, payer="a", client="greedy")
    for _ in range(6):
        h.step()
    assert steps_until_first(h, h.submit([70], sampling=SHORT, payer="a", client="other")) <= 2


def test_two_payers_have_half_each_however_many_clients_and_choices_they_have() -> None:
    h = Harness(2000, max_batch=8, max_queue=100, max_batch_tokens=40)
    of = {h.submit([50, i], sampling=LONG, payer="a", client=str(i % 5)): "a" for i in range(40)}
    of |= {h.submit([60, i], sampling=LONG, payer="b"): "b" for i in range(40)}
    for _ in range(12):
        h.step()
    got = Counter(of[event.request] for _ in range(24) for event in h.step() if isinstance(event, Token))
    assert 0.6 < got["a"] / got["b"] < 1.7, got


def test_who_is_alone_is_served_as_it_comes_and_nothing_is_computed_twice() -> None:
    h = Harness(2000, max_batch=8, max_queue=40, max_batch_tokens=40)
    requests = [h.submit([50, i], sampling=LONG) for i in range(20)]
    events = h.run()
    assert [event.request for event in events if not isinstance(event, Token)] == requests
    assert h.scheduler.metrics.preemptions == 0


@pytest.mark.parametrize("reads", [True, False])
def test_who_sends_much_goes_on_beside_a_long_answer_and_beside_one_that_nobody_reads(reads: bool) -> None:
    """Twelve clients of one payer with a request each, another payer with twelve: half each, however long a third one runs."""
    h = Harness(4000, max_batch=4, max_queue=100, max_batch_tokens=40)
    pin = h.submit([10], sampling=Sampling(max_tokens=400, ignore_eos=True), payer="c")
    h.step()
    h.scheduler.pause(pin, not reads)
    of = {h.submit([50, i], sampling=SHORT, payer="a", client=str(i)): ("a", str(i)) for i in range(12)}
    of |= {h.submit([60, i], sampling=SHORT, payer="b"): ("b", "") for i in range(12)}
    got = Counter[str]()
    for step in range(200):
        for event in h.step():
            if isinstance(event, Finished) and event.request in of:
                payer, client = of.pop(event.request)
                got[payer] += step >= 100
                of[h.submit([70, step % 50], sampling=SHORT, payer=payer, client=client)] = payer, client
    assert pin in h.scheduler._live
    assert 0.7 < got["a"] / got["b"] < 1.4, got


def test_who_sends_much_has_one_turn_of_many_payers_where_there_are_fewer_places() -> None:
    """Its next request came before all others, and is still not before those that wait for longer as their payers' next."""
    h = Harness(2000, max_batch=2, max_queue=100, max_batch_tokens=40)
    of = {h.submit([50, i], sampling=SHORT, payer="greedy"): "greedy" for i in range(30)}
    of |= {h.submit([60, i], sampling=SHORT, payer=str(i)): str(i) for i in range(9)}
    got = Counter[str]()
    while sum(got.values()) < 100:
        for event in h.step():
            if isinstance(event, Finished):
                payer = of.pop(event.request)
                got[payer] += 1
                of[h.submit([70, len(got)], sampling=SHORT, payer=payer)] = payer
    assert len(got) == 10
    assert max(got.values()) <= 2 * min(got.values()), got


def test_a_place_is_given_whatever_runs_at_a_lower_priority() -> None:
    h = Harness(2000, max_batch=8, max_queue=40, max_batch_tokens=40)
    h.submit([40], sampling=LONG, payer="c", priority=1)
    h.step()
    for i in range(7):
        h.submit([50, i], sampling=LONG, payer="a")
    h.step()
    assert steps_until_first(h, h.submit([70], sampling=SHORT, payer="b")) <= 2


def test_a_full_queue_has_a_place_for_who_has_little_there() -> None:
    """The last of who has most there, which has had nothing yet, is told to come again; who has most gets no more."""
    h = Harness(2000, max_batch=4, max_queue=8)
    many = [h.submit([50, i], sampling=LONG, payer="a") for i in range(12)]
    h.step()
    few = [h.submit([60, i], sampling=SHORT, payer="b") for i in range(3)]
    with pytest.raises(QueueFullError):
        h.submit([51], sampling=LONG, payer="a")
    events = h.run()
    for request in many[-3:]:
        assert isinstance(end(events, request).error, QueueFullError)
        assert end(events, request).error.retry_after != 0  # type: ignore[union-attr]
    assert {end(events, request).reason for request in [*many[:-3], *few]} == {"length"}
    assert h.scheduler.metrics.refused == 4


def test_what_has_begun_gives_no_place_however_much_of_it_there_is() -> None:
    """Here, or in another engine; and that is let in, since it has been taken once."""
    h = Harness(2000, max_batch=4, max_queue=2)
    begun = [h.submit([50, i], sampling=LONG, payer="a", answer=(99, 98)) for i in range(9)]
    h.step()
    with pytest.raises(QueueFullError):
        h.submit([60], sampling=SHORT, payer="b")
    events = h.run()
    assert {end(events, request).reason for request in begun} == {"length"}


def test_who_does_not_read_has_none_of_the_places_of_those_who_do() -> None:
    """Nor in the queue: as many as may be live do not read, and as many others are taken, and answered."""
    h = Harness(2000, max_batch=2, max_queue=2)
    for i in range(4):
        stopped = h.submit([50, i], sampling=LONG, payer="a")
        while h.scheduler._live[stopped].answered < 2:
            h.step()
        h.scheduler.pause(stopped)
    others = [h.submit([60, i], sampling=SHORT, payer="a") for i in range(4)]
    with pytest.raises(QueueFullError):
        h.submit([61], sampling=SHORT, payer="a")
    events = [event for _ in range(30) for event in h.step()]
    assert {end(events, request).reason for request in others} == {"length"}
    for request in list(h.scheduler._live):
        h.scheduler.pause(request, False)
    h.run()
    assert h.scheduler._paused == 0


def seconds_of(
    neighbours: int, *, prompt: int = 1, pause: int = 0, tokens: int = 8, payers: int = 1, priority: int = 0
) -> list[float]:
    """Virtual seconds that each of some small requests takes, sent one after the other, `pause` steps between two, beside as
    many of `priority` that decode of other `payers`, with prompts of `prompt` tokens. A step costs 1 ms, and 1 ms a row."""
    h = Harness(4000, cost=(0.25e-3, 0.25e-3), max_batch=40, max_queue=200, max_batch_tokens=128)
    endless = Sampling(max_tokens=400, ignore_eos=True)
    for i in range(neighbours):
        h.submit(
            [*range(50, 50 + prompt), i], sampling=endless, payer=f"a{i % payers}", client=str(i), priority=priority
        )
    for _ in range(WARM_UP + 4):
        if not neighbours:
            h.submit([40, _], sampling=SHORT)
        h.step()
    h.run() if not neighbours else None
    found = []
    for number in range(12):
        for _ in range(pause if neighbours else 0):
            h.step()
        began = h.now
        small = h.submit([70, number], sampling=Sampling(max_tokens=tokens, ignore_eos=True), payer="b")
        while not any(isinstance(event, Finished) and event.request == small for event in h.step()):
            pass
        found.append(h.now - began)
    return found


def test_small_requests_take_at_most_twice_as_long_beside_a_full_batch() -> None:
    """In a step with 31 others each of their tokens would take as long as those: 16 times as long."""
    alone = max(seconds_of(0))
    assert alone < 0.02
    beside = seconds_of(31)
    assert sorted(beside)[6] <= 2 * alone + 0.032, (alone, beside)  # and a step that runs when one comes


def test_small_requests_take_no_longer_beside_what_may_wait_than_beside_one_payer_however_many_have_some() -> None:
    """They were never behind it, and took 0.265 s where they take 0.048 beside what does not wait for them."""
    equal, later = seconds_of(31), seconds_of(31, payers=8, priority=LATER)
    assert sorted(later)[6] <= sorted(equal)[6] and max(later) <= max(equal), (equal, later)


def test_who_has_a_full_batch_has_half_of_the_time_beside_small_requests_that_never_end() -> None:
    h = Harness(4000, cost=(0.25e-3, 0.25e-3), max_batch=20, max_queue=200, max_batch_tokens=128)
    for i in range(16):
        h.submit([50, i], sampling=Sampling(max_tokens=1500, ignore_eos=True), payer="a", client=str(i))
    for _ in range(WARM_UP):
        h.step()
    of = {h.submit([60, i], sampling=SHORT, payer="b"): "b" for i in range(2)}
    tokens, began = 0, h.now
    while h.now < began + 3:
        for event in h.step():
            tokens += isinstance(event, Token) and event.request not in of
            if isinstance(event, Finished) and of.pop(event.request, None):
                of[h.submit([60, tokens % 50], sampling=SHORT, payer="b")] = "b"
    alone = 16 * 3 / 0.017
    assert 0.35 * alone < tokens < 0.8 * alone


class Asked:
    """What the order is made of."""

    def __init__(self, payer: str, client: str, priority: int = 0) -> None:
        self.request, self.order = Request([50], payer=payer, client=client), (priority, 0, 0)
        self.number = self.turn = 0


def test_ranks_are_places_among_what_a_payer_has_now() -> None:
    """By hand: (priority, rank, since when), where every number is taken once."""
    shares = Shares()
    assert not shares.ended

    def comes(*who: Any) -> Any:
        shares.joins(asked := Asked(*who))
        shares.joined(asked)
        return asked

    first, second, other = comes("p", "x"), comes("p", "x"), comes("p", "y")
    assert [(each.number, each.turn, each.order) for each in (first, second, other)] == [
        (1, 1, (0, 1, 1)), (2, 2, (0, 2, 2)), (3, 1, (0, 2, 3)),
    ]  # fmt: skip
    assert shares.settle() and not shares.settle() and not shares.ended
    assert [each.order for each in (first, other, second)] == [(0, 1, 1), (0, 2, 3), (0, 3, 4)]
    assert [comes(*who).order for who in (("q", "x"), ("p", "x", 1))] == [(0, 1, 5), (1, 1, 6)]
    shares.left(first)
    assert shares.ended and shares.settle() and not shares.ended
    # the second is its client's next now, for less long than the other's
    assert [(each.turn, each.order) for each in (other, second)] == [(1, (0, 1, 8)), (1, (0, 2, 9))]
    assert clearly_before(first, second) is False and clearly_before(first, comes("p", "x"))


def test_seconds_are_shared_by_the_rows_of_a_step() -> None:
    def work(payer: str, count: int, drafts: int = 0, groups: tuple[int, int] = (0, 4)) -> Any:
        return Work(Asked(payer, ""), 0, count, *groups, drafts=drafts)  # type: ignore[arg-type]

    seconds = Seconds()
    assert not seconds.behind({"a", "b"})
    seconds.took([work("a", 2, drafts=1), work("b", 2, groups=(2, 4))], 8.0)  # 12 rows and 4: 6 s and 2 s
    assert not seconds.behind({"a", "b"}), "4 s less is half of a step of both, and no more than that"
    seconds.took([work("a", 3), work("b", 1)], 8.0)
    assert seconds.behind({"a", "b"}) == {"b"}, "12 s and 4 s"
    assert seconds.behind({"a", "b", "c"}) == {"b", "c"}, "who comes has had a step less than the least"
    seconds.took([work("b", 9)], 10.0)
    assert seconds.behind({"a", "b", "c"}) == {"c"}, "12 s and 14 s; a step of one alone is none of all"
    assert not seconds.behind({"b"}) and not seconds.behind({"a", "b"}), (
        "12 s and 14 s: who comes again has had what it had"
    )
    assert seconds.behind({"a", "b", "d"}) == {"d"}, "12 s less a step"


def decoding(payer: str, rows: int, priority: int = 0) -> Any:
    return Work(Asked(payer, "", priority), 0, rows, 0, 4)  # type: ignore[arg-type]


def test_who_left_its_share_to_others_has_four_steps_before_them_and_no_more() -> None:
    seconds = Seconds()
    seconds.behind({"much", "little"})
    seconds.took([decoding("much", 15), decoding("little", 1)], 1.0)
    for _ in range(100):
        seconds.behind({"much"})
        seconds.took([decoding("much", 16)], 1.0)
    steps = 0
    while seconds.behind({"much", "little"}) == {"little"}:
        seconds.took([decoding("little", 1)], 0.125)
        steps += 1
    assert steps == (4 - 0.5) / 0.125, "to within half of a step of all"
    for _ in range(20):  # it goes and comes again at once: after one step of the other's it has one of its own time
        seconds.behind({"much"})
        seconds.took([decoding("much", 16)], 1.0)
        again = 0
        while seconds.behind({"much", "little"}) == {"little"}:
            seconds.took([decoding("little", 1)], 0.125)
            again += 1
        assert again == 8


@settings(max_examples=40)
@given(own=st.sampled_from([0.05, 0.1, 0.5, 0.9]), on=st.integers(1, 60), off=st.integers(0, 4))
def test_however_another_comes_and_goes_a_payer_has_half_of_the_time_and_waits_four_steps(
    own: float, on: int, off: int
) -> None:
    """A step of both takes 1 s, one of the other alone `own`; the other works for `on` steps and is away for `off`."""
    seconds = Seconds()
    mine = total = waits = longest = 0.0
    for step in range(600):
        payers = {"mine"} | ({"other"} if step % (on + off) < on else set())
        run = seconds.behind(payers) or payers
        took = 1.0 if "mine" in run else own
        seconds.took([decoding(payer, 15 if payer == "mine" else 1) for payer in run], took)
        total += took
        mine += took * (15 / 16 if "other" in run else 1) if "mine" in run else 0
        waits = 0 if "mine" in run else waits + took
        longest = max(longest, waits)
    assert mine > 0.48 * total and longest < KEPT + own


def test_what_may_wait_has_no_steps_of_its_own_and_is_owed_four_at_most_for_that() -> None:
    seconds = Seconds()
    for _ in range(100):
        assert not seconds.behind({"a", None})
        seconds.took([decoding("a", 15), decoding("x", 1, LATER)], 1.0)
    steps = 0
    while seconds.behind({"a", None}) != {"a"}:  # now a batch of it has come
        seconds.took([decoding("a", 1), decoding("y", 15, LATER)], 1.0)
        steps += 1
    assert steps <= KEPT + 2


def test_what_may_wait_has_what_others_leave() -> None:
    """It holds all places, running and waiting, and the memory: whoever comes has a place and a token at once, whose key it may
    be; and what gave its place is computed to its end, token for token."""
    for payer in ("a", "b"):
        h = Harness(100, max_batch=4, max_queue=4, max_batch_tokens=40)
        later = [h.submit([50, i], sampling=LONG, payer="later a", priority=LATER + i % 2) for i in range(8)]
        events = [event for _ in range(6) for event in h.step()]
        for number in range(4):
            came = h.submit([70, number], sampling=SHORT, payer=payer)
            first = [*h.step(), *h.step()]
            assert any(isinstance(event, Token) and event.request == came for event in first)
            events += first
        events += h.run()
        lost = {event.request for event in events if isinstance(event, Finished) and event.error is not None}
        ended = {event.request for event in events if isinstance(event, Finished)} - lost
        assert lost and lost < {*later} and {*later} - lost <= ended, "a full queue is told to who may wait"
        for request in {*later} - lost:
            told = [event.token for event in events if isinstance(event, Token) and event.request == request]
            tokens = [50, later.index(request)]
            for _ in range(LONG.max_tokens):
                tokens.append(next_token(tokens))
            assert told == tokens[2:]


def test_what_may_wait_takes_no_steps_from_others() -> None:
    """Alone it has all of them; beside one that runs it has only rows in its steps, however little it has had."""
    h = Harness(2000, cost=(1e-3, 1e-3), max_batch=8, max_queue=40, max_batch_tokens=40)
    for i in range(8):
        h.submit([50, i], sampling=LONG, payer="later a", priority=LATER)
    for _ in range(WARM_UP):
        h.step()
    mine = h.submit([70], sampling=LONG, payer="b")
    steps = [{event.request for event in h.step() if isinstance(event, Token)} for _ in range(12)]
    assert all(mine in step for step in steps[1:]), steps


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_full_queue_of_what_may_wait_refuses_nobody(steps: int) -> None:
    """As many live requests have room as without it: it may run, or wait with half of its answer, or with nothing."""
    h = Harness(2000, max_batch=2, max_queue=2, max_batch_tokens=40)
    for i in range(4):
        h.submit([50, i], sampling=LONG, payer="later a", priority=LATER)
    events = [*h.step(), *h.step()]
    mine = []
    for number in range(4):
        mine.append(h.submit([70, number], sampling=LONG, payer="b"))
        events += [event for _ in range(steps) for event in h.step()]
    with pytest.raises(QueueFullError):
        h.submit([70, 9], sampling=LONG, payer="b")
    ended = {event.request: event for event in events + h.run() if isinstance(event, Finished)}
    assert all(ended[request].error is None for request in mine) and len(ended) == 8


@pytest.mark.parametrize("deep", [True, False])
def test_no_step_is_of_what_may_wait_alone_beside_others(deep: bool) -> None:
    """It is shallow, and one that may not wait is `deep`; where it is the other way round, the shallow ones have such steps."""
    h = Harness(400, cost=(0.1, 0.001))
    for _ in range(WARM_UP):
        h.scheduler.pace.step(4, 8, 0.408)
    going = Sampling(max_tokens=60, ignore_eos=True)
    for token, depth in ((60, 1), (61, 1), (62, 4)):
        may = (depth == 1) == deep
        h.submit([token], depth, sampling=going, payer=str(may), priority=LATER if may else 0)
    for _ in range(30):
        h.step()
    assert any(shallow for shallow, _ in h.runner.spent) is not deep
