"""What a cut of a release held out is learned by no later version of it, and who was trained on is held out by none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.cli import main
from shoal.errors import DataError
from shoal.loop import earlier
from shoal.loop.asked import Asked, forbidden
from shoal.loop.capture import Capture, Forgotten
from shoal.loop.cut import RECENT, TRAIN, Settings, asked, cut, known_of, mixed, person_of, read
from shoal.loop.earlier import Earlier
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
    known = earlier.before(release, tmp_path / "second")
    assert known == Earlier((tmp_path / "first",), (tmp_path / "first",), ())
    assert earlier.before(release, tmp_path / "first") == earlier.NONE
    never = known.held_out()
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
    assert earlier.before(release).all == (tmp_path / "first",)
    shutil.rmtree(tmp_path / "first")
    assert [version.number for version in earlier.before(release).lost] == [2]
    shutil.copytree(tmp_path / "second", tmp_path / "first")
    assert [version.number for version in earlier.before(release).lost] == [2]


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


def corrected(numbers: range, first_person: int) -> list[Labelled]:
    return [
        Labelled(
            [
                {"role": "user", "content": f"item number {n} please?"},
                {"role": "assistant", "content": f"shelf {n * 7 % 10}"},
            ],
            CORRECTION,
            f"person {first_person + n % 60}",
            f"chatcmpl-{n:032x}",
        )
        for n in numbers
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_who_an_earlier_cut_trained_on_is_not_held_out_by_one_that_asks_for_more_people(tmp_path: Path) -> None:
    """300 rows leave a fifth of the people, 560 more of them: without lineage those the first trained on."""
    first, both = corrected(range(300), 0), [*corrected(range(300), 0), *corrected(range(300, 560), 60)]
    cut(Found(list(first), 1), tmp_path / "first", Settings())
    known = Earlier((tmp_path / "first",), (tmp_path / "first",), ())
    learned, held = known.trained_on(), known.held_out()
    cut(Found(list(both), 1), tmp_path / "without", Settings(), before=held)
    assert known_of(tmp_path / "without", learned) > 20
    made = cut(Found(list(both), 1), tmp_path / "second", Settings(), before=held, learned=learned)
    assert made["recent"] > 20 and known_of(tmp_path / "second", learned) == 0
    people = {person_of(row) for row in lines_of(tmp_path / "first" / TRAIN)}
    assert not people & {person_of(row) for row in lines_of(tmp_path / "second" / RECENT)}
    assert people <= {person_of(row) for row in lines_of(tmp_path / "second" / TRAIN)}, "they go on being trained on"


def test_what_was_asked_in_an_earlier_training_is_not_held_out_though_another_person_asks_it(tmp_path: Path) -> None:
    """Nor where who asked it first is in the capture no more."""
    cut(Found(corrected(range(120), 0), 1), tmp_path / "first", Settings(heldout=0.2))
    learned = Earlier((), (tmp_path / "first",), ()).trained_on()
    made = cut(Found(corrected(range(60, 180), 500), 1), tmp_path / "second", Settings(heldout=0.5), learned=learned)
    asked_first = {row["messages"][0]["content"] for row in lines_of(tmp_path / "first" / TRAIN)}
    assert not asked_first & {row["messages"][0]["content"] for row in lines_of(tmp_path / "second" / RECENT)}
    assert made["left_out"]["held out, but asked in training by another person"] > 5


def test_old_chats_of_an_earlier_cut_are_known_by_their_person_and_others_are_not(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    said = [{"role": "user", "content": "what is a reef?"}, {"role": "assistant", "content": "a ridge"}]
    groups = ("0123456789abcdef", "17")
    old.write_text("".join(json.dumps({"messages": said, "group": group}) + "\n" for group in groups))
    cut(found(), tmp_path / "cut", Settings(heldout=0.4), replay=old)
    learned = Earlier((), (tmp_path / "cut",), ()).trained_on()
    assert groups[0] in learned.people and groups[1] not in learned.people
    assert learned.asked.holds(said[:1])


def test_who_is_held_out_is_not_replayed_from_an_earlier_cut_of_no_release(tmp_path: Path) -> None:
    """Of 23 people who were held out 21 were trained on as old chats: with other questions of theirs."""
    cut(Found(corrected(range(300), 0), 1), tmp_path / "first", Settings())
    later, old = Found(corrected(range(300, 900), 0), 1), tmp_path / "first" / TRAIN
    made = cut(later, tmp_path / "second", Settings(seed=1), replay=old)
    trained, held = ({person_of(row) for row in lines_of(tmp_path / "second" / name)} for name in (TRAIN, RECENT))
    assert made["replay"] > 100 and len(held) > 10 and not trained & held


def test_a_turn_of_a_talk_that_is_held_out_is_asked_by_nobody_alone() -> None:
    held = Asked()
    held.add([{"role": "user", "content": "Hello"}, {"role": "user", "content": "Where is order 77?"}])
    assert held.holds([{"role": "user", "content": "where is order 77"}])
    talk = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "Where is order 78?"}]
    assert not held.holds(talk), "another talk that begins likewise"


def test_what_earlier_cuts_of_a_release_trained_on_is_not_measured_on(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["retrain", "--release", str(release.directory), "--cut", str(tmp_path / "second"), "--cooldown", "0"]
    assert main(words) == 1
    assert "holds out what earlier cuts trained on: got '" in " ".join(capsys.readouterr().err.split())


def test_of_a_version_whose_router_alone_was_fitted_nobody_was_trained_on(release: Release, tmp_path: Path) -> None:
    lineage = cut_lineage(tmp_path / "second") | {"kind": "router"}
    release.add(tmp_path / "model", lineage=lineage, verdict={"passed": False, "checks": []})
    found = earlier.before(release)
    assert found.all == (tmp_path / "first", tmp_path / "second") and found.learned == (tmp_path / "first",)
