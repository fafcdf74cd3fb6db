"""What a service does about a release that changes while it works: with engines that are none."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import Model
from shoal.api.follow import Follower
from shoal.api.meter import Meter
from shoal.api.seen import Seen
from shoal.api.split import Split
from shoal.api.trial import Trial
from shoal.cli import main
from shoal.engine.events import Token
from shoal.errors import DataError, EngineDeadError
from shoal.loop import again
from shoal.loop.canary import Pace, advanced
from shoal.loop.canary_state import Canary
from shoal.loop.evidence import Evidence
from shoal.loop.release import ChangedError, Release
from shoal.loop.versions import Version
from tests.canaries import NAMES, add, seen
from tests.clocks import tells
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


def test_a_canary_that_is_held_is_taken_back_all_the_same_and_who_holds_it_is_told(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        one = follower(release)
        release.begin(why="try")
        await one.look()
        assert main(["release", "hold", "--release", str(release.directory), "--why", "until Monday"]) == 0
        assert "condemn is taken back all the same" in " ".join(capsys.readouterr().out.split())
        await one.look()
        assert one._split.trial is not None and release.state().canary is not None
        condemn(one)
        await one.look()
        assert one._split.trial is None and release.state().canary is None

    run(work)


def test_a_version_that_could_not_be_loaded_is_tried_again(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Deploys):
        def __init__(self) -> None:
            super().__init__()
            self.tried = list[int]()

        async def serve(self, version: Version) -> None:
            self.tried.append(version.number)
            if len(self.tried) < 3:
                raise DataError("no room")

    async def work() -> None:
        deploys = Full()
        one = follower(release, deploys)
        release.promote(3, why="better")
        for _ in range(3):
            await one.look()
        assert deploys.tried == [3], "not at each look: it would load for ever"
        release.hold(why="whatever changes, each try reads all of it")
        await one.look()
        assert deploys.tried == [3]
        monkeypatch.setattr(again, "SECONDS", 0.0)
        for _ in range(4):
            await one.look()
        assert deploys.tried == [3, 3, 3] and one._again.serves == 3

    run(work)


@pytest.mark.parametrize("number", [1, 3])
def test_a_version_that_somebody_removed_keeps_no_other_from_serving(release: Release, number: int) -> None:
    class Serves(Deploys):
        async def serve(self, version: Version) -> None:
            self.running = version.number

    async def work() -> None:
        folder = release.version(number).directory
        for path in folder.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(folder)
        deploys = Serves()
        one = Follower(release, Split(Engine(100)), deploys, serves=1)  # type: ignore[arg-type]
        await one.look()
        assert one._again.serves == 2 and list(one._split.labels.values())[-1] == release.version(2).label

    run(work)


def test_what_condemned_a_canary_stands_when_another_gateway_takes_its_next_step(release: Release) -> None:
    async def work() -> None:
        one = follower(release)
        release.begin(why="try")
        await one.look()
        condemn(one)
        canary = release.state().canary
        assert canary is not None
        release.step(advanced(canary, "now"), why="another gateway was first")
        await one.look()
        assert release.state().canary is None and one._split.trial is None

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
        add(trial.evidence, "canary", 9, 0, failures=9)
        condemn(one)
        await one.look()
        assert release.state().canary is None
        await one.look()
        release.begin(3, why="it was the machine")
        await one.look()
        trial = one._split.trial
        assert trial is not None and seen(trial.evidence, "canary") == (0, 0)
        add(trial.evidence, "canary", 7, 0)
        await one.look()
        again = follower(release)  # a gateway that starts anew goes on with what was seen of the same step
        await again.look()
        assert again._split.trial is not None and seen(again._split.trial.evidence, "canary") == (7, 0)
        assert replace(trial.canary) == again._split.trial.canary

    run(work)


def saw(one: Follower, people: int, failures: int = 0) -> None:
    """A gateway's canary answers so many people, of whom some get failures; the stable version as many, who get none."""
    trial = one._split.trial
    assert trial is not None
    meter = Meter()
    meter.take([Token("r", 1, "x"), Token("r", 2, "y")])
    for number in range(people):
        for stable in (True, False):
            part = trial.part(str(next(NAMES)).encode(), "", canary=not stable)
            trial.count(meter, part, stable=stable, failed=not stable and number < failures)


async def two(release: Release) -> tuple[Follower, Follower]:
    """Gateways that follow a canary, which has just begun."""
    release.begin(3, why="try")
    gateways = follower(release), follower(release)
    for one in gateways:
        await one.look()
    return gateways


def test_gateways_condemn_a_canary_by_what_they_saw_together(release: Release) -> None:
    """Eight people who get nothing but failures are enough, four are not."""

    async def work() -> None:
        first, second = await two(release)
        saw(first, 4, failures=4)
        await first.look()
        assert release.state().canary is not None
        saw(second, 4, failures=4)
        await second.look()
        assert release.state().canary is None
        assert release.audit.entries()[-1]["figures"]["canary"]["failures"] == {"of": 8, "bad": 8}
        await first.look()
        assert first._split.trial is None and not list(release.directory.glob("canary-*"))
        assert first._split.rollbacks + second._split.rollbacks == 1

    run(work)


