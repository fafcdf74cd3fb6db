"""Versions, what serves, and the audit log: what is promised of each after every change, and after what interrupts one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal import Model, cli
from shoal.api.trial import Trial
from shoal.data.alone import alone
from shoal.errors import CheckpointError, DataError, ResourceError, ShoalError, UsageError
from shoal.loop import versions
from shoal.loop.canary import Pace
from shoal.loop.canary_state import MOST, MOST_SHADOWS
from shoal.loop.evidence import MOST_PEOPLE
from shoal.loop.gate import Check
from shoal.loop.learned import learners
from shoal.loop.paired import FAIL, PASS
from shoal.loop.release import LOCK, STATE, Release
from shoal.loop.versions import cut_lineage

PASSED: dict[str, Any] = {"passed": True, "checks": [asdict(Check("frozen", PASS, ""))]}
REFUSED = {"passed": False, "checks": [*PASSED["checks"], asdict(Check("recent", FAIL, ""))]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "three")):
        Model.from_preset("test", seed=seed).save(root / name)
    spoken = Model.from_preset("test")
    spoken.chat_template += " "
    spoken.save(root / "spoken")
    wide = Model.from_preset("test")
    (root / "wide").mkdir()
    wide.save(root / "wide")
    told = json.loads((root / "wide" / "config.json").read_text())
    told["model"]["rope_theta"] = 2 * told["model"].get("rope_theta", 10_000.0)
    (root / "wide" / "config.json").write_text(json.dumps(told))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def release(tmp_path: Path, models: dict[str, Path]) -> Release:
    """Version 1 serves, 2 is a candidate that passed the gate, 3 one that it refused."""
    made = Release(tmp_path / "release")
    made.add(models["one"])
    made.add(models["two"], verdict=PASSED)
    made.add(models["three"], verdict=REFUSED)
    return made


def roles(release: Release) -> tuple[int | None, int | None, int | None]:
    state = release.state()
    return state.stable, state.previous, state.candidate


def test_a_version_is_promoted_and_taken_back(release: Release) -> None:
    assert roles(release) == (1, None, 3)
    assert release.promote(2, why="better").number == 2
    assert roles(release) == (2, 1, 3) and release.stable().number == 2
    assert release.rollback(why="worse").number == 1
    assert roles(release) == (1, None, 3)
    with pytest.raises(UsageError, match="nothing to roll back"):
        release.rollback(why="again")
    with pytest.raises(UsageError, match="stable one already"):
        release.promote(1, why="again")
    entries = release.audit.entries()
    assert [(entry["what"], entry["from"], entry["to"]) for entry in entries[3:]] == [
        ("promote", 1, 2),
        ("rollback", 2, 1),
    ]
    assert release.check() == 5


def test_what_the_gate_did_not_let_pass_needs_force_and_a_reason_and_that_is_kept(
    release: Release, models: dict[str, Path]
) -> None:
    with pytest.raises(UsageError, match="refused: recent"):
        release.promote(why="hope")
    unasked = release.add(models["two"]).number
    with pytest.raises(UsageError, match="not asked"):
        release.promote(unasked, why="hope")
    with pytest.raises(UsageError, match="not asked"):
        release.begin(unasked, why="hope")
    with pytest.raises(ShoalError, match="give the reason"):
        release.promote(3, why=" ", force=True)
    assert release.state().stable == 1
    release.promote(3, why="the suite is wrong", force=True, who="ann")
    last = release.audit.entries()[-1]
    assert (last["who"], last["why"], last["figures"]) == ("ann", "the suite is wrong", {"forced": True})


@pytest.mark.parametrize(("name", "what"), [("spoken", "chat template"), ("wide", "shape")])
def test_a_candidate_that_could_not_take_the_place_is_no_version(
    release: Release, models: dict[str, Path], name: str, what: str
) -> None:
    with pytest.raises(CheckpointError, match=what):
        release.add(models[name])
    assert len(release.versions()) == 3 and release.check() == 3


def test_a_candidate_of_another_tokenizer_is_no_version(
    release: Release, models: dict[str, Path], tmp_path: Path
) -> None:
    other = Model.load(models["two"])
    other.save(tmp_path / "other")
    told = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(told, indent=3))
    with pytest.raises(CheckpointError, match="tokenizer"):
        release.add(tmp_path / "other")


def test_a_version_that_was_changed_is_not_served(release: Release) -> None:
    card = release.version(2).served / "README.md"
    card.chmod(0o644)
    card.write_text("better than it is")
    for work in (lambda: release.promote(2, why="x"), lambda: release.begin(2, why="x"), release.check):
        with pytest.raises(CheckpointError, match="version 2 was changed"):
            work()
    assert roles(release) == (1, None, 3)


def test_the_files_of_a_version_cannot_be_written(release: Release) -> None:
    assert {path.stat().st_mode & 0o222 for path in release.version(1).directory.rglob("*") if path.is_file()} == {0}


def test_an_answers_header_leads_to_its_cut_in_one_command(
    release: Release, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / versions.CUT).write_text(json.dumps({"train": 7, "sha256": {"train.jsonl": "ab"}, "ids": ["a"]}))
    made = release.add(models["two"], lineage=cut_lineage(cut), verdict=PASSED)
    assert cli.main(["release", "show", made.label, "--release", str(release.directory), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cut"] == cut_lineage(cut)["cut"]["sha256"] and shown["lineage"]["cut"]["train"] == 7
    assert [*learners(release, (), ["ab", "cd"])] == [made.number] and not learners(release, (), ["cd"])
    assert shown["lineage"]["parent"] == 1
    with pytest.raises(UsageError, match="in this release"):
        release.version(f"{made.number}.000000000000")
    with pytest.raises(UsageError, match="not a cut"):
        cut_lineage(tmp_path)


def test_it_is_known_when_a_version_served(release: Release) -> None:
    release.promote(2, why="better")
    release.rollback(why="worse")
    hours, entries = release.served_hours(), release.audit.entries()
    assert hours == {
        1: [(entries[0]["at"], entries[3]["at"]), (entries[4]["at"], None)],
        2: [(entries[3]["at"], entries[4]["at"])],
    }


def test_a_second_command_at_once_is_refused(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.loop.release.WAIT_SECONDS", 0.1)
    with alone(release.directory / LOCK, ResourceError("")), pytest.raises(ResourceError, match="another command"):
        release.promote(2, why="x")
    release.promote(2, why="x")


@pytest.mark.parametrize("lost", [True, False])
def test_a_change_that_was_interrupted_is_finished_by_the_next(release: Release, lost: bool) -> None:
    """The audit log had it, and the state not yet; or neither had."""
    before = (release.directory / STATE).read_text()
    release.promote(2, why="better")
    if not lost:
        log = release.audit.lines()
        release.audit.path.write_text("".join(f"{line}\n" for line in log[:-1]))
    (release.directory / STATE).write_text(before)
    assert release.state().stable == 1
    release.hold(why="to see")
    assert release.state().stable == (2 if lost else 1)
    assert release.check() == (5 if lost else 4)


def changed(line: str) -> str:
    return line.replace('"why": "better"', '"why": "bitter"')


@pytest.mark.parametrize(
    "tamper",
    [
        lambda lines: [changed(line) for line in lines],
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:-1], lines[-1].replace("worse", "nicer")],
        lambda lines: [*lines[:-1], "nonsense"],
    ],
)
def test_a_changed_audit_log_is_found(
    release: Release, tamper: Callable[[list[str]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    release.promote(2, why="better")
    release.rollback(why="worse")
    command = ["release", "log", "--check", "--release", str(release.directory)]
    assert cli.main(command) == 0
    release.audit.path.write_text("".join(f"{line}\n" for line in tamper(release.audit.lines())))
    capsys.readouterr()
    assert cli.main(command) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(DataError):
        release.check()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    line=st.integers(0, 4), place=st.integers(0, 200), letter=st.characters(codec="ascii", exclude_categories=["Cc"])
)
def test_any_letter_of_an_audit_log_counts(release: Release, line: int, place: int, letter: str) -> None:
    if len(release.audit.entries()) == 3:
        release.promote(2, why="better")
        release.rollback(why="worse")
    lines = release.audit.lines()
    at = place % len(lines[line])
    if lines[line][at] == letter:
        return
    other = [*lines]
    other[line] = lines[line][:at] + letter + lines[line][at + 1 :]
    try:
        release.audit.path.write_text("".join(f"{each}\n" for each in other))
        with pytest.raises(DataError):
            release.check()
    finally:
        release.audit.path.write_text("".join(f"{each}\n" for each in lines))


@pytest.mark.parametrize(("step", "asked"), [(0, "shadows"), (1, "people"), (2, "people")])
def test_a_step_takes_no_more_people_than_are_kept_of_it(release: Release, step: int, asked: str) -> None:
    """Else it never ends: of the first 20,000 people one in twenty is a canary's."""
    with pytest.raises(UsageError, match=asked):
        release.begin(2, why="try", **{asked: 10_000})  # type: ignore[arg-type]
    release.begin(2, why="try", shadows=MOST_SHADOWS, people=MOST)
    canary = release.state().canary
    assert canary is not None
    trial = Trial(None, "2.canary", replace(canary, step=step), Pace())  # type: ignore[arg-type]
    for number in range(MOST_PEOPLE):
        talk = str(number).encode()
        for side in (False, True) if not step else (trial.takes(talk),):
            trial.evidence.see(str(trial.part(talk, "", canary=side).key), "failures", False)
        if trial.evidence.people(step) >= trial.canary.enough:
            return
    raise AssertionError("a step that never ends")


