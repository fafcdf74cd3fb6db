"""What a gateway and a replica do to have an adapter where it is asked for, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from shoal import Request
from shoal.api.serve_args import ServeArgs
from shoal.errors import CheckpointError, DataError, EngineDeadError
from shoal.on_ray.calls import OtherModelError, Wanted
from shoal.on_ray.clients import ReplicaClient
from shoal.on_ray.replica_adapters import ReplicaAdapters

Do = Callable[..., object]  # method and what it is given -> what it answers, or raises


@dataclass
class Handle:
    """A deployment handle of `replicas`; `asked` are the calls of all."""

    replicas: list[Do]
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)

    app_name, deployment_name = "app", "adapted"

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def load_adapter(self) -> Handle:
        return self

    def remote(self, given: Any, wanted: Wanted | None = None) -> Any:
        if wanted is not None:
            self.wanted.append(wanted)
            raise EngineDeadError("it ends here")
        return self._call(0, "load_adapter", given)

    def broadcast(self, method: str, *given: Any) -> Handle:
        self.results = [Result(self._call(number, method, *given)) for number in range(len(self.replicas))]
        return self

    async def _fetch_replica_results_async(self) -> list[Result]:
        return self.results

    async def _call(self, number: int, method: str, *given: Any) -> Any:
        self.asked.append((number, method, *given))
        answer = self.replicas[number](method, *given)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass
class Result:
    answer: Coroutine[Any, Any, Any]

    async def get_async(self) -> Any:
        return await self.answer


def says(answer: object) -> Do:
    return lambda method, *given: answer if method == "load_adapter" or isinstance(answer, ActorDiedError) else None


def loaded(*replicas: Do) -> tuple[str | Exception, Handle, ReplicaClient]:
    """What loading "dir" gave, where "old" is served already."""
    handle = Handle([*replicas])
    client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
    client.know({"old": "there"})

    async def load() -> str | Exception:
        try:
            return await client.load_adapter("dir")
        except Exception as error:
            return error

    return asyncio.run(asyncio.wait_for(load(), 60)), handle, client


def test_every_replica_loads_it_before_it_is_known() -> None:
    answer, handle, client = loaded(says("new"), says("new"))
    assert answer == "new" and client._place("new") == ("new", "dir")
    assert handle.asked == [(0, "load_adapter", "dir"), (0, "load_adapter", "dir"), (1, "load_adapter", "dir")]


def test_one_that_is_lost_does_not_keep_the_others_from_it() -> None:
    answer, _, client = loaded(says("new"), says(ActorDiedError()))
    assert answer == "new" and client._place("new") == ("new", "dir")


@pytest.mark.parametrize(
    ("second", "message"), [(CheckpointError("it is broken"), "it is broken"), ("other", "changed while it was loaded")]
)
def test_where_one_refuses_it_nobody_is_asked_for_it(second: object, message: str) -> None:
    """That all drop it is `Adapters`' to say, which knows what other gateways hold (tests/unit/api/test_gateways_adapters)."""
    answer, _, client = loaded(says("new"), says(second))
    assert isinstance(answer, CheckpointError) and message in answer.message
    assert client._place("new") == ("new", "")


def test_a_call_says_which_adapter_it_wants_and_from_where() -> None:
    handle = Handle([])
    client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
    client.know({"old": "there"})

    async def ask(identity: str) -> None:
        async for _ in client._open(Request("x", adapter=identity), Wanted("call", "r")):
            pass

    for identity in ("old", "gone", ""):
        with pytest.raises(EngineDeadError):
            asyncio.run(ask(identity))
    assert [wanted.adapter for wanted in handle.wanted] == [("old", "there"), ("gone", ""), ("", "")]


class Engine:
    """An engine that has `known`, and that finds `there` in every directory."""

    def __init__(self, known: str, there: str) -> None:
        self.known, self.there, self.loads = {known}, there, 0
        self.fails: Exception | None = None

    async def keep_adapters(self, known: dict[str, str], held: dict[str, str]) -> None:
        self.known &= {*known, *held}

    def knows_adapter(self, identity: str) -> bool:
        return identity in self.known

    async def load_adapter(self, directory: str, identity: str) -> str:
        self.loads += 1
        await asyncio.sleep(0)  # others come meanwhile
        if self.fails is not None:
            raise self.fails
        if identity != self.there:
            raise CheckpointError(f"{directory} is not what was loaded from there before")
        self.known.add(identity)
        return identity


def with_adapter(engine: Engine, identity: str, directory: str, times: int = 1) -> None:
    adapters = ReplicaAdapters(ServeArgs(model="m"), "mine")

    async def ask() -> None:
        await asyncio.gather(*(adapters.need(engine, identity, directory) for _ in range(times)))  # type: ignore[arg-type]

    asyncio.run(ask())


def test_a_replica_loads_what_it_lacks_once_however_many_ask() -> None:
    engine = Engine("a", "b")
    with_adapter(engine, "a", "dir")
    with_adapter(engine, "", "")
    with_adapter(engine, "gone", "")  # the engine itself refuses it
    assert engine.loads == 0
    with_adapter(engine, "b", "dir", times=3)
    assert engine.loads == 1 and engine.known == {"a", "b"}


def test_a_replica_that_finds_something_else_there_is_not_the_one_to_ask() -> None:
    with pytest.raises(OtherModelError) as caught:
        with_adapter(Engine("a", "c"), "b", "dir")
    assert caught.value.replica == "mine"


def test_where_its_place_does_not_answer_another_replica_is_asked() -> None:
    engine = Engine("a", "b")
    engine.fails = DataError("s3://ocean/b: S3 does not answer")
    with pytest.raises(OtherModelError, match="cannot be read now") as caught:
        with_adapter(engine, "b", "s3://ocean/b")
    assert caught.value.replica == "mine"


def test_a_replica_hears_the_newest_of_what_several_gateways_tell_it() -> None:
    """One tells what it knew before the other made "b" known: had it come first, "b" would be there all the same."""
    engine, adapters = Engine("a", "b"), ReplicaAdapters(ServeArgs(model="m"), "mine")

    async def hear() -> None:
        await adapters.keep(engine, {"b": "dir"}, ["a"], 2)  # type: ignore[arg-type]
        assert engine.known == {"a", "b"}, "who is known is loaded, who is held stays"
        await adapters.keep(engine, {"a": "old"}, [], 1)  # type: ignore[arg-type]
        assert engine.known == {"a", "b"}, "it is older"
        await adapters.keep(engine, {"b": "dir"}, [], 2)  # type: ignore[arg-type]
        assert engine.known == {"b"}
        engine.fails = DataError("s3://ocean/c: S3 does not answer")
        await adapters.keep(engine, {"b": "dir", "c": "s3://ocean/c"}, [], 3)  # type: ignore[arg-type]
        assert engine.known == {"b"}, "the others are served"

    asyncio.run(hear())
