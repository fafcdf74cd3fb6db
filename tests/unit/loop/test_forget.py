"""Forgetting: what of a person or an answer is left in the folder, and who is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from shoal import Model, cli
from shoal.errors import DataError
from shoal.loop.capture import Capture, Forgotten, subject
from shoal.loop.cut import Settings, cut
from shoal.loop.forget import forget
from shoal.loop.labels import CORRECTION, Found, Labelled
from shoal.loop.release import Release
from shoal.loop.rows import Row
from shoal.loop.texts import Texts
from shoal.loop.versions import cut_lineage
from shoal.loop.votes import Vote, Votes
from shoal.loop.writer import Bounds, Writer

NOON = 1_795_780_800_000
ANN, BOB = "a" * 32, "b" * 32


def name(number: int) -> str:
    return f"chatcmpl-{number:032x}"


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Rows 0..9, the odd ones Ann's, in several parts; with a text and two votes each."""
    made = Capture(tmp_path, create=True)
    writer = Writer(made, Bounds(journal_bytes=1), start=False)
    for number in range(10):
        whose = ANN if number % 2 else BOB
        writer.put(Row(name(number), NOON + number, subject=whose, prompt_tokens=number))
        writer.look()
        completion = {"id": name(number), "model": "fish", "choices": [{"text": f"answer {number}"}]}
        Texts(made).put("shop", whose, [{"role": "user", "content": f"by {whose}"}], completion, {})
        for voter in (ANN, BOB):
            Votes(made).put(Vote(name(number), voter, "up"))
    writer.close()
    return made


def everything(capture: Capture) -> bytes:
    files = [path for path in capture.folder.rglob("*") if path.is_file() and path.name != "forgotten.jsonl"]
    table = ds.dataset(capture.folder / "rows").to_table()
    return b"".join(path.read_bytes() for path in files) + json.dumps(table.to_pylist()).encode()


def test_a_person_is_gone_from_rows_texts_and_votes_and_nobody_else_is(capture: Capture) -> None:
    told = forget(capture, subject=ANN)
    assert (told.rows, told.texts, told.votes, told.journals) == (5, 5, 15, 0)
    left = everything(capture)
    assert ANN.encode() not in left and not any(name(number).encode() in left for number in range(1, 10, 2))
    assert capture.rows()["prompt_tokens"].to_pylist() == [0, 2, 4, 6, 8]
    assert {vote.subject for vote in Votes(capture).all()} == {BOB} and len(Votes(capture).all()) == 5
    assert [text["subject"] for text in Texts(capture).all()] == [BOB] * 5
    again = forget(capture, subject=ANN)
    assert (again.rows, again.texts, again.votes) == (0, 0, 0)


def test_one_answer_is_gone(capture: Capture) -> None:
    told = forget(capture, id_=name(4))
    assert (told.rows, told.texts, told.votes) == (1, 1, 2)
    assert name(4).encode() not in everything(capture) and capture.rows().num_rows == 9


def test_rows_of_a_journal_that_is_written_now_are_hidden_at_once_and_gone_with_its_part(capture: Capture) -> None:
    writer = Writer(capture, start=False)
    writer.put(Row("x", NOON, subject=ANN))
    told = forget(capture, subject=ANN)
    assert told.journals == 1 and "x" not in capture.rows()["id"].to_pylist()
    writer.put(Row("y", NOON, subject=ANN))
    writer.close()
    assert ANN.encode() not in everything(capture)


def test_whoever_made_something_of_the_rows_is_told_what_to_take_out(capture: Capture) -> None:
    asked: list[Forgotten] = []

    def cuts(who: Forgotten) -> list[str]:
        asked.append(who)
        return ["version 12 was trained on 5 of their rows"]

    told = forget(capture, subject=ANN, elsewhere=[cuts])
    assert told.elsewhere == ["version 12 was trained on 5 of their rows"]
    assert asked[0].subjects == {ANN} and asked[0].ids == {name(number) for number in range(1, 10, 2)}


def test_a_folder_that_cannot_be_written_is_one_line_and_nothing_is_seen_any_more(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, table: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.loop.forget.write_part", full)
    for path in capture.parts():  # one part of both, that is to be written anew
        path.unlink()
    writer = Writer(capture, start=False)
    for number, whose in enumerate((BOB, ANN)):
        writer.put(Row(name(number), NOON, subject=whose))
    writer.close()
    with pytest.raises(DataError, match=r"No space left on device.*; make room, and do it again"):
        forget(capture, subject=ANN)
    assert capture.rows()["subject"].to_pylist() == [BOB]
    monkeypatch.undo()
    assert forget(capture, subject=ANN).rows == 1 and ANN.encode() not in everything(capture)


def test_the_command_forgets_who_a_key_s_requests_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = Capture(tmp_path, create=True)
    writer = Writer(capture, start=False)
    for number, user in enumerate(("u7", "u8")):
        writer.put(Row(name(number), NOON, subject=subject(capture.salt, "shop", user)))
    writer.close()
    assert cli.main(["forget", "--capture", str(tmp_path), "--key", "shop", "--user", "u7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert capture.rows()["id"].to_pylist() == [name(1)]
    for wrong in ([], ["--id", "x", "--user", "u"]):
        assert cli.main(["forget", "--capture", str(tmp_path), *wrong]) == 2
        assert "whom to forget" in capsys.readouterr().err


def test_a_cut_loses_them_as_well_and_the_versions_that_learned_from_it_are_named(
    capture: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whose = [subject(capture.salt, "shop", f"u{number}") or "" for number in range(40)]
    said = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "soon"}]
    rows = [
        Labelled([{**said[0], "content": f"when, {number}?"}, said[1]], CORRECTION, who)
        for number, who in enumerate(whose)
    ]
    cut(Found(rows, len(rows)), tmp_path / "cut", Settings())
    release = Release(tmp_path / "release")
    for seed in (0, 1):
        Model.from_preset("test", seed=seed).save(tmp_path / str(seed))
    release.add(tmp_path / "0")
    learned = release.add(tmp_path / "1", lineage=cut_lineage(tmp_path / "cut"))

    def out() -> str:
        return " ".join(capsys.readouterr().out.split())  # whatever the terminal's width

    command = ["forget", "--capture", str(capture.folder), "--key", "shop", "--cut", str(tmp_path / "cut")]
    assert cli.main([*command, "--user", "u7", "--release", str(release.directory)]) == 0
    printed = out()
    assert "1 rows taken out" in printed and f"version {learned.label} has learned" in printed
    later = release.add(tmp_path / "1", lineage=cut_lineage(tmp_path / "cut"))
    assert cli.main([*command, "--user", "u8", "--release", str(release.directory)]) == 0
    assert later.label in (printed := out()) and learned.label in printed
    assert cli.main([*command, "--user", "u7", "--release", str(release.directory)]) == 0
    assert "learned" not in capsys.readouterr().out
    assert cli.main([*command[:-1], str(tmp_path / "none"), "--user", "u9"]) == 1
    assert "is no cut" in capsys.readouterr().err