def test_a_canary_begins_steps_and_is_taken_back(release: Release) -> None:
    release.begin(2, why="try")
    canary = release.state().canary
    assert canary is not None and (canary.version, canary.step) == (2, 0)
    with pytest.raises(UsageError, match="runs already"):
        release.begin(3, why="try", force=True)
    release.step(replace(canary, step=1), why="200 requests")
    release.hold(why="lunch")
    assert release.state().held == "lunch"
    release.begin(2, why="back")
    state = release.state()
    assert state.held is None and state.canary is not None and state.canary.step == 1
    assert release.rollback(why="bad").number == 1
    assert release.state().canary is None and roles(release) == (1, None, None)
    with pytest.raises(UsageError, match="another canary"):
        release.step(canary, why="late")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("list", 2, "not a release"),
        ("promote 7 --why x", 2, "version"),
        ("promote --why x", 2, "refused: recent"),
        ("show 2.ffff", 2, "in this release"),
        ("auto always --why x", 2, "auto"),
        ("rollback --why x", 2, "nothing to roll back"),
    ],
)
def test_a_wrong_command_says_so_in_a_line(
    release: Release, tmp_path: Path, words: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none" if words == "list" else release.directory
    assert cli.main(["release", *words.split(), "--release", str(folder)]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_release_of_another_format_is_refused(release: Release) -> None:
    told: dict[str, Any] = json.loads((release.directory / STATE).read_text())
    for wrong in ({**told, "version": 2}, {**told, "surprise": 1}, "nonsense"):
        (release.directory / STATE).write_text(json.dumps(wrong))
        with pytest.raises(ShoalError):
            release.state()
