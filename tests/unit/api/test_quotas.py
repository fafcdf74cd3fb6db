"""Limits of a key hold for several gateways together, whoever of them or of what counts for them dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping

import pytest

from shoal.api import quotas
from shoal.api.auth import ApiKeys, Key
from shoal.api.quotas import SILENT_SECONDS, Held, Left, Quotas, Shared
from shoal.api.wire import RateLimitError

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no count that does not answer."""
    monkeypatch.setattr(quotas, "PATIENCE_SECONDS", 60.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """A link in whose calls arrive later, in their order; `cut` lets none arrive, `silent` none answer, and while `answers` is
    not set those that arrive are answered later."""

    def __init__(self, count: Quotas) -> None:
        self.count, self.cut, self.silent, self.calls = count, False, False, 0
        self.meanwhile: Callable[[], object] = lambda: None  # done while a call is on its way
        self.answers = asyncio.Event()
        self.answers.set()
        self._turn = asyncio.Lock()

    async def _arrive(self) -> None:
        self.calls += 1
        async with self._turn:
            await asyncio.sleep(0)
        self.meanwhile()
        if self.cut:
            raise ConnectionError("cut")
        if self.silent:
            await asyncio.Event().wait()

    async def join(self, gateway: str, held: Mapping[str, Held]) -> None:
        await self._arrive()
        self.count.join(gateway, held)

    async def admit(self, gateway: str, line: str) -> Left | None:
        await self._arrive()
        left = self.count.admit(gateway, line)
        await self.answers.wait()
        return left

    async def tell(self, gateway: str, spent: Mapping[str, int]) -> dict[str, Left] | None:
        await self._arrive()
        told = self.count.tell(gateway, spent)
        await self.answers.wait()
        return told

    def come(self, gateway: str, line: str) -> None:
        if not self.cut and not self.silent:
            asyncio.get_running_loop().call_soon(self.count.come, gateway, line)

    def leave(self, gateway: str, line: str) -> None:
        if not self.cut and not self.silent:
            asyncio.get_running_loop().call_soon(self.count.leave, gateway, line)

    def refund(self, gateway: str, line: str) -> None:
        if not self.cut and not self.silent:
            asyncio.get_running_loop().call_soon(self.count.refund, gateway, line)


class Gateways:
    """So many, with one line of keys: `keys[i]` is the key at the ith, `shared[i]` what counts there."""

    def __init__(self, line: str, number: int = 2) -> None:
        self.clock = Clock()
        self.wire = Wire(Quotas(self.clock))
        self.shared = [Shared(self.wire, f"gateway-{i}") for i in range(number)]
        all_keys = [ApiKeys([line], clock=self.clock, shared=shared) for shared in self.shared]
        self.keys = [keys.find(f"Bearer {line.split()[0]}") for keys in all_keys]

    @property
    def running(self) -> int:
        return sum(key.places.taken for key in self.keys if key.places is not None)

    async def report(self) -> None:
        for shared in self.shared:
            shared._told = -1000.0  # it is time
            await shared.report()


async def admitted(key: Key, times: int = 1) -> int:
    """How many of so many requests are."""
    answers = await asyncio.gather(*(key.admitted() for _ in range(times)), return_exceptions=True)
    assert all(answer is None or isinstance(answer, RateLimitError) for answer in answers), answers
    return sum(answer is None for answer in answers)


async def test_never_more_at_once_than_a_key_may_at_all_gateways_together() -> None:
    """Requests come and go at three gateways, in a random order; whoever is refused was refused by a full key."""
    gateways, most = Gateways("alpha at_once=4", 3), 0
    draw = random.Random(5)

    async def client(key: Key) -> tuple[int, int]:
        nonlocal most
        taken = refused = 0
        for _ in range(40):
            try:
                await key.admitted()
            except RateLimitError as error:
                assert "4 at once" in error.message
                refused += 1
                continue
            most, taken = max(most, gateways.running), taken + 1
            for _ in range(draw.randrange(8)):
                await asyncio.sleep(0)
            key.leave()
        return taken, refused

    found = await asyncio.gather(*(client(key) for key in gateways.keys for _ in range(4)))
    assert most == 4 and gateways.running == 0
    assert sum(taken for taken, _ in found) >= 40 and sum(refused for _, refused in found) > 0
    await gateways.report()
    assert [await admitted(key, 2) for key in gateways.keys] == [2, 2, 0], "no place was lost on the way"


async def test_a_minute_of_requests_is_one_minute_wherever_they_go() -> None:
    gateways = Gateways("alpha requests=5")
    assert [await admitted(key, 3) for key in gateways.keys] == [3, 2]
    headers = gateways.keys[1].headers()
    assert headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(RateLimitError, match="too many requests with this key") as refused:
        await gateways.keys[0].admitted()
    assert refused.value.retry_after == pytest.approx(12)
    gateways.clock.now += 12
    assert [await admitted(key, 2) for key in gateways.keys] == [1, 0]


async def test_tokens_that_one_gateway_writes_are_gone_at_the_other() -> None:
    gateways = Gateways("alpha tokens=100")
    one, other = gateways.keys
    assert await admitted(one) == await admitted(other) == 1
    one.spend(70)
    await gateways.report()
    assert other.headers()["x-ratelimit-remaining-tokens"] == "30"
    other.spend(70)
    await gateways.report()
    assert await admitted(one) == await admitted(other) == 0
    assert other.tokens is not None and other.tokens.level == pytest.approx(-40)


async def test_batches_leave_to_others_what_runs_at_another_gateway() -> None:
    gateways = Gateways("alpha at_once=4")
    assert gateways.keys[1].spare(0.5) == 0
    assert await admitted(gateways.keys[0], 2) == 2 and await admitted(gateways.keys[1]) == 1
    assert gateways.keys[1].spare(0.5) > 0
    for _ in range(2):
        gateways.keys[0].leave()
    await asyncio.sleep(0)
    await gateways.report()
    assert gateways.keys[1].spare(0.5) == 0


async def test_batches_hear_of_ends_elsewhere_though_nothing_runs_here() -> None:
    gateways = Gateways("alpha at_once=4")
    one, other = gateways.keys
    assert await admitted(one, 2) == 2 and await admitted(other) == 1
    other.leave()
    await asyncio.sleep(0)
    await gateways.report()
    assert other.spare(0.5) > 0
    for _ in range(2):
        one.leave()
    await asyncio.sleep(0)
    await gateways.report()
    assert other.spare(0.5) == 0


async def test_what_a_gateway_held_is_free_once_it_is_dead() -> None:
    gateways = Gateways("alpha at_once=2")
    assert await admitted(gateways.keys[0], 2) == 2
    assert await admitted(gateways.keys[1]) == 0
    gateways.clock.now += SILENT_SECONDS + 1
    assert await admitted(gateways.keys[1], 2) == 2


async def test_a_gateway_that_was_taken_for_dead_brings_what_it_holds() -> None:
    gateways = Gateways("alpha at_once=2")
    assert await admitted(gateways.keys[0], 2) == 2
    gateways.clock.now += SILENT_SECONDS + 1
    await gateways.report()
    assert await admitted(gateways.keys[1]) == 0


async def test_a_count_that_starts_anew_goes_on_where_the_other_was() -> None:
    """Places are known again once each gateway has reported, and no minute is filled up."""
    gateways = Gateways("alpha at_once=3 requests=9 tokens=50")
    assert [await admitted(key) for key in gateways.keys] == [1, 1]
    gateways.keys[0].spend(15)
    await gateways.report()
    gateways.keys[0].spend(5)  # it was never told of these
    gateways.wire.count = Quotas(gateways.clock)
    await gateways.report()
    assert gateways.keys[1].headers()["x-ratelimit-remaining-requests"] == "7"
    assert gateways.keys[1].headers()["x-ratelimit-remaining-tokens"] == "30"
    assert await admitted(gateways.keys[1], 5) == 1
    for key in (gateways.keys[0], gateways.keys[1], gateways.keys[1]):
        key.leave()
    await asyncio.sleep(0)
    assert await admitted(gateways.keys[0], 5) == 3


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_without_the_count_each_gateway_keeps_the_limits_by_itself(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer is waited for once, and not by each request. When it is back, all is counted together again."""
    gateways = Gateways("alpha at_once=2 requests=100")
    assert [await admitted(key) for key in gateways.keys] == [1, 1]
    monkeypatch.setattr(quotas, "PATIENCE_SECONDS", 0.05)
    setattr(gateways.wire, how, True)
    assert [await admitted(key, 3) for key in gateways.keys] == [1, 1]
    calls = gateways.wire.calls
    assert [await admitted(key, 3) for key in gateways.keys] == [0, 0]
    assert gateways.wire.calls == calls
    gateways.keys[0].leave()
    assert await admitted(gateways.keys[0]) == 1
    setattr(gateways.wire, how, False)
    monkeypatch.setattr(quotas, "PATIENCE_SECONDS", 60.0)
    await gateways.report()
    for _ in range(2):
        gateways.keys[0].leave()
    await asyncio.sleep(0)
    assert await admitted(gateways.keys[0]) == 0, "two run at the other"
    gateways.keys[1].leave()
    await asyncio.sleep(0)
    assert await admitted(gateways.keys[0], 3) == 1
    assert gateways.keys[0].requests is not None and gateways.keys[0].requests.level <= 96


async def test_a_client_that_leaves_while_it_is_counted_takes_no_place_along() -> None:
    gateways = Gateways("alpha at_once=1")
    asked = asyncio.create_task(gateways.keys[0].admitted())
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    for _ in range(20):
        await asyncio.sleep(0)
    assert await admitted(gateways.keys[1]) == 1


async def test_a_request_that_comes_just_before_the_end_of_another_is_not_refused() -> None:
    """A client that has read the last word of its answer may ask another gateway before its own has told the count."""
    gateways = Gateways("alpha at_once=1")
    await gateways.keys[1].admitted()
    gateways.keys[1].leave()
    await asyncio.sleep(0)
    assert await admitted(gateways.keys[0]) == 1
    calls = gateways.wire.calls

    def end() -> None:
        if gateways.wire.calls == calls + 2:  # the first found no place
            gateways.wire.count.leave("gateway-0", gateways.keys[0].line)

    gateways.wire.meanwhile = end
    await gateways.keys[1].admitted()
    assert gateways.wire.calls == calls + 2


async def test_a_key_without_limits_is_never_asked_about_and_one_that_is_whole_is_forgotten() -> None:
    free, limited = Gateways("alpha"), Gateways("beta requests=60 at_once=2")
    assert await admitted(free.keys[0], 5) == 5
    assert free.wire.calls == 0
    assert await admitted(limited.keys[0]) == 1
    limited.keys[0].leave()
    await asyncio.sleep(0)
    limited.clock.now += 2
    await limited.report()
    assert not limited.shared[0]._known and not limited.wire.count._keys


async def test_a_lasting_load_is_told_of_by_the_task_beside_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "TELL_SECONDS", 0.001)
    gateways = Gateways("alpha tokens=100")
    tasks = [asyncio.create_task(shared.run()) for shared in gateways.shared]
    assert await admitted(gateways.keys[0]) == 1
    gateways.keys[0].spend(200)
    while await admitted(gateways.keys[1]):
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_what_ends_while_its_gateway_joins_holds_no_place_for_ever() -> None:
    """Whether the count forgot the gateway, or did not answer for a while: its place is free once it has joined."""
    for cut in (False, True):
        gateways = Gateways("alpha at_once=1")
        one, other = gateways.keys
        await gateways.report()
        assert await admitted(one) == 1
        if cut:
            gateways.wire.cut = True
            await gateways.report()
            gateways.wire.cut = False
        else:
            gateways.wire.count = Quotas(gateways.clock)

        def ends(shared: Shared = gateways.shared[0], key: Key = one) -> None:
            if shared._joining.locked() and key.places is not None and key.places.taken:
                key.leave()

        gateways.wire.meanwhile = ends
        await gateways.report()
        assert gateways.running == 0
        await gateways.report()
        assert await admitted(other) == 1


@pytest.mark.parametrize("ends", [False, True])
async def test_what_comes_while_its_gateway_joins_is_counted(ends: bool) -> None:
    """The count was away: until the gateway has joined it again it admits by itself, after it has said what it holds."""
    gateways = Gateways("alpha at_once=2 requests=10")
    one, other = gateways.keys
    assert await admitted(one) == 1
    gateways.wire.cut = True
    await gateways.report()
    gateways.wire.cut, gateways.shared[0]._told = False, -1000.0

    async with gateways.wire._turn:
        joining = asyncio.create_task(gateways.shared[0].report())
        await asyncio.sleep(0)
        assert gateways.shared[0]._joining.locked()
        await one.admitted()
        if ends:
            one.leave()
    await joining
    await asyncio.sleep(0)
    assert gateways.wire.count._taken(one.line) == gateways.running == 2 - ends
    assert await admitted(other, 2) == ends
    for key in (one,) if ends else (one, one):
        key.leave()
    await asyncio.sleep(0)
    assert await admitted(other, 3) == 2 - ends
    assert other.requests is not None and other.requests.level == 6


async def test_what_is_admitted_when_the_count_is_lost_is_told_though_a_report_forgot_the_key() -> None:
    gateways = Gateways("alpha at_once=1")
    one, other = gateways.keys
    assert await admitted(one) == 1
    one.leave()
    await asyncio.sleep(0)

    def lose() -> None:
        gateways.shared[0]._known.clear()  # as a report does that comes back meanwhile
        gateways.wire.cut = True

    gateways.wire.meanwhile = lose
    assert await admitted(one) == 1
    gateways.wire.meanwhile, gateways.wire.cut = lambda: None, False
    await gateways.report()
    assert await admitted(other) == 0


async def test_a_report_that_crosses_a_request_does_not_make_it_unknown() -> None:
    """A count that starts anew is told of it."""
    gateways = Gateways("alpha at_once=1")
    one, other = gateways.keys
    await gateways.report()
    assert await admitted(one) == 1
    one.leave()
    gateways.shared[0]._told = -1000.0
    reported, asked = asyncio.create_task(gateways.shared[0].report()), asyncio.create_task(one.admitted())
    await asyncio.gather(reported, asked)
    gateways.wire.count = Quotas(gateways.clock)
    await gateways.report()
    assert await admitted(other) == 0


async def on_its_way(gateways: Gateways, call: Coroutine[object, object, None]) -> asyncio.Task[None]:
    """`call`, which the count has heard and whose answer has not come: meanwhile the count is lost, and its gateway alone."""
    gateways.wire.answers.clear()
    calls, task = gateways.wire.calls, asyncio.create_task(call)
    while gateways.wire.calls == calls:
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    gateways.wire.cut = True
    return task


async def test_an_answer_that_comes_when_the_count_was_given_up_admits_no_more_than_a_key_may() -> None:
    gateways = Gateways("alpha at_once=2")
    one, _ = gateways.keys
    await gateways.shared[0].begin()
    late = await on_its_way(gateways, one.admitted())
    assert await admitted(one, 3) == 2
    gateways.wire.answers.set()
    with pytest.raises(RateLimitError):
        await late
    assert gateways.running == 2


async def test_a_request_that_the_count_forgot_when_its_gateway_joined_again_is_counted() -> None:
    """Its answer comes after that."""
    gateways = Gateways("alpha at_once=3")
    one, other = gateways.keys
    await gateways.shared[0].begin()
    late = await on_its_way(gateways, one.admitted())
    assert await admitted(one) == 1
    gateways.wire.cut = False
    reporting = asyncio.create_task(gateways.report())
    while gateways.shared[0]._alone:
        await asyncio.sleep(0)
    gateways.wire.answers.set()
    await asyncio.gather(late, reporting)
    assert gateways.wire.count._taken(one.line) == gateways.running == 2
    assert await admitted(other, 3) == 1


async def test_what_is_told_late_gives_back_nothing_that_was_spent_alone() -> None:
    gateways = Gateways("alpha requests=5")
    one, other = gateways.keys
    assert await admitted(one) == 1
    gateways.shared[0]._told = -1000.0
    late = await on_its_way(gateways, gateways.shared[0].report())
    assert await admitted(one, 2) == 2
    gateways.wire.cut = False
    gateways.wire.answers.set()
    await late
    await gateways.report()
    assert await admitted(other, 5) == 2


async def test_what_is_refused_after_it_was_counted_counts_at_no_gateway() -> None:
    both = Gateways("k requests=3 tokens=100")
    for _ in range(9):
        await both.keys[0].admitted()
        both.keys[0].spend(90)
        await both.report()
        both.keys[0].refund(90)
        await both.report()
    assert await admitted(both.keys[1], 4) == 3
