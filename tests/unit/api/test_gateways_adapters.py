"""Adapters of a service that has several gateways: each an `Adapters`, over names that they share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from shoal.api import adapters
from shoal.api.adapter_names import Change, Known, State
from shoal.api.adapters import Adapters
from shoal.api.limits import Limits
from shoal.api.served import MOST_ADAPTERS, ServedModel
from shoal.api.service import Hosted, Service
from shoal.api.wire import ModelNotFoundError
from shoal.errors import CheckpointError, ConfigError, RequestError
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio

ROOT = "s3://ocean/adapters"


@dataclass
class Engines:
    """What all gateways' engines have: identity -> how often it was loaded."""

    has: dict[str, int] = field(default_factory=dict)
    at: int = 0


class Client(Scripted):
    def __init__(self, served: ServedModel, engines: Engines) -> None:
        super().__init__(served.tokenizer)
        self.engines, self.refuses = engines, ""

    async def load_adapter(self, directory: str) -> str:
        await asyncio.sleep(0)
        name = directory.rpartition("/")[2]
        self.engines.has[name] = self.engines.has.get(name, 0) + 1
        if self.refuses:
            raise CheckpointError(f"{directory}: {self.refuses}")
        return name

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        if at >= self.engines.at:
            self.engines.at = at
            self.engines.has = dict.fromkeys({**known, **held}, 1)


class Names:
    """`adapter_names.Names` of gateways in one process; `silent` is one that does not say what it holds."""

    def __init__(self) -> None:
        self.state, self.gateways, self.silent = State(), list[Adapters](), False
        self.meanwhile: list[Change] = []  # what others do before a change is kept

    async def get(self) -> State:
        await asyncio.sleep(0)
        return self.state

    async def change(self, change: Change) -> State:
        while True:
            before = self.state
            after = State(before.number + 1, before.at + 1, change(before.known))
            await asyncio.sleep(0)
            if self.meanwhile:
                self.state = State(before.number + 1, before.at + 1, self.meanwhile.pop()(before.known))
            if self.state is before:
                self.state = after
                return after

    def know(self, directories: Mapping[str, str]) -> None:
        self.told = dict(directories)

    async def elsewhere(self) -> Mapping[str, str] | None:
        held = [await gateway.look() for gateway in self.gateways]
        return None if self.silent else {name: place for each in held for name, place in each.items()}


@dataclass
class Gateway:
    service: Service
    adapters: Adapters
    client: Client

    @property
    def shown(self) -> list[str]:
        return [*self.service.names]


@pytest.fixture
def two(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Gateway, Gateway, Names, Engines]:
    monkeypatch.setattr(adapters, "LOOK_SECONDS", 0.0)
    names, engines = Names(), Engines()
    made = []
    for _ in range(2):
        client = Client(served, engines)
        service = Service([Hosted(served, client)], Limits())
        made.append(Gateway(service, Adapters(service, names.state, ROOT, names), client))
        names.gateways.append(made[-1].adapters)
    return made[0], made[1], names, engines


Two = tuple[Gateway, Gateway, Names, Engines]


async def idle(gateway: Gateway) -> None:
    """Waits until it has nothing left to have dropped."""
    while (task := gateway.adapters._clearing) is not None and not task.done():
        await task


async def test_what_one_loads_or_drops_all_show_in_one_order(two: Two) -> None:
    one, other, _, engines = two
    await one.adapters.load("b", "b")
    await other.adapters.load("a", f"{ROOT}/a/")
    assert one.shown == other.shown == ["fish", "b", "a"]
    await other.adapters.load("b", "c", in_place=True)
    assert one.shown == other.shown == ["fish", "b", "a"] and [*engines.has] == ["c", "a"]
    await one.adapters.unload("a")
    assert one.shown == other.shown == ["fish", "b"] and [*engines.has] == ["c"]
    with pytest.raises(ModelNotFoundError):
        await other.adapters.unload("a")


async def test_of_two_that_load_one_name_at_once_one_is_refused(two: Two) -> None:
    one, other, names, engines = two
    names.meanwhile.append(lambda known: {**known, "a": Known("first", f"{ROOT}/first", 1)})
    with pytest.raises(RequestError, match="loaded already"):
        await one.adapters.load("a", "second")
    assert names.state.known["a"].identity == "first" and "second" not in engines.has
    await other.adapters.look()
    assert one.shown == other.shown == ["fish", "a"]
    together = await asyncio.gather(
        *(gateway.adapters.load(f"b{at}", "b") for at in range(MOST_ADAPTERS) for gateway in (one, other)),
        return_exceptions=True,
    )
    assert len(names.state.known) == MOST_ADAPTERS == sum(error is None for error in together) + 1


async def test_engines_keep_what_requests_at_another_gateway_hold(two: Two) -> None:
    one, other, names, engines = two
    await one.adapters.load("a", "a")
    asked = other.service.names["a"]
    asked.held += 1
    await one.adapters.unload("a")
    assert other.shown == ["fish"] and [*engines.has] == ["a"]
    assert names.told == {"a": f"{ROOT}/a"}, "its stream may have to go on at another replica"
    asked.held -= 1
    await idle(other)
    assert not engines.has


async def test_nothing_is_dropped_while_one_does_not_say_what_it_holds(two: Two) -> None:
    one, _, names, engines = two
    await one.adapters.load("a", "a")
    names.silent = True
    await one.adapters.unload("a")
    assert one.shown == ["fish"] and [*engines.has] == ["a"]
    names.silent = False
    await idle(one)
    assert not engines.has


async def test_who_was_not_told_looks_once_a_second(two: Two) -> None:
    one, other, names, _ = two
    names.gateways.remove(other.adapters)
    await one.adapters.load("a", "a")
    assert other.shown == ["fish"]
    task = asyncio.create_task(other.adapters.run())
    while other.shown == ["fish"]:
        await asyncio.sleep(0)
    names.state = State(1, 1, {"old": Known("old", "old", 1)})
    await other.adapters.look()
    names.get = None  # type: ignore[method-assign, assignment]
    for _ in range(5):
        await asyncio.sleep(0)
    assert other.shown == ["fish", "a"] and not task.done(), "what fails is looked at again"
    task.cancel()


@pytest.mark.parametrize(
    "path", ["", "/", ".", "../b", "a/../b", "/a", f"{ROOT}/", "s3://other/a", "s3://ocean/adapters2/a"]
)
async def test_of_a_bucket_only_what_lies_below_the_address_is_loaded(two: Two, path: str) -> None:
    one, _, names, engines = two
    with pytest.raises(RequestError, match="lora_path"):
        await one.adapters.load("a", path)
    assert not names.state.known and not engines.has


def test_an_address_that_is_none_is_refused_at_the_start(served: ServedModel) -> None:
    service = Service([Hosted(served, Scripted(served.tokenizer))], Limits())
    with pytest.raises(ConfigError, match="URI"):
        Adapters(service, None, "s3://")
    with pytest.raises(ConfigError, match="adapters_from"):
        Adapters(service, None, "nowhere")
