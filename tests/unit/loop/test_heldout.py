"""What a cut of a release held out is learned by no later version of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.cli import main
from shoal.errors import DataError
from shoal.loop import heldout
from shoal.loop.asked import forbidden
from shoal.loop.capture import Capture, Forgotten
from shoal.loop.cut import RECENT, TRAIN, Settings, asked, cut, mixed, read
from shoal.loop.labels import CORRECTION, Found, Labelled
from shoal.loop.learned import forget
from shoal.loop.release import Release
from shoal.loop.texts import Texts
from shoal.loop.versions import cut_lineage
from shoal.loop.votes import Vote, Votes


def found(count: int = 60) -> Found:
    talks: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": f"item {n}?"}, {"role": "assistant", "content": f"shelf {n * 7 % 10}"}]
        for n in range(count)
    ]
    rows = [Labelled(talk, CORRECTION, f"person {n % 20}", f"chatcmpl-{n:032x}") for n, talk in enumerate(talks)]
    return Found(rows, len(rows))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """Its second version, which the gate refused, was made of the cut `first`; `second` holds out other people."""
    Model.from_preset("test", seed=3).save(tmp_path / "model")
    made = Release(tmp_path / "release")
    made.add(tmp_path / "model")
    for name, seed in (("first", 0), ("second", 1)):
        cut(found(), tmp_path / name, Settings(heldout=0.4, seed=seed))
    verdict = {"passed": False, "checks": []}
    made.add(tmp_path / "model", lineage=cut_lineage(tmp_path / "first"), verdict=verdict)
    return made


def test_what_an_earlier_cut_held_out_is_not_in_what_is_read(release: Release, tmp_path: Path) -> None:
    known, lost = heldout.before(release, tmp_path / "second")
    assert known == [tmp_path / "first" / RECENT] and not lost
    assert heldout.before(release, tmp_path / "first") == ([], [])
    never = forbidden(None, known)
    wrong = asked(tmp_path / "second", never)
    assert wrong > 5, "without lineage it would be learned"
    times, left_out = mixed(tmp_path / "second", tmp_path / "mix.jsonl", 0.25, never)
    lines = [json.loads(line) for line in (tmp_path / "mix.jsonl").read_text().splitlines()]
    assert left_out == wrong and len(lines) == times * (read(tmp_path / "second")["train"] - wrong)
    assert not any(never.holds(row["messages"][:-1]) for row in lines)
    for line in (tmp_path / "second" / TRAIN).read_text().splitlines():
        never.add(json.loads(line)["messages"][:-1])
    with pytest.raises(DataError, match="no earlier cut held out: got 'none of "):
        mixed(tmp_path / "second", tmp_path / "mix.jsonl", 0.25, never)


def test_a_cut_that_lost_a_person_is_known_and_one_that_is_gone_or_another_is_named(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forget(tmp_path / "first", Forgotten({f"chatcmpl-{1:032x}"}))
    monkeypatch.chdir("/")
    assert heldout.before(release)[0] == [tmp_path / "first" / RECENT]
    shutil.rmtree(tmp_path / "first")
    assert [version.number for version in heldout.before(release)[1]] == [2]
    shutil.copytree(tmp_path / "second", tmp_path / "first")
    assert [version.number for version in heldout.before(release)[1]] == [2]


def test_curate_leaves_it_out_and_counts_it(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = Capture(tmp_path / "capture", create=True)
    for row in found().rows:
        completion = {"id": row.id, "model": "fish", "choices": [{"message": {"content": "I know"}}]}
        Texts(capture).put("shop", row.person, row.messages[:-1], completion, {})
        Votes(capture).put(Vote(row.id, row.person, "down", correction=row.answer))
    words = ["curate", "--capture", str(capture.folder), "--out", str(tmp_path / "third"), "--json"]
    words += ["--heldout", "0.1"]  # of those that the first held out, most are no more
    assert main([*words, "--release", str(tmp_path / "first")]) == 2
    assert "is not a release" in capsys.readouterr().err
    assert main([*words, "--release", str(release.directory)]) == 0, capsys.readouterr().err
    made, held = read(tmp_path / "third"), read(tmp_path / "first")["recent"]
    assert 0 < made["recent"] < held, "the same people are held out again"
    assert made["left_out"]["held out by an earlier cut"] == held - made["recent"]
    assert asked(tmp_path / "third", forbidden(None, [tmp_path / "first" / RECENT])) == 0
