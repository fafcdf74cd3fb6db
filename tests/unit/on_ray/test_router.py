"""Serve's own router with our choice in it, in one event loop and without a cluster: whom it asks, refuses and chooses."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, ReplicaID

from shoal.engine.events import Request
from shoal.on_ray.absence import NoReplicaError
from shoal.on_ray.routing import AffinityRouter

MINUTES = 120.0  # that a test waits for what must come, at most


class Replica:
    """One that says how many requests it has, as long as it answers at all."""

    node_id, availability_zone, multiplexed_model_ids, max_ongoing_requests = "node", None, frozenset[str](), 3

    def __init__(self, name: str, of: DeploymentID) -> None:
        self.replica_id, self.name = ReplicaID(name, of), name
        self.answers = asyncio.Event()
        self.answers.set()
        self.open = 0  # questions that wait for their answer
        self.most = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.open += deadline_s == float("inf")  # ours; Serve asks by itself, too
        self.most = max(self.most, self.open)
        try:
            await self.answers.wait()
        finally:
            self.open -= deadline_s == float("inf")
        return 0


def made(*names: str, queue: int = 2, may_be_none: bool = False) -> tuple[AffinityRouter, list[Replica]]:
    """A router of a deployment of its own that has these replicas."""
    of = DeploymentID("engine", uuid.uuid4().hex)
    router = AffinityRouter(of, DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True)
    router.initialize_state(page=8, queue=queue, may_be_none=may_be_none)
    replicas = [Replica(name, of) for name in names]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    return router, replicas


def pending(*args: Any) -> PendingRequest:
    return PendingRequest(list(args), {}, RequestMetadata(request_id="http", internal_request_id=uuid.uuid4().hex))


async def until(holds: Any) -> None:
    async with asyncio.timeout(MINUTES):
        while not holds():
            await asyncio.sleep(0.005)


def test_replicas_are_asked_one_question_at_a_time_for_as_long_as_there_are_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.on_ray.routing.TICK_SECONDS", 0.005)

    async def run() -> None:
        router, _ = made()
        assert router._watching is None, "nobody to ask"
        of = router._deployment_id
        lively, silent = Replica("a", of), Replica("b", of)
        silent.answers.clear()
        router.update_replicas([lively, silent])  # type: ignore[list-item]
        watching = router._watching
        await until(lambda: router._pulse.silent() == {"b"})
        assert silent.most == 1 and lively.most == 1
        silent.answers.set()
        await until(lambda: not router._pulse.silent())
        router.update_replicas([lively])  # type: ignore[list-item]
        assert router._watching is watching and not watching.done(), "one who watches is enough"
        router.update_replicas([])
        await until(watching.done)
        router.update_replicas([lively])  # type: ignore[list-item]
        assert router._watching is not watching
        lively.answers.clear()
        await until(lambda: lively.open == 1)
        router._watching.cancel()

    asyncio.run(run())


def test_who_would_wait_behind_a_full_queue_is_refused_and_who_was_let_in_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no replica was there, only the queue has places."""

    async def run() -> None:
        router, _ = made(queue=2)
        waiting = [asyncio.ensure_future(router._choose_replica_for_request(pending())) for _ in range(2)]
        await until(lambda: len(router._pending_requests_to_fulfill) == 2)
        with pytest.raises(BackPressureError):
            await router._choose_replica_for_request(pending())
        waiting.append(asyncio.ensure_future(router._choose_replica_for_request(pending(), is_retry=True)))
        await until(lambda: len(router._pending_requests_to_fulfill) == 3)
        monkeypatch.setattr("shoal.on_ray.absence.REPLACED_SECONDS", 0.0)
        monkeypatch.setattr("shoal.on_ray.absence.LEAST_SECONDS", 0.0)
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), MINUTES)
        assert [type(each) for each in found] == [NoReplicaError] * 3

    asyncio.run(run())


def test_a_replica_that_is_away_for_a_moment_makes_no_queue_full() -> None:
    """One whose weights change is out of Serve's list, and what it would have taken waits for it, whatever else Serve says."""

    async def run() -> None:
        router, (replica,) = made("a", queue=2)
        router.update_replicas([])
        router.update_replicas([])
        asked = [asyncio.ensure_future(router._choose_replica_for_request(pending())) for _ in range(2 + 3)]
        await asyncio.sleep(0)
        with pytest.raises(BackPressureError):
            await router._choose_replica_for_request(pending())
        router.update_replicas([replica])  # type: ignore[list-item]
        assert await asyncio.wait_for(asyncio.gather(*asked), MINUTES) == [replica] * 5
        router._watching.cancel()

    asyncio.run(run())


BEGINNING = Request(list(range(20, 60)))


async def sent(router: AffinityRouter, *args: Any) -> str:
    """Whom Serve sends a request to, which it counts as it does so."""
    replica = await router._choose_replica_for_request(pending(*args))
    router.on_send_request(replica.replica_id)
    return replica.replica_id.unique_id


@pytest.mark.parametrize("args", [(), (BEGINNING,)], ids=["no beginning", "one beginning"])
@pytest.mark.parametrize("known", [True, False], ids=["loads known", "after ten idle seconds"])
def test_requests_of_one_moment_are_spread_as_those_that_come_one_after_the_other(
    args: tuple[Request, ...], known: bool
) -> None:
    """As the choices of one call. Serve counts a request where it is sent, which is later than it chose for the next; of a
    replica that it has not heard of for ten seconds it asks first, and all choose meanwhile."""

    async def run(together: bool) -> Counter[str]:
        router, replicas = made("a", "b", "c", "d")
        for replica in replicas:
            replica.max_ongoing_requests = 8
        for replica in replicas if known else ():
            router.on_new_queue_len_info(replica.replica_id, 0)
        some = [sent(router, *args) for _ in range(12)]
        found = await asyncio.wait_for(asyncio.gather(*some), MINUTES) if together else [await each for each in some]
        assert not router._asked and not router._first
        router._watching.cancel()
        return Counter(found)

    found = asyncio.run(run(together=True))
    assert found == asyncio.run(run(together=False)) and max(found.values()) <= 4
    assert args or set(found.values()) == {3}


def test_of_requests_of_one_moment_only_those_are_let_in_that_there_is_room_for() -> None:
    """Two replicas that take three each, and a queue of two; then those that a replica was chosen for, and that Serve has not
    sent, have their places there."""

    async def run() -> None:
        router, replicas = made("a", "b", queue=2)
        for replica in replicas:
            router.on_new_queue_len_info(replica.replica_id, 0)
        some = [pending() for _ in range(20)]
        asked = [asyncio.ensure_future(router._choose_replica_for_request(each)) for each in some]
        while not any(each.future.done() for each in some):
            await asyncio.sleep(0)
        given = sum(each.future.done() for each in some)
        assert given and router._places() == max(0, 6 - given), "chosen, and nobody has come back yet"
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), MINUTES)
        assert sum(isinstance(each, BackPressureError) for each in found) == 20 - 8
        assert all(isinstance(each, BackPressureError) for each in found[8:]), "who came first is in"
        router._watching.cancel()

    asyncio.run(run())