def test_a_step_takes_as_many_requests_of_all_gateways_as_of_one_and_is_taken_once(release: Release) -> None:
    async def work() -> None:
        first, second = await two(release)
        for requests, step in ((120, 0), (80, 1)):  # of 200
            saw(first, requests - 40)
            saw(second, 40)
            for one in (first, second, first):
                await one.look()
            assert [one._split.trial and one._split.trial.canary.step for one in (first, second)] == [step] * 2
        assert [entry["what"] for entry in release.audit.entries()].count("step") == 1
        saw(first, 299)
        for one in (second, first, second, first):
            await one.look()
        trial = second._split.trial
        assert trial is not None and trial.evidence.people(1) == 299 and seen(trial.evidence, "canary")[0] == 499
        assert trial.decided[0] == "wait"

    run(work)


def test_what_a_gateway_saw_before_it_ended_counts_and_what_it_saw_of_another_trial_does_not(release: Release) -> None:
    async def work() -> None:
        first, second = await two(release)
        saw(first, 4, failures=4)
        await first.look()
        third = follower(release)  # in the place of the first
        await third.look()
        saw(third, 4, failures=4)
        await third.look()
        assert release.state().canary is None
        release.begin(3, why="it was the machine")  # the same version, before the second looks again
        await second.look()
        trial = second._split.trial
        assert trial is not None and seen(trial.evidence, "canary") == (0, 0)

    run(work)


@pytest.mark.parametrize("days", [-400, 400])
def test_a_day_without_traffic_is_one_by_a_clock_that_nobody_sets(
    release: Release, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """By what gateways have seen of it, those that have ended too, though the time of day was another when the step began; a
    person who lets it go on gives it another day."""
    steady, then = 1000.0, datetime.now(UTC) + timedelta(days=days)
    monkeypatch.setattr("shoal.loop.release.now", then.isoformat)
    tells(monkeypatch, "shoal.api.follow", monotonic=lambda: steady)

    async def work() -> None:
        nonlocal steady, then
        first, second = await two(release)
        for one in (first, second):
            await one.look()
        assert release.state().held is None
        steady += 23 * 3600
        await first.look()
        third = follower(release)  # in its place
        steady += 3599
        await third.look()
        await third.look()
        assert release.state().held is None
        steady += 3601
        await third.look()
        assert "too little traffic in 24 h" in (release.state().held or "")
        saw(third, 7)
        await third.look()
        then += timedelta(seconds=5)
        monkeypatch.setattr("shoal.loop.release.now", then.isoformat)
        release.begin(3, why="it is the weekend")
        for one in (second, third):
            await one.look()
        assert release.state().held is None
        assert third._split.trial is not None and third._split.trial.evidence.people(0) == 7
        steady += 25 * 3600
        await second.look()
        assert release.state().held is not None

    run(work)


def test_who_decided_by_a_state_that_is_no_more_looks_again_and_says_nothing_of_it(
    release: Release, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.follow.LOOK_SECONDS", 0.0)

    async def work() -> None:
        one, again = follower(release), asyncio.Event()
        raises = iter([ChangedError("the release was changed meanwhile"), DataError("that is told")])

        async def look() -> None:
            if (error := next(raises, None)) is not None:
                raise error
            again.set()

        one.look = look  # type: ignore[method-assign]
        running = asyncio.create_task(one.run())
        await again.wait()
        running.cancel()

    run(work)
    assert [record.getMessage() for record in caplog.records] == ["the release is not followed: that is told"]


@pytest.mark.drill
@given(
    did=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["ok", "failed", "stable", "down", "look", "again"])), max_size=60
    )
)
def test_after_all_have_looked_each_gateway_knows_what_all_of_them_counted(did: list[tuple[int, str]]) -> None:
    """Whatever the order, and though some end, each once it has told, and others start in their place."""
    canary, alone = Canary(3, 1, "now", began=7), Evidence()
    with TemporaryDirectory() as folder:

        def started() -> tuple[Seen, Trial]:
            return Seen(Path(folder)), Trial(None, "3.canary", canary, Pace())  # type: ignore[arg-type]

        def look(number: int) -> None:
            seen, trial = gateways[number]
            trial.hear(seen.others(canary))
            seen.tell(canary, trial.evidence.own)

        gateways = [started() for _ in range(3)]
        for place, (number, what) in enumerate(did):
            trial = gateways[number][1]
            if what in ("ok", "failed", "stable"):
                part = trial.part(str(place).encode(), "", canary=what != "stable")
                trial.count(Meter(), part, stable=what == "stable", failed=what == "failed")
                kind, cut = ("failures", {}) if what == "failed" else ("invalid", {"cut": 0})
                side = "stable" if what == "stable" else "canary"
                add(alone, side, 1, 1, **{"invalid": 0, "slow": (0, 0), **cut, kind: 1})
                if what == "failed":
                    alone.counts[1, 1, 1, 0] -= 1  # what failed is no answer
            elif what == "down":
                trial.remember(str(place), "3.canary", "", str(place))
                trial.vote(str(place), str(place), "down")
                alone.counts[1, 1, 3] += 1
            else:
                look(number)
            if what == "again":
                gateways[number] = started()
        for number in (0, 1, 2, 0, 1, 2):
            look(number)
        for _, trial in gateways:
            assert (trial.evidence.counts == alone.counts).all()


def test_what_a_gateway_left_in_pieces_counts_nothing_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    canary = Canary(3, 1, "now", began=7)
    (tmp_path / "canary-broken.json").write_text('{"version": 3, "began": 7, "since": "now", "evid')
    other, one = Seen(tmp_path), Seen(tmp_path)
    other.tell(canary, add(Evidence(), "canary", 4, 1).own)
    assert [len(one.others(canary)) for _ in range(3)] == [4] * 3
    assert len(caplog.records) == 1 and "lost" in caplog.text
    assert one.others(Canary(3, 1, "now", began=9)) == {}
    one.forget()
    assert not list(tmp_path.iterdir())
