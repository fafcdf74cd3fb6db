"""Whatever of the count arrives late or is answered late: a key has no more than its limits at a gateway, no place is lost, and
none is taken for ever. In a time of its own, which passes as soon as nobody has anything to do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pytest

from shoal.api import quotas
from shoal.api.auth import ApiKeys, Key
from shoal.api.quotas import PATIENCE_SECONDS, Held, Left, Quotas, Shared
from shoal.api.wire import RateLimitError
from tests.clocks import tells

pytestmark = pytest.mark.anyio

T = TypeVar("T")

assert PATIENCE_SECONDS == 1.0, "the tests' times are made for it"


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def at_once(timeout: float | None) -> object:
            assert timeout is not None, "all wait for each other"
            self.now += max(0.0, timeout)
            return select(0)

        selector.select = at_once

    def time(self) -> float:
        return self.now


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, type[Loop]]]:
    return "asyncio", {"loop_factory": Loop}


@pytest.fixture(autouse=True)
async def in_time(anyio_backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop)
    tells(monkeypatch, quotas.__name__, monotonic=loop.time)


class Link:
    """Calls arrive in the order in which they are made, `there` seconds later at least, and are answered `back` seconds after
    that; a join looks for the count first, for `finding` seconds."""

    def __init__(self, count: Quotas) -> None:
        self.count, self.there, self.back, self.finding = count, 0.001, 0.001, 0.0
        self._last = 0.0

    async def join(self, gateway: str, held: Mapping[str, Held]) -> None:
        await asyncio.sleep(self.finding)
        await self._call(lambda: self.count.join(gateway, held))

    async def admit(self, gateway: str, line: str) -> Left | None:
        return await self._call(lambda: self.count.admit(gateway, line))

    async def tell(self, gateway: str, spent: Mapping[str, int]) -> dict[str, Left] | None:
        return await self._call(lambda: self.count.tell(gateway, spent))

    def come(self, gateway: str, line: str) -> None:
        self._call(lambda: self.count.come(gateway, line))

    def leave(self, gateway: str, line: str) -> None:
        self._call(lambda: self.count.leave(gateway, line))

    def refund(self, gateway: str, line: str) -> None:
        self._call(lambda: self.count.refund(gateway, line))

    def _call(self, do: Callable[[], T]) -> asyncio.Future[T]:
        loop, back = asyncio.get_running_loop(), self.back
        answer: asyncio.Future[T] = loop.create_future()
        self._last = max(self._last + 1e-6, loop.time() + self.there)

        def arrive() -> None:
            found = do()
            loop.call_later(back, lambda: answer.done() or answer.set_result(found))

        loop.call_at(self._last, arrive)
        return answer


class Service:
    """Two gateways."""

    def __init__(self, line: str) -> None:
        self._clock = asyncio.get_running_loop().time
        self.count = Quotas(self._clock)
        self.links = [Link(self.count), Link(self.count)]
        self.shared = [Shared(link, f"gateway-{i}") for i, link in enumerate(self.links)]
        found = [ApiKeys([line], clock=self._clock, shared=shared) for shared in self.shared]
        self.keys = [keys.find(f"Bearer {line.split()[0]}") for keys in found]

    def anew(self) -> None:
        self.count = Quotas(self._clock)
        for link in self.links:
            link.count = self.count

    def report(self, number: int = 0) -> asyncio.Task[None]:
        self.shared[number]._told = 0.0  # it is time
        return asyncio.create_task(self.shared[number].report())

    def ask(self, back: float) -> asyncio.Task[bool]:
        """Of the first gateway, whether a request is admitted that the count answers after so many seconds."""
        self.links[0].back = back
        return asyncio.create_task(is_admitted(self.keys[0]))

    @property
    def running(self) -> list[int]:
        return [key.places.taken for key in self.keys if key.places is not None]

    @property
    def taken(self) -> int:
        """What the count knows of."""
        return self.count._taken(self.keys[0].line)


async def begun(line: str) -> Service:
    """Its gateways have joined."""
    service = Service(line)
    for shared in service.shared:
        await shared.begin()
    return service


async def is_admitted(key: Key) -> bool:
    try:
        await key.admitted()
    except RateLimitError:
        return False
    return True


async def test_tokens_of_a_gateway_that_was_alone_are_charged_once() -> None:
    service = await begun("alpha tokens=1000")
    one, other = service.keys
    asked = service.ask(5)
    await asyncio.sleep(1.01)
    assert await asked and service.shared[0]._alone
    service.links[0].back = 0.001
    one.spend(300)
    await service.report()
    await is_admitted(other)
    assert [key.tokens and round(key.tokens.level) for key in (one, other)] == [700, 700]


@pytest.mark.parametrize("seed", range(4))
async def test_no_weather_gives_a_key_more_or_keeps_a_place(seed: int) -> None:
    """Answers come late and in any order, clients leave while they are asked about, and the count starts anew now and then.
    When it is quiet again, all is counted together."""
    draw, loop = random.Random(seed), asyncio.get_running_loop()
    service, most = await begun("alpha at_once=6"), 6
    tasks = [asyncio.create_task(shared.run()) for shared in service.shared]
    quiet, end = loop.time() + 14, loop.time() + 22
    admitted = 0

    async def weather() -> None:
        while loop.time() < end:
            await asyncio.sleep(0.01)
            late, lost = (0.002, 0.0) if loop.time() > quiet else (0.3, 0.002)
            for link in service.links:
                link.there, link.back, link.finding = (late * draw.random() for _ in range(3))
                if draw.random() < lost:
                    link._last = max(link._last, loop.time()) + 1.5  # nothing arrives for a while
            if draw.random() < lost:
                service.anew()

    async def client(key: Key) -> None:
        nonlocal admitted
        while loop.time() < end:
            await asyncio.sleep(draw.random() * 0.2)
            asked = asyncio.create_task(is_admitted(key))
            await asyncio.wait([asked], timeout=draw.random() * 0.5 if draw.random() < 0.1 else None)
            asked.cancel()
            if (await asyncio.gather(asked, return_exceptions=True))[0] is not True:
                continue
            admitted += 1
            assert max(service.running) <= most and (loop.time() < end - 3 or sum(service.running) <= most)
            await asyncio.sleep(draw.random() * 1.5)
            key.leave()

    await asyncio.gather(weather(), *(client(key) for key in service.keys for _ in range(8)))
    await asyncio.sleep(3)
    assert service.running == [0, 0] and service.taken == 0 and admitted > 100
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
