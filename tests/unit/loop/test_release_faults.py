"""What went wrong once in a release: two who change it at once, a log that was cut and written on, a version that was changed
with its own sum, and verdicts on something else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import Model
from shoal.cli import main
from shoal.errors import CheckpointError, DataError, ResourceError, UsageError
from shoal.loop import versions
from shoal.loop.canary import advanced
from shoal.loop.release import STATE, Release
from shoal.machine import write_json
from shoal.model.files import weights_sha256
from shoal.stages.retrain import Retrain

PASSED: dict[str, Any] = {"passed": True, "checks": []}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        Model.from_preset("test", seed=seed).save(root / str(seed))
    return [root / str(seed) for seed in range(3)]


def removed(release: Release, number: int) -> None:
    """By somebody who made room."""
    folder = release.version(number).directory
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def release(tmp_path: Path, models: list[Path]) -> Release:
    """Version 2 serves, 1 did before; 3 is a candidate."""
    made = Release(tmp_path / "release")
    made.add(models[0])
    made.add(models[1], verdict=PASSED)
    made.promote(why="better")
    made.add(models[2], verdict=PASSED)
    return made


@pytest.mark.parametrize("what", ["hold", "set_auto", "promote", "begin", "rollback"])
def test_a_folder_that_is_no_release_is_not_made_one_by_a_change(tmp_path: Path, what: str) -> None:
    typo = Release(tmp_path / "suport")
    with pytest.raises(UsageError, match=r"is not a release.*make one"):
        getattr(typo, what)(*["off"] * (what == "set_auto"), why="x")
    assert not typo.directory.exists()


def test_a_retraining_of_a_folder_that_is_no_release_makes_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a release"):
        Retrain(release=tmp_path / "suport", cut=tmp_path).run()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("text", ["", "3", "[3]", '{"format": 1'])
def test_a_state_that_nobody_wrote_here_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(DataError, match=r"cannot read .*release\.json"):
        Release(tmp_path).state()


def test_two_who_take_back_one_canary_at_once_leave_what_serves(release: Release) -> None:
    release.begin(why="try")
    seen = release.state().number
    release.rollback(why="bad", seen=seen)
    with pytest.raises(UsageError, match="changed meanwhile"):
        release.rollback(why="bad, says another gateway", seen=seen)
    assert release.state().stable == 2


def test_who_takes_back_a_canary_that_has_just_ended_does_not_take_back_what_serves(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    release.begin(why="try")
    release.rollback(3, why="by its evidence")
    command = ["release", "rollback", "--release", str(release.directory), "--why", "I saw it fail"]
    assert main([*command, release.version(3).label]) == 2
    assert "what would be taken back is another version" in " ".join(capsys.readouterr().err.split())
    assert release.state().stable == 2
    assert main([*command, "2"]) == 0 and release.state().stable == 1


@pytest.mark.parametrize("done", ["rollback", "hold"])
def test_what_goes_on_by_itself_undoes_nothing_that_a_person_did_meanwhile(release: Release, done: str) -> None:
    release.begin(why="try")
    state = release.state()
    assert state.canary is not None
    getattr(release, done)(why="a person says so")
    after = release.state()
    for go_on in (
        lambda: release.step(advanced(state.canary, "now"), why="clear", seen=state.number),  # type: ignore[arg-type]
        lambda: release.promote(3, why="clear", force=True, seen=state.number),
        lambda: release.hold(why="clear", seen=state.number),
        lambda: release.begin(3, why="auto", seen=state.number),
    ):
        with pytest.raises(UsageError, match="changed meanwhile"):
            go_on()
    assert release.state() == after


def test_a_log_whose_end_was_cut_off_is_found_out_after_further_changes_too(release: Release) -> None:
    release.promote(3, why="in secret", force=True)
    lines = release.audit.lines()
    release.audit.path.write_text("".join(f"{line}\n" for line in lines[:-1]))
    release.hold(why="to see")
    with pytest.raises(DataError, match="does not follow"):
        release.check()
    release.set_auto("off", why="to see")
    with pytest.raises(DataError, match="does not follow"):
        release.check()
    assert release.state().stable == 3


def test_a_line_that_was_put_in_with_the_next_number_is_no_change_that_was_interrupted(release: Release) -> None:
    lines, state = release.audit.lines(), release.state()
    forged = {**json.loads(lines[-1]), "number": state.number + 1, "before": versions.hashlib.sha256().hexdigest()}
    forged["state"] = {**forged["state"], "number": state.number + 1, "stable": 1}
    release.audit.path.write_text("".join(f"{line}\n" for line in (*lines, json.dumps(forged))))
    release.hold(why="to see")
    assert release.state().stable == 2
    with pytest.raises(DataError, match="does not follow"):
        release.check()


def test_a_state_that_is_gone_is_what_the_audit_log_says(release: Release, models: list[Path]) -> None:
    before = release.state()
    (release.directory / STATE).unlink()
    made = release.add(models[0])
    after = release.state()
    assert (after.stable, after.previous, after.candidate, after.number) == (2, 1, made.number, before.number + 1)
    assert release.check() == after.number


def test_the_number_of_a_version_that_somebody_removed_is_no_other_ones(release: Release, models: list[Path]) -> None:
    removed(release, 3)
    again = release.add(models[2], verdict=PASSED)
    assert again.number == 4 and release.promote(4, why="better").number == 4


def test_a_version_that_was_changed_with_its_sum_is_not_served(release: Release, models: list[Path]) -> None:
    version = release.version(3)
    shutil.rmtree(version.served)
    shutil.copytree(models[0], version.served)
    sha256 = versions.content_sha256(version.directory)
    (version.directory / versions.MANIFEST).chmod(0o644)
    write_json(version.directory / versions.MANIFEST, {"number": 3, "sha256": sha256, "made": version.made})
    for work in (lambda: release.promote(3, why="x"), lambda: release.begin(3, why="x"), release.check):
        with pytest.raises(CheckpointError, match="version 3 was changed, and its sha256 with it"):
            work()
    assert release.state().stable == 2


def test_a_version_that_a_wrong_clock_put_into_the_future_ends_no_retraining_for_good(tmp_path: Path) -> None:
    version = SimpleNamespace(made="2099-01-01T00:00:00+00:00", lineage={"kind": "router", "minutes": 2.0}, passed=None)
    made: list[Any] = [version]
    with pytest.raises(UsageError, match=r"the cooldown.*one 0 minutes ago"):
        Retrain(release=tmp_path, cut=tmp_path)._need_room(made)
    assert Retrain(release=tmp_path, cut=tmp_path, cooldown=0.0)._need_room(made) == 2.0


def test_a_disk_that_is_full_is_one_line_and_no_line_of_the_log(
    release: Release, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, lines = release.state(), release.audit.lines()

    def full(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as then:
        then.setattr(Path, "write_text", full)
        then.setattr(shutil, "copytree", full)
        for work in (
            lambda: release.hold(why="x"),
            lambda: release.promote(3, why="x"),
            lambda: release.add(models[2]),
        ):
            with pytest.raises(ResourceError, match="cannot be written: got 'No space left on device'"):
                work()
    assert release.state() == before and release.audit.lines() == lines and release.check() == len(lines)
    assert [path.name for path in (release.directory / versions.FOLDER).iterdir() if path.name.startswith(".")] == []


def verdict(candidate: Path, stable: Path) -> dict[str, Any]:
    of = {
        name: {"weights_sha256": weights_sha256(path)} for name, path in (("candidate", candidate), ("stable", stable))
    }
    return PASSED | of


def test_a_verdict_on_another_model_is_none_on_this_one(release: Release, models: list[Path]) -> None:
    count = len(release.versions())
    with pytest.raises(UsageError, match="the verdict is on another model"):
        release.add(models[2], verdict=verdict(models[0], models[1]))
    assert len(release.versions()) == count
    release.add(models[2], verdict=verdict(models[2], models[1]))


def test_a_verdict_beside_another_version_than_the_stable_one_is_to_be_given_anew(
    release: Release, models: list[Path]
) -> None:
    old = release.add(models[2], verdict=verdict(models[2], models[0])).number
    with pytest.raises(UsageError, match="against another than the stable one"):
        release.promote(old, why="x")
    with pytest.raises(UsageError, match="against another than the stable one"):
        release.begin(old, why="x")
    release.begin(old, why="I know", force=True)
    assert release.audit.entries()[-1]["figures"] == {"forced": True}
    release.promote(old, why="I know", force=True)
    assert release.audit.entries()[-1]["figures"] == {"forced": True} and release.state().stable == old
    release.rollback(why="worse")
    new = release.add(models[2], verdict=verdict(models[2], models[1])).number
    assert release.promote(new, why="better").number == new


def test_a_version_that_was_written_and_not_added_goes_with_the_next_and_counts_for_nothing(
    release: Release, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command was killed before the audit log had its line."""
    with monkeypatch.context() as then, pytest.raises(KeyboardInterrupt):
        then.setattr(Release, "_change", lambda *given, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        release.add(models[0], lineage={"kind": "router", "minutes": 2.0})
    assert release.left() == [release.version(4).directory] and release.check() == 4
    made = release.add(models[1])
    assert made.number == 4 and "kind" not in made.lineage and release.left() == []
    release.audit.path.write_text("".join(f"{line}\n" for line in release.audit.lines()[:-1]))
    assert release.left() == [], "a log that was cut off takes no version with it"
    release.add(models[2])
    assert [each.number for each in release.versions()] == [1, 2, 3, 4, 5]


def test_a_model_that_is_replaced_while_it_is_copied_is_no_version(
    release: Release, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(source: Path, to: Path) -> Path:
        monkeypatch.undo()
        shutil.copytree(source, to)
        shutil.copyfile(models[0] / "model.safetensors", to / "model.safetensors")
        return to

    monkeypatch.setattr(shutil, "copytree", torn)
    with pytest.raises(CheckpointError, match=r"model.safetensors was changed"):
        release.add(models[2])
    assert len(release.versions()) == 3 and release.check() == 4
