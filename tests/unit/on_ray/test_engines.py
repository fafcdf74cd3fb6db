"""What lies between Serve and an engine, without a cluster: an end of a stream that is an error, and whose fault it is."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

pytest.importorskip("ray")

from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from shoal import Request
from shoal.engine.events import Event, Token
from shoal.errors import EngineDeadError, QueueFullError, RequestError, ShoalError
from shoal.on_ray.clients import ReplicaClient, as_shoal_error
from shoal.on_ray.engines import EngineReplica
from shoal.on_ray.failover import LOSSES
from shoal.on_ray.serve_config import ServeArgs


class Handle:
    """A deployment handle whose streams say "a" and then end with `error`, or never end."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.cancelled = error, 0

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, request: Request) -> Handle:
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
    client = ReplicaClient(handle, may_be_none=False)  # type: ignore[arg-type]
    return client._open(Request("x"))


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
    """A deployment handle whose calls end as `ends` says: a vector, an error, or never."""

    def __init__(self, *ends: list[float] | BaseException | None) -> None:
        self.ends, self.calls, self.embed = ends, 0, self

    def options(self, **_: Any) -> Embedder:
        return self

    async def remote(self, prompt: list[int], depth: str | int | None) -> list[float]:
        end = self.ends[self.calls]
        self.calls += 1
        if end is None:
            await asyncio.Event().wait()
        if isinstance(end, BaseException):
            raise end
        assert end is not None
        return end


def embedded(handle: Embedder) -> list[float]:
    client = ReplicaClient(handle, may_be_none=False)  # type: ignore[arg-type]
    return asyncio.run(asyncio.wait_for(client.embed([1, 2]), 10))


def test_an_embedding_whose_replica_is_lost_is_asked_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.on_ray.clients.PAUSES", (0.0,) * LOSSES)
    for lost in (ActorDiedError(), asyncio.CancelledError()):
        assert embedded(Embedder(lost, [0.5])) == [0.5]
    for error, calls in ((ActorDiedError(), LOSSES), (RequestError("depth"), 1)):
        handle = Embedder(*[error] * LOSSES)
        with pytest.raises(RequestError):
            embedded(handle)
        assert handle.calls == calls


def test_who_leaves_is_embedded_nowhere_else() -> None:
    async def leave() -> int:
        handle = Embedder(None)
        client = ReplicaClient(handle, may_be_none=False)  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.embed([1]), 0.01)
        return handle.calls

    assert asyncio.run(leave()) == 1


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

        async def embed(self, *_: Any) -> list[float]:
            raise KeyError(" ".join(words))

    replica = Replica(ServeArgs(model="m"), "m")
    replica._engine = Buggy()  # type: ignore[assignment]

    async def read() -> None:
        async for _ in replica.generate(Request("x")):
            pass

    for work in (read, lambda: replica.embed([1], None)):
        caplog.clear()
        with pytest.raises(EngineDeadError, match="KeyError") as caught:
            asyncio.run(work())
        assert "my secret" not in "".join(traceback.format_exception(caught.value))
        assert "KeyError" in caplog.text and __file__ in caplog.text and "my secret" not in caplog.text


def test_an_error_of_ours_stays_as_it_is() -> None:
    wrong = RequestError("depth", param="depth")
    assert as_shoal_error(RayTaskError("generate", "trace", wrong)) is wrong
    assert as_shoal_error(wrong) is wrong
