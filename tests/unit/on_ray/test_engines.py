"""What lies between Serve and an engine, without a cluster: an end of a stream that is an error, and whose fault it is."""

from __future__ import annotations

import asyncio
import shutil
import threading
import traceback
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import grpc
import pytest
import torch

pytest.importorskip("ray")

from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from shoal import Model, Request, presets
from shoal.api.serve_args import ServeArgs
from shoal.data import models
from shoal.engine.events import Event, Finished, Token
from shoal.engine.metrics import Samples, sample
from shoal.errors import EngineDeadError, EnginesLostError, QueueFullError, RequestError, ShoalError
from shoal.on_ray.calls import Begun, OtherModelError, Wanted
from shoal.on_ray.clients import ReplicaClient, as_shoal_error
from shoal.on_ray.engines import LEAVE_SECONDS, EngineReplica
from shoal.on_ray.failover import LOSSES, unbroken
from tests.s3 import service

WANTED = Wanted("call", "")


class Handle:
    """A deployment handle whose streams say "a" and then end with `error`, or never end."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.cancelled = error, 0

    app_name, deployment_name = "app", "engines"

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: Request, wanted: Wanted) -> Handle:
        self.request = request
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self) -> AsyncGenerator[list[Event], None]:
        yield [Token(self.request.id, 65, "a")]
        if self.error is None:
            await asyncio.Event().wait()
        else:
            raise self.error


def stream(handle: Handle) -> AsyncGenerator[list[Event], None]:
    client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
    return client._open(Request("x"), WANTED)


def test_an_error_comes_after_what_was_said_before_it() -> None:
    async def read() -> list[Event]:
        said = list[Event]()
        with pytest.raises(RequestError, match="no"):
            async for events in stream(Handle(RequestError("no"))):
                said += events
        return said

    assert len(asyncio.run(read())) == 1


def test_a_replica_that_cancels_its_own_work_is_lost() -> None:
    """Serve sends that as the CancelledError which it was there, and here nobody is cancelled."""

    async def read() -> None:
        with pytest.raises(EngineDeadError, match="lost"):
            async for _ in stream(Handle(asyncio.CancelledError())):
                pass

    asyncio.run(read())


def test_who_leaves_or_is_cancelled_cancels_the_replica_s_work() -> None:
    async def leave() -> int:
        handle = Handle(None)
        events = stream(handle)
        await anext(events)
        await events.aclose()
        return handle.cancelled

    async def be_cancelled() -> int:
        handle = Handle(None)
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in stream(handle):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle.cancelled

    assert asyncio.run(leave()) == 1
    assert asyncio.run(be_cancelled()) == 1


class Embedder:
    """A deployment handle whose calls end as `ends` says: a vector for each prompt, an error, or never."""

    def __init__(self, *ends: list[float] | BaseException | None) -> None:
        self.ends, self.calls, self.embed = ends, 0, self
        self.left = 0  # calls that were cancelled

    app_name, deployment_name = "app", "engines"

    def options(self, **_: Any) -> Embedder:
        return self

    def remote(self, prompts: list[list[int]], depth: str | int, wanted: Wanted, *whose: str) -> Called:
        return Called(self, asyncio.ensure_future(self._answer(len(prompts))))

    async def _answer(self, count: int) -> tuple[str, list[list[float]]]:
        end = self.ends[self.calls]
        self.calls += 1
        if end is None:
            await asyncio.Event().wait()
        if isinstance(end, BaseException):
            raise end
        assert end is not None
        return "weights", [end] * count


class Called:
    """What Serve gives of a call: to leave it does not end it, `cancel` does."""

    def __init__(self, of: Embedder, answer: asyncio.Future[tuple[str, list[list[float]]]]) -> None:
        self.of, self.answer = of, answer

    def __await__(self) -> Any:
        return asyncio.shield(self.answer).__await__()

    def cancel(self) -> None:
        self.of.left += 1
        self.answer.cancel()


def embedded(handle: Embedder) -> list[list[float]]:
    client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
    told: list[str] = []
    vectors = asyncio.run(asyncio.wait_for(client.embed([[1, 2], [3]], on_begun=told.append), 60))
    assert told == ["weights"], "who answered, and nobody that was lost"
    return vectors


def test_an_embedding_whose_replica_is_lost_is_asked_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.on_ray.clients.PAUSES", (0.0,) * 5)
    for lost in (ActorDiedError(), asyncio.CancelledError()):
        handle = Embedder(lost, [0.5])
        assert embedded(handle) == [[0.5], [0.5]]
        assert handle.calls == 2, "one replica gives all vectors of a call"
    refused = EngineDeadError("dead")
    refused.taken = False
    assert embedded(Embedder(ActorDiedError(), refused, refused, [0.5])) == [[0.5], [0.5]], "two had nothing of it"
    for error, calls in ((ActorDiedError(), LOSSES), (refused, 5), (RequestError("depth"), 1)):
        handle = Embedder(*[error] * 5)
        with pytest.raises(RequestError):
            embedded(handle)
        assert handle.calls == calls


def test_who_leaves_is_embedded_nowhere_else_and_no_longer() -> None:
    async def leave() -> tuple[int, int]:
        handle = Embedder(None)
        client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.embed([[1]]), 0.01)
        return handle.calls, handle.left

    assert asyncio.run(leave()) == (1, 1)


@pytest.mark.parametrize(
    ("raised", "wanted"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=9), QueueFullError("")),
        (ActorDiedError(), EngineDeadError("the engine replica was lost")),
        (
            AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata()),
            EngineDeadError("the engine replica was lost"),
        ),
        (
            RayTaskError("generate", "trace", KeyError("bug")),
            EngineDeadError("the engine replica failed", got="KeyError"),
        ),
        (KeyError("bug"), EngineDeadError("the engine replica failed", got="KeyError")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_call_raises_has_its_http_status(raised: Exception, wanted: ShoalError) -> None:
    found = as_shoal_error(raised)
    assert type(found) is type(wanted)
    assert found.message.startswith(wanted.message)


class Replica(EngineReplica):
    def __del__(self) -> None:  # type: ignore[override]  # else a coroutine, which only Serve awaits
        pass


def test_a_bug_is_told_without_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    """Serve logs what a replica raises, with all that led to it."""
    words = ["my", "secret"]

    class Buggy:
        async def batches(self, *_: Any) -> AsyncGenerator[list[Event], None]:
            yield [Token("r", 65, "a")]
            raise KeyError(" ".join(words))

        async def embed(self, *_: Any, **whose: str) -> list[float]:
            raise KeyError(" ".join(words))

    replica = Replica(ServeArgs(model="m"), "m")
    replica._engine = Buggy()  # type: ignore[assignment]

    async def read() -> None:
        async for _ in replica.generate(Request("x"), WANTED):
            pass

    for work in (read, lambda: replica.embed([[1]], "full", WANTED)):
        caplog.clear()
        with pytest.raises(EngineDeadError, match="KeyError") as caught:
            asyncio.run(work())
        assert "my secret" not in "".join(traceback.format_exception(caught.value))
        assert "KeyError" in caplog.text and __file__ in caplog.text and "my secret" not in caplog.text


@pytest.mark.parametrize(("taken", "calls"), [(True, LOSSES), (False, 3)])
def test_an_engine_that_raises_its_death_before_any_event_had_the_request(
    taken: bool, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's does, which may have ended by the prompt. One that was dead before had nothing of it."""
    monkeypatch.setattr("shoal.on_ray.failover.PAUSES", (0.0,))
    asked = list[str]()

    class Dying:
        async def batches(self, request: Request, gap: object) -> AsyncGenerator[list[Event], None]:
            asked.append(request.id)
            if len(asked) == 3:
                yield [Finished(request.id, "length")]
                return
            error = EngineDeadError("the vLLM process ended")
            error.taken = taken
            raise error

    replica = Replica(ServeArgs(model="m"), "m")
    replica._engine, replica._weights = Dying(), "w"  # type: ignore[assignment]

    async def read() -> list[Event]:
        return [event async for events in unbroken(replica.generate, Request("x")) for event in events]

    if taken:
        with pytest.raises(EnginesLostError, match="the vLLM process ended"):
            asyncio.run(read())
    else:
        assert len(asyncio.run(read())) == 1
    assert len(asked) == len({*asked}) == calls and not replica._running["w"]


