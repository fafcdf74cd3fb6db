"""The engine replicas of one model as an `EngineClient`: what the gateway asks, and what it is told of the replicas.

Notable: an engine's refusal crosses as a `Finished` event and keeps its class; what Ray, Serve and gRPC raise becomes the error
of ours that has its HTTP status. A client that leaves closes the gateway's iterator, which cancels the replica's, which cancels
the request in the engine. A replica that is lost takes no request with it (`failover`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, cast

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from shoal.engine.events import Event, Request
from shoal.errors import EngineDeadError, QueueFullError, ShoalError
from shoal.on_ray.failover import LOSSES, PAUSES, unbroken

# Events go by gRPC from process to process. Serve's other way makes each list an object of Ray, at three times the CPU.
DIRECT: dict[str, Any] = {"_by_reference": False, "request_serialization": "pickle", "response_serialization": "pickle"}
STATUS_SECONDS = 1.0  # for the controller to say what it is doing; one that restarts takes longer


class ReplicaClient:
    """The engine replicas behind a handle, as an `EngineClient`."""

    def __init__(self, engine: DeploymentHandle[Any], *, may_be_none: bool) -> None:
        """`may_be_none`: the deployment may have no replica, until a request asks for one."""
        self._engine, self._may_be_none = engine, may_be_none
        self._stream = engine.options(method_name="generate", stream=True, **DIRECT)
        self._resumed = 0  # streams that went on at another replica

    def batches(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """Raises QueueFullError when all replicas and the queue are full. A request whose replica is lost goes on at another
        (`failover`); EngineDeadError says that several were lost."""

        def count() -> None:
            self._resumed += 1

        return unbroken(self._open, request, on_resume=count)

    async def _open(self, request: Request) -> AsyncGenerator[list[Event], None]:
        stream = cast("DeploymentResponseGenerator[list[Event]]", self._stream.remote(request))
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

    async def embed(self, prompt: list[int], depth: str | int | None = None) -> list[float]:
        """Raises as `generate`."""
        tries = 0
        while True:
            try:
                return cast("list[float]", await self._engine.embed.remote(prompt, depth))
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _cancelled():
                    raise
                tries, reason = tries + 1, as_shoal_error(error)
                if tries == LOSSES or not isinstance(reason, EngineDeadError):
                    raise reason from error
            await asyncio.sleep(PAUSES[tries])

    async def stats(self) -> dict[str, float]:
        """Sums over the replicas that answer; of a share (``_perc``) the mean. With ``num_replicas``, those that answered, and
        ``num_replicas_starting``, unless Serve's controller is busy with other things."""
        replies, starting = await asyncio.gather(self._ask_all("stats"), self._starting())
        names = {name for reply in replies for name in reply}
        total = {name: sum(reply.get(name, 0.0) for reply in replies) for name in names}
        shares = {name: value / len(replies) for name, value in total.items() if name.endswith("_perc")}
        return {
            **total,
            **shares,
            "num_replicas": float(len(replies)),
            **starting,
            "requests_resumed_total": float(self._resumed),
        }

    async def _starting(self) -> dict[str, float]:
        """Replicas that Serve has decided on and that do not work yet. It tells no more of its decisions: 2.60 names a list of
        them in its schema (`DeploymentAutoscalingDetail`), and never fills it."""
        with suppress(TimeoutError, RayError, RayServeException, KeyError):
            async with asyncio.timeout(STATUS_SECONDS):
                applications = (await asyncio.to_thread(serve.status)).applications
            states = applications[self._engine.app_name].deployments[self._engine.deployment_name].replica_states
            return {"num_replicas_starting": float(states.get(ReplicaState.STARTING, 0))}
        return {}

    async def check_health(self) -> None:
        """Raises EngineDeadError when no replica is alive and well, unless there may be none."""
        await self._ask_all("check_health")

    async def _ask_all(self, method: str) -> list[Any]:
        """What the replicas answer, without those that raise. Raises when all do."""
        try:
            replies = await self._engine.broadcast(method).results_async(return_exceptions=True)
        except Exception as error:
            if self._may_be_none and isinstance(error, DeploymentUnavailableError):
                return []
            raise as_shoal_error(error) from error
        errors = [reply for reply in replies if isinstance(reply, BaseException)]
        if errors and len(errors) == len(replies):
            raise as_shoal_error(errors[0])
        return [reply for reply in replies if not isinstance(reply, BaseException)]


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
    return EngineDeadError(f"the engine replica {what}", got=type(cause).__name__, do="try again")
