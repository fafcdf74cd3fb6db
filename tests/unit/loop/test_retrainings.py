"""How retrainings of a release went, of those too that made no version."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shoal import Model
from shoal.cli import main
from shoal.errors import DataError, ResourceError
from shoal.loop import retrainings
from shoal.loop.cut import Settings, cut
from shoal.loop.labels import Found, Labelled
from shoal.loop.release import Release
from shoal.loop.retrainings import FILE, Retrainings, Run, one, read, seen, settled, tidy
from shoal.train.run import StoppedError


def outcomes(release: Path) -> list[str]:
    return [run.outcome for run in read(release).runs]


def run(release: Path, passed: bool | None) -> None:
    with one(release, 3.0) as ended:
        ended(passed)


def test_those_in_a_row_are_counted_until_one_may_serve(tmp_path: Path) -> None:
    assert read(tmp_path) == Retrainings()
    run(tmp_path, False)
    assert read(tmp_path).failed == 1
    with pytest.raises(ZeroDivisionError), one(tmp_path, 3.0):
        raise ZeroDivisionError("no disk")
    assert read(tmp_path).failed == 2 and read(tmp_path).runs[-1].why == "no disk"
    with pytest.raises(KeyboardInterrupt), one(tmp_path, 3.0):
        raise KeyboardInterrupt
    assert read(tmp_path).failed == 2, "a person ended it: that says nothing"
    for passed in (True, None):
        run(tmp_path, passed)
        assert read(tmp_path).failed == 0
    assert outcomes(tmp_path) == ["refused", "failed", "ended", "passed", "unjudged"]


def test_who_is_asked_to_stop_is_known_to_have_been_at_once(tmp_path: Path) -> None:
    """What runs in a job is killed three seconds later."""
    stops = list[Callable[[], None]]()
    with pytest.raises(StoppedError), one(tmp_path, 3.0, stops):
        assert outcomes(tmp_path) == ["works"]
        for tell in stops:
            tell()
        assert outcomes(tmp_path) == ["ended"] and read(tmp_path).runs[0].minutes < 3
        raise StoppedError("stopped at step 7")
    assert (outcomes(tmp_path), read(tmp_path).failed, stops) == (["ended"], 0, [])


def test_one_that_was_killed_is_counted_by_the_next(tmp_path: Path) -> None:
    with one(tmp_path, 3.0) as ended:
        during = (tmp_path / FILE).read_text()
        ended(True)
    (tmp_path / FILE).write_text(during)  # as a kill leaves it
    assert read(tmp_path).failed == 0 and outcomes(tmp_path) == ["works"]
    run(tmp_path, False)
    assert read(tmp_path).failed == 2 and outcomes(tmp_path) == ["killed", "refused"]
    assert read(tmp_path).runs[0].minutes == 3.0, "as long as it was asked to take"


def test_one_that_was_killed_once_its_version_was_made_is_no_failure_and_its_minutes_are_the_version_s(
    tmp_path: Path,
) -> None:
    with one(tmp_path, 3.0) as ended:
        during = (tmp_path / FILE).read_text()
        ended(True)
    (tmp_path / FILE).write_text(during)  # as a kill leaves it
    now = datetime.now(UTC)
    settled(tmp_path, {(now - timedelta(days=2)).isoformat(): False, now.isoformat(timespec="milliseconds"): True})
    assert outcomes(tmp_path) == ["passed"] and (read(tmp_path).failed, read(tmp_path).spent(now)) == (0, 0.0)
    (tmp_path / FILE).write_text(during)
    settled(tmp_path, {(now - timedelta(days=2)).isoformat(): False})
    assert outcomes(tmp_path) == ["killed"] and (read(tmp_path).failed, read(tmp_path).spent(now)) == (1, 3.0)


def test_the_minutes_of_one_that_was_killed_are_spent_when_the_next_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Model.from_preset("test", seed=3).save(tmp_path / "model")
    release = Release(tmp_path / "release")
    release.add(tmp_path / "model")
    talks = [
        [{"role": "user", "content": f"item {n}?"}, {"role": "assistant", "content": f"shelf {n}"}] for n in range(20)
    ]
    rows = [Labelled(talk, "correction", f"person {n}", str(n)) for n, talk in enumerate(talks)]
    cut(Found(rows, 20), tmp_path / "cut", Settings(heldout=0.4))
    with one(release.directory, 40.0) as ended:
        during = (release.directory / FILE).read_text()
        ended(True)
    (release.directory / FILE).write_text(during)
    words = ["retrain", "--release", str(release.directory), "--cut", str(tmp_path / "cut"), "--minutes", "40"]
    assert main(words) == 2
    assert "40 spent, 40 asked for" in " ".join(capsys.readouterr().err.split())


def test_minutes_without_a_version_are_spent_for_a_day(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ago = [(now - timedelta(hours=hours)).isoformat() for hours in (30, 20, 2, -5)]
    runs = tuple(
        Run(began, outcome, 10.0) for began, outcome in zip(ago, ("failed", "killed", "passed", "ended"), strict=True)
    )
    known = Retrainings(1, runs)
    assert known.spent(now) == 20.0  # of a clock that was ahead, too
    retrainings._write(tmp_path, known)
    run(tmp_path, True)
    assert outcomes(tmp_path) == ["killed", "passed", "ended", "passed"], "older ones are forgotten"


@pytest.mark.parametrize("days", [1, 400])
def test_a_clock_that_was_ahead_delays_nothing_for_longer_than_what_it_noted(tmp_path: Path, days: int) -> None:
    """By one that is set right meanwhile, and by one that jumps back and comes again."""
    now, six = datetime.now(UTC).replace(microsecond=0), timedelta(hours=6)
    made = (now + timedelta(days=days)).isoformat()
    retrainings._write(tmp_path, Retrainings(1, (Run(made, "failed", 10.0),)))
    known = seen(tmp_path, [made], now)
    assert known.age(made, now) == timedelta() and known.spent(now) == 10.0
    later = now + six + timedelta(seconds=1)
    known = seen(tmp_path, [made], later)
    assert known.age(made, later) >= six and known.spent(later) == 10.0
    tomorrow = now + timedelta(hours=24, seconds=1)
    known = seen(tmp_path, [made], tomorrow)
    if days > 1:
        assert known.spent(tomorrow) == 0.0 and known.age(made, tomorrow) >= 4 * six
    before = now - timedelta(days=9000)  # a machine that begins in 2002 until it has asked for the time
    known = seen(tmp_path, [made, now.isoformat()], before)
    assert known.age(now.isoformat(), before) == timedelta()
    there = now + timedelta(days=days, hours=1)
    known = seen(tmp_path, [made], there)
    assert known.behind == "" and known.age(made, there) == timedelta(hours=1)


def test_what_nobody_goes_on_with_is_removed_and_what_may_be_gone_on_with_is_not(tmp_path: Path) -> None:
    assert tidy(tmp_path / "none", 3) == 0
    names = ("aa-finetune-3", "bb-router-3", "aa-finetune-2", "cc-finetune-13", "old-finetune-3")
    for name in names:
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "metrics.jsonl").write_text("{}")
    ahead, week = time.time() + 4e5, time.time() - 8 * 86_400
    for path in (tmp_path / "old-finetune-3").rglob("*"):
        os.utime(path, (week, week))
    os.utime(tmp_path / "old-finetune-3", (week, week))
    os.utime(tmp_path / "bb-router-3", (ahead, ahead))
    assert tidy(tmp_path, 3) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aa-finetune-3", "bb-router-3"]


def test_what_is_no_work_stays_and_a_link_to_nothing_ends_no_retraining(tmp_path: Path) -> None:
    """A file of the file system's own, a folder elsewhere, and what a worker that outlived its command takes away."""
    (tmp_path / "retrain" / "aa-finetune-2").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "retrain" / ".nfs0001").write_text("open")
    (tmp_path / "retrain" / "bb-finetune-2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "retrain" / "aa-finetune-2" / "latest").symlink_to("nowhere")
    assert tidy(tmp_path / "retrain", 3) == 1
    assert sorted(path.name for path in (tmp_path / "retrain").iterdir()) == [".nfs0001", "bb-finetune-2"]
    assert (tmp_path / "elsewhere").is_dir()


def test_with_the_half_of_what_was_being_removed_nobody_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed in the middle; of the same stable version, whose folder would be as new as that."""
    folder, week = tmp_path / "aa-finetune-3", time.time() - 8 * 86_400
    folder.mkdir()
    for name in ("manifest.json", "weights"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (week, week))
    os.utime(folder, (week, week))

    def killed(path: Path) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr("shutil.rmtree", killed)
        tidy(tmp_path, 3)
    assert not folder.exists()
    assert tidy(tmp_path, 3) == 1 and not any(tmp_path.iterdir())


def test_what_cannot_be_removed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aa-finetune-2").mkdir()

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr("shutil.rmtree", busy)
    with pytest.raises(ResourceError, match="aa-finetune-2 cannot be removed: got 'Directory not empty'"):
        tidy(tmp_path, 3)


@pytest.mark.parametrize("text", ["", "[3]", "3", '{"failed": "two"}', '{"runs": [{"began": 3}]}'])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"retrain\.json cannot be read.*[:;] remove it") as raised:
        read(tmp_path)
    assert "\n" not in raised.value.message
    (tmp_path / FILE).write_text(json.dumps({"failed": 2, "runs": []}))
    assert read(tmp_path).failed == 2