def test_a_deployment_that_is_unavailable_had_nothing_of_a_request() -> None:
    error = as_shoal_error(DeploymentUnavailableError(DeploymentID("engines", "app")))
    assert isinstance(error, EngineDeadError) and not error.taken
    lost = as_shoal_error(ActorDiedError())
    assert isinstance(lost, EngineDeadError) and lost.taken and not OtherModelError("other").taken


def test_an_error_of_ours_stays_as_it_is() -> None:
    wrong = RequestError("depth", param="depth")
    assert as_shoal_error(RayTaskError("generate", "trace", wrong)) is wrong
    assert as_shoal_error(wrong) is wrong


class Asked:
    """A deployment handle whose replicas answer a broadcast with `answers`: a value, an error, or never."""

    app_name, deployment_name = "app", "engines"

    def __init__(self, *answers: object) -> None:
        self.answers, self.cancelled = answers, 0

    def options(self, **_: Any) -> Asked:
        return self

    def broadcast(self, method: str, *_: str) -> Asked:
        return self

    async def _fetch_replica_results_async(self) -> list[Answer]:
        return [Answer(self, answer) for answer in self.answers]


class Answer:
    def __init__(self, of: Asked, value: object) -> None:
        self.of, self.value = of, value

    async def get_async(self) -> object:
        try:
            if self.value is None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.of.cancelled += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (("well", None), None),  # one is silent
        ((ActorDiedError(), "well"), None),
        ((OtherModelError("another tokenizer"), ActorDiedError()), "another tokenizer"),
        ((None, None), "no engine replica answers"),
    ],
)
def test_a_model_is_served_while_any_replica_is_well(
    answers: tuple[object, ...], error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No question is taken back while it may be answered: a replica that wakes would tell each of them as an error."""
    if answers == (None, None):
        monkeypatch.setattr("shoal.on_ray.clients.ANSWER_SECONDS", 0.05)
    handle = Asked(*answers)

    async def ask() -> int:
        client = ReplicaClient(handle, may_be_none=False, reads="r")  # type: ignore[arg-type]
        if error is None:
            await client.check_health()
        else:
            with pytest.raises(EngineDeadError, match=error):
                await client.check_health()
        return handle.cancelled

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == 0


def test_where_no_replica_answers_a_scrape_says_none_and_what_this_gateway_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An alert on no replicas could not fire on a number that is missing, and a counter that is away begins anew."""
    monkeypatch.setattr(ReplicaClient, "_starting", AsyncMock(return_value={}))  # which asks Serve

    async def stats(resumed: int, *answers: object) -> Samples:
        handle: Any = Asked(*answers)
        client = ReplicaClient(handle, may_be_none=False, reads="r")
        client._resumed = resumed
        return await client.stats()

    none = asyncio.run(stats(3, ActorDiedError(), ActorDiedError()))
    assert none == {sample("num_replicas"): 0.0, sample("requests_resumed"): 3.0}
    running = sample("num_requests_running")
    one = asyncio.run(stats(0, ActorDiedError(), {running: 2.0}))
    assert one == {running: 2.0, sample("num_replicas"): 1.0, sample("requests_resumed"): 0.0}


class Engine:
    """As much of an engine as a replica needs to change its weights."""

    closed = False

    async def stats(self) -> dict[str, float]:
        return {}

    async def info(self) -> list[dict[str, str]]:
        return [{"quantization": "none"}]

    async def close(self) -> None:
        self.closed = True

    async def batches(self, request: Request, gap: object) -> AsyncGenerator[list[Event], None]:
        yield [Token(request.id, 65, "a")]
        yield [Finished(request.id, "length")]


class Changing(Replica):
    """Loads nothing, but refuses directories that are named so."""

    def _load(self, directory: str) -> Any:
        if "broken" in directory:
            raise MemoryError(directory)
        return Engine()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "broken")):
        Model.from_preset("test", seed=seed).save(root / name)
    return {name: str(root / name) for name in ("one", "two", "broken", "missing")}


