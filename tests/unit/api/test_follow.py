"""What a service does about a release that changes while it works: with engines that are none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.api.follow import Follower
from shoal.api.split import Split
from shoal.errors import EngineDeadError
from shoal.loop.release import Release
from shoal.loop.versions import Version
from tests.unit.api.test_split import Engine

PASSED: dict[str, Any] = {"passed": True, "checks": []}


class Deploys:
    """Counts the canaries that are there; `meanwhile` is done while one is loaded, `refuses` is how often one does not go."""

    def __init__(self) -> None:
        self.running, self.refuses = 0, 0
        self.meanwhile: Callable[[], object] = lambda: None

    async def serve(self, version: Version) -> None: ...

    async def begin(self, version: Version) -> Any:
        self.meanwhile()
        self.running += 1
        return Healthy(0)

    async def end(self) -> None:
        if self.refuses:
            self.refuses -= 1
            raise EngineDeadError("the canary is not gone")
        self.running = 0

    def weights(self, version: Version) -> str:
        return version.label


class Healthy(Engine):
    async def check_health(self) -> None: ...


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        Model.from_preset("test", seed=seed).save(root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def release(tmp_path: Path, models: list[Path]) -> Release:
    """Version 2 serves, 1 did before; 3 is a candidate."""
    made = Release(tmp_path / "release")
    made.add(models[0])
    made.add(models[1], verdict=PASSED)
    made.promote(why="better")
    made.add(models[2], verdict=PASSED)
    return made


def follower(release: Release, deploys: Deploys | None = None) -> Follower:
    return Follower(release, Split(Engine(100)), deploys or Deploys(), serves=2)  # type: ignore[arg-type]


def run(work: Callable[[], Awaitable[object]]) -> None:
    async def soon() -> None:
        async with asyncio.timeout(60.0):
            await work()

    asyncio.run(soon())


def condemn(one: Follower) -> None:
    trial = one._split.trial
    assert trial is not None
    trial.decided = "back", "failures"


def test_two_gateways_that_condemn_one_canary_leave_the_stable_version(release: Release) -> None:
    async def work() -> None:
        gateways = [follower(release) for _ in range(2)]
        release.begin(why="try")
        for one in gateways:
            await one.look()
            condemn(one)
        await asyncio.gather(*(one.look() for one in gateways), return_exceptions=True)
        for one in gateways:
            await one.look()
            assert one._split.trial is None
        state = release.state()
        assert (state.stable, state.canary) == (2, None)

    run(work)


def test_a_canary_that_a_person_took_back_is_not_promoted_by_the_evidence_of_a_moment_before(release: Release) -> None:
    async def work() -> None:
        release.set_auto("promote", why="in a test")
        one = follower(release)
        release.begin(why="try")
        await one.look()
        trial = one._split.trial
        assert trial is not None
        trial.decided = "done", "all clear"
        state = release.state()
        release.rollback(why="a person says so")
        with pytest.raises(Exception, match="changed meanwhile"):
            await one._judge(trial, state)
        await one.look()
        assert (release.state().stable, one._split.trial) == (2, None)

    run(work)


def test_a_canary_that_is_taken_back_while_it_is_loaded_gets_nothing(release: Release) -> None:
    async def work() -> None:
        deploys = Deploys()
        one = follower(release, deploys)
        await one.look()
        release.begin(why="try")
        deploys.meanwhile = lambda: release.rollback(why="not that one")
        await one.look()
        assert one._split.trial is None and deploys.running == 0

    run(work)


def test_a_canary_that_does_not_go_is_ended_again_and_one_of_a_gateway_before_as_well(release: Release) -> None:
    async def work() -> None:
        deploys = Deploys()
        deploys.running = 1  # of a gateway that was killed; the release has none any more
        one = follower(release, deploys)
        await one.look()
        assert deploys.running == 0
        release.begin(why="try")
        await one.look()
        assert deploys.running == 1
        release.rollback(why="bad")
        deploys.refuses = 1
        with pytest.raises(EngineDeadError):
            await one.look()
        await one.look()
        assert deploys.running == 0

    run(work)


def test_a_version_that_is_tried_again_is_not_condemned_by_what_it_did_the_first_time(release: Release) -> None:
    async def work() -> None:
        one = follower(release)
        release.begin(why="try")
        await one.look()
        trial = one._split.trial
        assert trial is not None
        trial.evidence.canary.failures = trial.evidence.canary.requests = 9
        condemn(one)
        await one.look()
        assert release.state().canary is None
        await one.look()
        release.begin(3, why="it was the machine")
        await one.look()
        trial = one._split.trial
        assert trial is not None and trial.evidence.canary.requests == 0
        trial.evidence.canary.requests = 7
        await one.look()
        again = follower(release)  # a gateway that starts anew goes on with what was seen of the same step
        await again.look()
        assert again._split.trial is not None and again._split.trial.evidence.canary.requests == 7
        assert replace(trial.canary) == again._split.trial.canary

    run(work)
