"""What a gateway asks the others of its application, one of which has just gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from shoal.on_ray import gateways
from shoal.on_ray.gateways import GatewayNames, counted


class Asked:
    """The handle of an application, each of whose gateways gives one of `answers`, or raises it."""

    def __init__(self, *answers: object) -> None:
        self._answers = answers

    def broadcast(self, method: str) -> Asked:
        return self

    async def _fetch_replica_results_async(self) -> list[_Answer]:
        return [_Answer(answer) for answer in self._answers]


class _Answer:
    def __init__(self, answer: object) -> None:
        self._answer = answer

    async def get_async(self) -> object:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *answers: monkeypatch.setattr(gateways, "_all_of", lambda application: Asked(*answers))


@pytest.mark.parametrize("gone", [ActorDiedError(), asyncio.CancelledError()])
def test_a_gateway_that_has_gone_ends_no_scrape_of_another(asked: Callable[..., None], gone: BaseException) -> None:
    asked(("one", {"a": 1.0}), gone)
    assert asyncio.run(counted("app")) == {"one": {"a": 1.0}}


@pytest.mark.parametrize("gone", [ActorDiedError(), asyncio.CancelledError()])
def test_a_gateway_that_has_gone_ends_no_change_of_adapters(asked: Callable[..., None], gone: BaseException) -> None:
    kept: Any = None
    asked({"x": "folder"}, gone)
    assert asyncio.run(GatewayNames(kept, lambda _: None, "app").elsewhere()) is None
    asked({"x": "folder"}, {"y": "other"})
    assert asyncio.run(GatewayNames(kept, lambda _: None, "app").elsewhere()) == {"x": "folder", "y": "other"}
