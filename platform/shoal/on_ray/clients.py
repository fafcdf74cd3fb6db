"""The engine replicas of one model as an `EngineClient`: what the gateway asks, and what it is told of the replicas.

Notable: an engine's refusal crosses as a `Finished` event and keeps its class; what Ray, Serve and gRPC raise becomes the error
of ours that has its HTTP status. A client that leaves closes the gateway's iterator, which cancels the replica's, which cancels
the request in the engine. A replica that is lost takes no request with it (`failover`); who is silent (`pulse`) is lost.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from shoal.config import FULL
from shoal.engine.events import Event, Request
from shoal.engine.metrics import Samples, sample, together
from shoal.errors import CheckpointError, EngineDeadError, QueueFullError, ShoalError
from shoal.on_ray.calls import Begun, OtherModelError, Wanted
from shoal.on_ray.failover import LOSSES, PAUSES, Pin, lost_twice, unbroken
from shoal.on_ray.pulse import pulse_of

log = logging.getLogger(__name__)

# Events go by gRPC from process to process. Serve's other way makes each list an object of Ray, at three times the CPU.
DIRECT: dict[str, Any] = {"_by_reference": False, "request_serialization": "pickle", "response_serialization": "pickle"}
ANSWER_SECONDS = 3.0  # for replicas to say how they are
LOAD_SECONDS = 60.0  # for an adapter to be loaded, by a replica that may have to start for it
LOOK_SECONDS = 0.5  # how often it is looked who is silent, meanwhile
STATUS_SECONDS = 1.0  # for the controller to say what it is doing; one that restarts takes longer


class ReplicaClient:
    """The engine replicas behind a handle, as an `EngineClient`."""

    def __init__(self, engine: DeploymentHandle[Any], *, may_be_none: bool, reads: str, several: bool = False) -> None:
        """`may_be_none`: the deployment may have no replica, until a request asks for one; `reads`: `calls.reads` of what
        requests are encoded with; `several`: so are the gateways, each of which is asked what it has `resumed`."""
        self._engine, self._may_be_none, self._reads = engine, may_be_none, reads
        self._several = several
        self._stream = engine.options(method_name="generate", stream=True, **DIRECT)
        self._pulse = pulse_of(engine.app_name, engine.deployment_name)
        self._adapters: dict[str, str] = {}  # identity -> directory
        self._pins: WeakValueDictionary[str, Pin] = WeakValueDictionary()  # of answers of several requests
        self._asking: set[asyncio.Task[Any]] = set()
        self._resumed = 0  # streams that went on at another replica

    def batches(
        self, request: Request, on_begun: Callable[[str], None] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        """`on_begun` is told the weights that answer, before the first events. Raises QueueFullError when all replicas and the
        queue are full. A request whose replica is lost goes on at another (`failover`); EnginesLostError says that two were
        lost, OtherModelError that no other has its weights."""

        def count() -> None:
            self._resumed += 1

        pin = self._pins.setdefault(request.beside, Pin()) if request.beside else Pin()
        lists = unbroken(self._open, request, reads=self._reads, pin=pin, on_resume=count)
        return lists if on_begun is None else _told(lists, pin, on_begun)

    async def _open(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        wanted = replace(wanted, adapter=self._place(request.adapter))
        stream = cast("DeploymentResponseGenerator[list[Event | Begun]]", self._stream.remote(request, wanted))
        self._pulse.opened(wanted.call, stream.cancel)
        try:
            async for ready in stream:
                yield ready
        except Exception as error:  # the stream is over: `cancel` would raise this again
            raise as_shoal_error(error) from error
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and not _cancelled():
                raise as_shoal_error(error) from error
            stream.cancel()  # type: ignore[no-untyped-call]  # the caller left
            raise
        finally:
            self._pulse.closed(wanted.call)

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int = FULL,
        *,
        payer: str = "",
        client: str = "",
        priority: int = 0,
        adapter: str = "",
        on_begun: Callable[[str], None] | None = None,
    ) -> list[list[float]]:
        """By one replica, since others may have other weights: the next begins anew. `on_begun` is told those that answered.
        Raises as `batches`."""
        tries, losses, call, refused = 0, 0, uuid.uuid4().hex, frozenset[str]()
        while True:
            number = f"{call}.{tries}.{len(refused)}"
            wanted = Wanted(number, self._reads, avoid=refused, adapter=self._place(adapter))
            try:
                weights, vectors = await self._embed(wanted, prompts, depth, wanted, payer, client, priority)
            except OtherModelError as error:
                if error.replica in refused:
                    raise
                refused |= {error.replica}
                continue
            except EngineDeadError as error:
                tries, losses = tries + 1, losses + error.taken
                if losses == LOSSES:
                    raise lost_twice(error) from error
                if tries == len(PAUSES):
                    raise
            else:
                if on_begun is not None:
                    on_begun(weights)
                return vectors
            await asyncio.sleep(PAUSES[tries])

    async def _embed(self, wanted: Wanted, *given: Any) -> tuple[str, list[list[float]]]:
        answer = self._engine.embed.remote(*given)
        self._pulse.opened(wanted.call, answer.cancel)
        try:
            return cast("tuple[str, list[list[float]]]", await answer)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled():
                answer.cancel()  # type: ignore[no-untyped-call]  # the caller left
                raise
            raise as_shoal_error(error) from error
        finally:
            self._pulse.closed(wanted.call)

    def _place(self, adapter: str) -> tuple[str, str]:
        """As `Wanted.adapter`; without a directory for one that was dropped meanwhile."""
        return adapter, self._adapters.get(adapter, "")

    def know(self, adapters: Mapping[str, str]) -> None:
        """These are all adapters that requests may ask for, identity -> directory."""
        self._adapters = dict(adapters)

    async def load_adapter(self, directory: str) -> str:
        """By one replica, which may start for it, and then by all there are. One that is lost or silent, or starts later, loads
        it when it is first asked (`Wanted.adapter`). Raises CheckpointError, and EngineDeadError where none takes it."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                identity = cast("str", await self._engine.load_adapter.remote(directory))
        except TimeoutError:
            raise EngineDeadError("no engine replica loads the adapter", do="try again") from None
        except Exception as error:
            raise as_shoal_error(error) from error
        if any(told != identity for told in await self._tell_all("load_adapter", directory)):
            raise CheckpointError(f"{directory} changed while it was loaded", do="write it beside, and rename it")
        self._adapters = {**self._adapters, identity: directory}
        return identity

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        """Who is lost or silent keeps the others as long as nothing else is loaded: nobody asks for them. One that lacks any of
        `known` loads it."""
        self.know({**held, **known})
        with suppress(ShoalError):
            await self._tell_all("keep_adapters", dict(known), [*held], at)

    async def _tell_all(self, method: str, *given: Any) -> list[Any]:
        """What the replicas answer, but for those that are lost or silent. Raises what one of the others does."""
        try:
            results = await self._engine.broadcast(method, *given)._fetch_replica_results_async()
        except Exception as error:
            if self._may_be_none and isinstance(error, DeploymentUnavailableError):
                return []
            raise as_shoal_error(error) from error
        asked = {asyncio.ensure_future(result.get_async()) for result in results}  # type: ignore[no-untyped-call]
        self._asking |= asked
        for task in asked:
            task.add_done_callback(self._forget)
        left, until = asked, asyncio.get_running_loop().time() + LOAD_SECONDS
        while len(left) > len(self._pulse.silent()) and asyncio.get_running_loop().time() < until:
            _, left = await asyncio.wait(left, timeout=LOOK_SECONDS)
        done = asked - left
        told = [task.exception() if not task.cancelled() else asyncio.CancelledError() for task in done]
        for refusal in map(as_shoal_error, filter(None, told)):
            if not isinstance(refusal, EngineDeadError):
                raise refusal
        return [task.result() for task, error in zip(done, told, strict=True) if error is None]

    async def stats(self) -> Samples:
        """Of the replicas that answer, together. With ``num_replicas``, those that answered (0 is said too, and with it what
        this process counts), and ``num_replicas_starting``, unless Serve's controller is busy with other things."""
        replies, starting = await asyncio.gather(self._stats(), self._starting())
        resumed = {} if self._several else self.resumed()
        return {**together(replies), sample("num_replicas"): float(len(replies)), **starting, **resumed}

    async def _stats(self) -> list[Samples]:
        try:
            return await self._ask_all("stats")
        except EngineDeadError as error:
            log.warning("no engine stats: %s", error)
            return []

    def resumed(self) -> Samples:
        """What this process counts of them."""
        return {sample("requests_resumed"): float(self._resumed)}

    async def info(self) -> list[dict[str, str]]:
        """What each replica that answers says of itself: ``quantization`` and ``weights``."""
        return await self._ask_all("info")

    async def _starting(self) -> Samples:
        """Replicas that Serve has decided on and that do not work yet. It tells no more of its decisions: 2.60 names a list of
        them in its schema (`DeploymentAutoscalingDetail`), and never fills it."""
        with suppress(TimeoutError, RayError, RayServeException, KeyError):
            async with asyncio.timeout(STATUS_SECONDS):
                applications = (await asyncio.to_thread(serve.status)).applications
            states = applications[self._engine.app_name].deployments[self._engine.deployment_name].replica_states
            return {sample("num_replicas_starting"): float(states.get(ReplicaState.STARTING, 0))}
        return {}

    async def check_health(self) -> None:
        """Raises EngineDeadError when no replica is alive and well and reads what is encoded here, unless there may be none."""
        await self._ask_all("check_reads", self._reads, enough=1)

    async def same_model(self) -> bool:
        """Whether any replica reads what requests here are encoded with; true as well where none says what it reads."""
        try:
            told = await self._ask_all("reads")
        except ShoalError:
            return True
        return not told or self._reads in told

    async def _ask_all(self, method: str, *given: str, enough: int | None = None) -> list[Any]:
        """What the replicas answer in time, without those that raise; `enough`: as many will do. Raises when all do."""
        try:
            # the results one by one: `results_async` has none before the last of them
            results = await self._engine.broadcast(method, *given)._fetch_replica_results_async()
        except Exception as error:
            if self._may_be_none and isinstance(error, DeploymentUnavailableError):
                return []
            raise as_shoal_error(error) from error
        asked = {asyncio.ensure_future(result.get_async()) for result in results}  # type: ignore[no-untyped-call]
        self._asking |= asked  # who is silent may answer later: a question that is taken back is an error there
        for task in asked:
            task.add_done_callback(self._forget)
        good, errors = await _answers(asked, enough or max(1, len(asked) - len(self._pulse.silent())))
        if not good:
            silent = EngineDeadError(
                "no engine replica answers", got=f"silence for {ANSWER_SECONDS:g} s", do="try again"
            )
            # in no order: what a replica says of itself goes before that it was lost
            told = map(as_shoal_error, errors)
            raise min(told, key=lambda error: not isinstance(error, OtherModelError), default=silent)
        return good

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # it is read, so that nobody tells of it