async def changed(replica: EngineReplica, directory: str) -> None:
    """The weights of `directory` serve, or were refused."""
    await replica.reconfigure({"model": directory})
    while replica._changes:
        await asyncio.wait(replica._changes)


def test_a_replica_that_serves_is_told_of_other_weights_and_serves_on_while_they_load(
    directories: dict[str, str],
) -> None:
    """Serve sends it nothing before `reconfigure` returns; of what it is told meanwhile the last counts."""
    go_on, loaded = threading.Event(), list[str]()

    class Slow(Changing):
        def _load(self, directory: str) -> Any:
            loaded.append(directory)
            assert self._engine is None or go_on.wait(60)
            return super()._load(directory)

    async def answered_by(replica: EngineReplica) -> str:
        (begun, *_), *_ = [events async for events in replica.generate(Request("x"), anything(replica))]
        assert isinstance(begun, Begun)
        return begun.weights

    async def work() -> None:
        replica = Slow(ServeArgs(model=directories["one"]), directories["one"])
        await replica.reconfigure({"model": directories["one"]})
        first = replica._weights
        for name in ("two", "missing", "one", "two"):
            await replica.reconfigure({"model": directories[name]})
        assert await answered_by(replica) == first == (await replica.info())["weights"]
        assert (await replica.stats())["weights_loading"] == 1
        go_on.set()
        while replica._changes:
            await asyncio.wait(replica._changes)
        assert await answered_by(replica) == replica._weights != first
        stats = await replica.stats()
        assert (stats["weights_loading"], stats["weights_update_refused"]) == (0, 0)
        assert loaded == [directories["one"], directories["two"]]

    asyncio.run(work())


