"""The service of `shoal.on_ray.serve`, with engine replicas that a test can break from outside."""

from __future__ import annotations

from typing import Any, NoReturn
from unittest import mock

from ray import serve as ray_serve

from shoal.on_ray import serve
from shoal.on_ray.engines import EngineReplica


class Breakable(EngineReplica):
    def break_(self) -> None:
        """From now on every step of this replica's engine raises, as on memory that fails."""

        def fail(plan: Any) -> NoReturn:
            raise OSError("memory")

        assert self._engine is not None
        self._engine._engine.runner.run = fail  # type: ignore[method-assign]


def app(args: dict[str, Any]) -> ray_serve.Application:
    with mock.patch.object(serve, "EngineReplica", Breakable):
        return serve.app(args)
