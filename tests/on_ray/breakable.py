"""The service of `shoal.on_ray.serve`, with engine replicas that take their time and that a test can break from outside, and
gateways that do not give up their count of keys while a busy machine takes its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from ray import serve as ray_serve

from shoal.api import quotas
from shoal.on_ray import serve
from shoal.on_ray.engines import EngineReplica
from shoal.on_ray.serve import Gateway

STEP_SECONDS = 0.01  # else the test model's streams may have ended at the engine before the last of them has begun
SLOW_SECONDS = 0.2  # of a step while there is a file `SLOW`: no stream ends before the weights beside its own are there

BREAKS = "breaks.txt"  # a file of a model directory that no replica can load
SLOW = "slow.txt"  # one whose engines take their time


class Breakable(EngineReplica):
    def _load(self, directory: str) -> Any:
        if Path(directory, BREAKS).exists():
            raise MemoryError
        front: Any = super()._load(directory)
        step = front._engine.step

        def slowly() -> Any:
            time.sleep(SLOW_SECONDS if Path(directory, SLOW).exists() else STEP_SECONDS)
            return step()

        front._engine.step = slowly
        return front

    def break_(self) -> None:
        """From now on every step of this replica's engine raises, as on memory that fails."""

        def fail(plan: Any) -> NoReturn:
            raise OSError("memory")

        assert self._engine is not None
        self._engine._engine.runner.run = fail  # type: ignore[method-assign]


class Patient(Gateway):
    async def __init__(self, *given: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        quotas.PATIENCE_SECONDS = 60.0
        await super().__init__(*given)  # type: ignore[misc]


def app(args: dict[str, Any]) -> ray_serve.Application:
    with mock.patch.object(serve, "EngineReplica", Breakable), mock.patch.object(serve, "Gateway", Patient):
        return serve.app(args)