def test_a_change_that_fails_keeps_what_serves_and_is_told_until_it_is_mended(directories: dict[str, str]) -> None:
    async def work() -> None:
        replica = Changing(ServeArgs(model=directories["one"]), directories["one"])
        await changed(replica, directories["one"])
        first = replica._weights
        for slip in ("broken", "missing"):  # memory that is short raises no error of ours
            await changed(replica, directories[slip])
            assert (replica._weights, (await replica.stats())["weights_update_refused"]) == (first, 1)
        await changed(replica, directories["one"])  # what serves already
        assert (await replica.stats())["weights_update_refused"] == 0

    asyncio.run(work())


@pytest.mark.parametrize(
    "what", ["gone", "adapters", *(pytest.param(each, marks=pytest.mark.drill) for each in ("changed", "info"))]
)
def test_an_engine_that_is_loaded_and_then_not_taken_is_closed(
    what: str, directories: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads would hold its memory, of a GPU too, as long as the replica lives: and a release is tried again and again."""
    place, made = tmp_path / "model", list[Engine]()
    shutil.copytree(directories["two"], place)

    class Late(Changing):
        def _load(self, directory: str) -> Any:
            engine = super()._load(directory)
            if directory == str(place):
                made.append(engine)
                if what in ("gone", "changed"):
                    shutil.rmtree(place)
                if what == "changed":
                    shutil.copytree(directories["broken"], place)
                if what == "adapters":
                    replica._adapters.load_known = AsyncMock(side_effect=EngineDeadError("no store"))  # type: ignore[method-assign]
                if what == "info":
                    engine.info = AsyncMock(side_effect=EngineDeadError("dead"))
            return engine

    async def work() -> None:
        await changed(replica, directories["one"])
        first = replica._weights
        await changed(replica, str(place))
        assert (replica._weights, (await replica.stats())["weights_update_refused"]) == (first, 1)

    replica = Late(ServeArgs(model=directories["one"]), directories["one"])
    asyncio.run(work())
    assert [each.closed for each in made] == [True] and not cast(Engine, replica._serving).closed


def test_what_an_engine_that_left_had_of_a_gpu_is_given_back(
    directories: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once nothing holds it, also of weights that are refused: torch keeps it, and another process of that GPU has none."""
    made, given, go_on = list[weakref.ref[Any]](), list[int](), threading.Event()

    class Noted(Changing):
        def _load(self, directory: str) -> Any:
            engine = Engine()
            made.append(weakref.ref(engine))
            if "broken" in directory:
                raise MemoryError(engine)
            return engine

    class Slow:
        def put(self, directory: str) -> None:
            assert directory == directories["one"] or go_on.wait(20)

    def empty() -> None:
        given.append(sum(each() is not None for each in made))
        go_on.set()

    async def work() -> None:
        replica = Noted(ServeArgs(model=directories["one"]), directories["one"])
        replica._last = Slow()  # type: ignore[assignment]
        for name in ("one", "two", "broken"):
            await changed(replica, directories[name])
            while replica._ending:
                await asyncio.wait(replica._ending)
        assert given == [1, 1], "the engine that serves, and no other"

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    asyncio.run(work())


def test_weights_that_do_not_fit_a_gpu_are_refused_in_one_line(
    directories: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def on_gpu(model: Model, dtype: str) -> Model:
        if replicas[0]._engine is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return model

    async def work() -> None:
        args = ServeArgs(model=directories["one"], gpus=1, threads=1)
        replicas.append(Replica(args, directories["one"]))
        for name in ("one", "two"):
            await changed(replicas[0], directories[name])
        await replicas[0]._serving.close()

    replicas = list[Replica]()
    monkeypatch.setattr(Model, "on_gpu", on_gpu)
    asyncio.run(work())
    (line,) = [record.getMessage() for record in caplog.records if "stay as they are" in record.getMessage()]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in line and "gpu_share" in line and "\n" not in line


@pytest.mark.drill
def test_a_replica_serves_the_model_at_an_address_of_s3_and_the_one_that_takes_its_place(
    directories: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://ocean/model"

    async def work() -> None:
        replica = EngineReplica(ServeArgs(model=uri, threads=1), uri)
        await replica.reconfigure({"model": uri})
        first, same = (
            replica._weights,
            EngineReplica(ServeArgs(model=directories["one"], threads=1), directories["one"]),
        )
        await same.reconfigure({"model": directories["one"]})
        assert (first, replica._reads) == (same._weights, same._reads), "those of the same model in a folder"
        models.put(Path(directories["two"]), uri)
        await changed(replica, uri)
        assert replica._weights != first
        for each in (replica, same):
            await each._serving.close()

    with service() as s3:
        s3.client.create_bucket(Bucket="ocean")
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "gateway"))
        models.put(Path(directories["one"]), uri)
        assert ServeArgs(model=uri).served(uri).config == presets.get("test").model
        assert not list((tmp_path / "gateway").rglob("*.safetensors")), "who speaks HTTP fetches no weights"
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "replica"))
        asyncio.run(work())