async def _told(
    lists: AsyncGenerator[list[Event], None], pin: Pin, on_begun: Callable[[str], None]
) -> AsyncGenerator[list[Event], None]:
    """`lists`, once `on_begun` has been told the weights of their `pin`."""
    begun = False
    async with aclosing(lists):
        async for events in lists:
            if not begun:
                begun = True
                on_begun(pin.weights or "")
            yield events


async def _answers(asked: set[asyncio.Task[Any]], enough: int) -> tuple[list[Any], list[BaseException]]:
    """What `asked` gives within `ANSWER_SECONDS`, and what it raises; sooner where `enough` of them have answered."""
    loop = asyncio.get_running_loop()
    until = loop.time() + ANSWER_SECONDS
    good: list[Any] = []
    errors: list[BaseException] = []
    while asked and len(good) < enough and (left := until - loop.time()) > 0:
        done, asked = await asyncio.wait(asked, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.cancelled():
                errors.append(asyncio.CancelledError())
            elif (error := task.exception()) is not None:
                errors.append(error)
            else:
                good.append(task.result())
    return good, errors


def _cancelled() -> bool:
    """Is the present task to end? If not, a CancelledError is a replica's, which sends those of its own as they are."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def as_shoal_error(error: BaseException) -> ShoalError:
    """What a call of a replica raised, as the error of ours that has its HTTP status. Anything that is neither ours nor a full
    queue says that the replica is lost, or has a fault."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ShoalError):
        return cause
    if isinstance(error, BackPressureError):
        return QueueFullError("all engines are busy and the queue is full", do="try again in a second")
    lost = (RayError, RayServeException, AioRpcError, asyncio.CancelledError)
    what = "was lost" if isinstance(error, lost) and not isinstance(error, RayTaskError) else "failed"
    dead = EngineDeadError(f"the engine replica {what}", got=type(cause).__name__, do="try again")
    dead.taken = not isinstance(error, DeploymentUnavailableError)  # Serve had no replica to give it to
    return dead
