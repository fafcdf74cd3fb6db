"""No replica is alive: who waits for one, how long, and what he is told then."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("ray")

from shoal.engine.events import Request
from shoal.errors import QueueFullError
from shoal.on_ray import absence
from shoal.on_ray.absence import LEAST_SECONDS, LOOK_SECONDS, REPLACED_SECONDS, Absence, NoReplicaError
from shoal.on_ray.clients import as_shoal_error
from shoal.on_ray.failover import unbroken

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_lost_replica_has_its_time_and_then_clients_are_told_soon() -> None:
    now = [100.0]
    absent = Absence(may_be_none=False, clock=lambda: now[0])

    def refused(present: bool, began: float, seconds: float) -> float | None:
        """When a request is refused that looks so long, in seconds from now."""
        start = now[0]
        while now[0] < start + seconds:
            if absent.too_long(present, began):
                return now[0] - start
            now[0] += LOOK_SECONDS
        return None

    assert refused(True, 100.0, 60) is None
    first = refused(False, now[0], 60)
    assert first is not None and REPLACED_SECONDS <= first < REPLACED_SECONDS + 1
    later = refused(False, now[0], 60)  # it is known by now
    assert later is not None and LEAST_SECONDS <= later < LEAST_SECONDS + 1
    assert refused(True, now[0], 1) is None
    again = refused(False, now[0], 60)
    assert again is not None and again >= REPLACED_SECONDS
    now[0] += 1000  # nobody asked: there may have been one
    much_later = refused(False, now[0], 60)
    assert much_later is not None and much_later >= REPLACED_SECONDS


async def test_a_request_is_refused_with_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "REPLACED_SECONDS", 0.0)
    monkeypatch.setattr(absence, "LEAST_SECONDS", 0.0)
    left = asyncio.Event()

    async def never() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return ""

    with pytest.raises(NoReplicaError) as caught:
        await Absence(may_be_none=False).bounded(never(), lambda: False)
    assert left.is_set()  # nobody waits on in its name
    error = as_shoal_error(caught.value)
    assert isinstance(error, NoReplicaError) and (error.status, error.retry_after) == (503, absence.RETRY_SECONDS)


@pytest.mark.drill
async def test_a_start_from_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absence, "REPLACED_SECONDS", 0.0)
    monkeypatch.setattr(absence, "LEAST_SECONDS", 0.0)

    async def soon() -> str:
        await asyncio.sleep(4 * LOOK_SECONDS)
        return "replica"

    assert await Absence(may_be_none=True).bounded(soon(), lambda: False) == "replica"
    assert await Absence(may_be_none=False).bounded(soon(), lambda: True) == "replica"  # all are busy, none is lost


async def test_a_request_that_no_replica_had_is_not_tried_again() -> None:
    tried = []

    async def none(*request: object) -> object:
        tried.append(request)
        raise NoReplicaError("no engine replica is alive")
        yield

    with pytest.raises(QueueFullError):
        async for _ in unbroken(none, Request([20])):  # type: ignore[arg-type]
            pass
    assert len(tried) == 1