def test_a_replica_that_starts_takes_what_was_loaded_last(directories: dict[str, str]) -> None:
    last: list[str] = []

    class Kept:
        def put(self, directory: str) -> None:
            last[:] = [directory]

        def get(self) -> str | None:
            return last[0] if last else None

    async def started(name: str) -> Changing:
        replica = Changing(ServeArgs(model=directories["one"]), directories["one"])
        replica._last = Kept()  # type: ignore[assignment]
        await changed(replica, directories[name])
        return replica

    async def work() -> None:
        with pytest.raises(ShoalError, match="missing"):
            await started("missing")
        two = await started("two")
        for slip in ("missing", "broken"):
            replica = await started(slip)
            assert (replica._weights, (await replica.stats())["weights_update_refused"]) == (two._weights, 1)

    asyncio.run(work())


def test_an_engine_that_leaves_takes_the_streams_that_began_with_its_weights(directories: dict[str, str]) -> None:
    async def work() -> None:
        replica = Changing(ServeArgs(model=directories["one"]), directories["one"])
        await changed(replica, directories["one"])
        old, running = Wanted("", replica._reads, replica._weights), replica.generate(Request("x"), anything(replica))
        ((begun, _),) = [await anext(running)]
        assert begun == Begun("", old.weights or "")
        await changed(replica, directories["two"])
        assert replica._weights != old.weights
        taken = [item async for events in replica.generate(Request("y"), old) for item in events]
        assert taken[0] == begun
        assert isinstance(taken[-1], Finished) and taken[-1].error is None
        await running.aclose()
        while replica._ending:
            await asyncio.sleep(0.01)
        (refused,) = [item async for events in replica.generate(Request("z"), old) for item in events]
        assert isinstance(refused, Finished) and isinstance(refused.error, OtherModelError)
        other = Wanted("", "another tokenizer")
        (refused,) = [item async for events in replica.generate(Request("z"), other) for item in events]
        assert isinstance(refused, Finished) and isinstance(refused.error, OtherModelError)

    asyncio.run(work())


def test_an_engine_that_leaves_ends_its_embeddings_first(directories: dict[str, str]) -> None:
    """Two sets of weights give vectors that cannot be compared."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Pooling(Engine):
        async def embed(self, prompts: list[list[int]], depth: str | int, **whose: str) -> list[list[float]]:
            begun.set()
            await go_on.wait()
            return [[float(self.closed)]] * len(prompts)

    class Held(Changing):
        def _load(self, directory: str) -> Any:
            return Pooling()

    async def work() -> None:
        replica = Held(ServeArgs(model=directories["one"]), directories["one"])
        await changed(replica, directories["one"])
        asked = asyncio.create_task(replica.embed([[1], [2]], "full", anything(replica)))
        await begun.wait()
        await changed(replica, directories["two"])
        await asyncio.sleep(3 * LEAVE_SECONDS)
        assert replica._ending
        go_on.set()
        weights, vectors = await asked
        assert weights and vectors == [[0.0], [0.0]]
        await asyncio.wait(replica._ending)
        assert not +replica._running

    asyncio.run(work())


def test_weights_that_could_not_be_kept_for_others_serve_all_the_same(directories: dict[str, str]) -> None:
    """The engine before them leaves, and what is told of them is true."""

    class Lost:
        def put(self, directory: str) -> None:
            raise RuntimeError("no cluster's head")

        def get(self) -> str | None:
            return None

    async def work() -> None:
        replica = Changing(ServeArgs(model=directories["one"]), directories["one"])
        await changed(replica, directories["one"])
        first, before = replica._weights, cast("Engine", replica._engine)
        replica._last = Lost()  # type: ignore[assignment]
        await changed(replica, directories["two"])
        assert replica._weights != first and (await replica.stats())["weights_update_refused"] == 0
        while replica._ending:
            await asyncio.sleep(0.01)
        assert before.closed

    asyncio.run(work())


def anything(replica: EngineReplica) -> Wanted:
    return Wanted("", replica._reads)
