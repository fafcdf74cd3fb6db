"""Limits of a key hold for several gateways together, whoever of them or of what counts for them dies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

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
    """A link in whose calls arrive later, in their order; `cut` lets none arrive, `silent` none answer."""

    def __init__(self, count: Quotas) -> None:
        self.count, self.cut, self.silent, self.calls = count, False, False, 0
        self.meanwhile: Callable[[], object] = lambda: None  # done while a call is on its way
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
        return self.count.admit(gateway, line)

    async def tell(self, gateway: str, spent: Mapping[str, int]) -> dict[str, Left] | None:
        await self._arrive()
        return self.count.tell(gateway, spent)

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


async def test_what_is_refused_after_it_was_counted_counts_at_no_gateway() -> None:
    both = Gateways("k requests=3 tokens=100")
    for _ in range(9):
        await both.keys[0].admitted()
        both.keys[0].spend(90)
        await both.report()
        both.keys[0].refund(90)
        await both.report()
    assert await admitted(both.keys[1], 4) == 3
