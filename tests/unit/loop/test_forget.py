"""Forgetting: what of a person or an answer is left in the folder, and who is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from shoal import Model, cli
from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError
from shoal.loop import learned
from shoal.loop.capture import Capture, Forgotten, subject
from shoal.loop.cut import Settings, cut
from shoal.loop.forget import LOCK, forget
from shoal.loop.labels import CORRECTION, Found, Labelled
from shoal.loop.parts import write_part
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
    def full(path: Path, table: object, **more: object) -> None:
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
    assert learned.label in (printed := out()) and later.label not in printed, "it has learned from them for good"
    assert cli.main([*command, "--user", "nobody", "--release", str(release.directory)]) == 0
    assert "learned" not in capsys.readouterr().out
    assert cli.main([*command[:-1], str(tmp_path / "none"), "--user", "u9"]) == 1
    assert "is no cut" in capsys.readouterr().err


def test_whoever_learned_from_them_is_named_without_the_cut_and_so_is_what_was_made_of_it(
    capture: Capture, tmp_path: Path
) -> None:
    rows = [
        Labelled(
            [{"role": "user", "content": f"when, {n}?"}, {"role": "assistant", "content": "soon"}], CORRECTION, f"p{n}"
        )
        for n in range(40)
    ]
    cut(Found(rows, len(rows)), tmp_path / "cut", Settings())
    release = Release(tmp_path / "release")
    Model.from_preset("test").save(tmp_path / "model")
    release.add(tmp_path / "model")
    release.add(tmp_path / "model", lineage=cut_lineage(tmp_path / "cut"))
    release.add(tmp_path / "model", lineage={"kind": "router", "parent": 2})
    release.add(tmp_path / "model", lineage={"parent": 2})  # by hand, of whatever it was made
    assert release.version(2).lineage["cut"].keys().isdisjoint(("names", "persons"))
    shutil.rmtree(tmp_path / "cut")
    for _ in range(2):
        told = forget(capture, subject="p7", learned=[learned.by_releases([release.directory], [])]).elsewhere
        assert [line.split(" version ", 1)[1].split(";")[0].split(" ", 1)[1] for line in told] == [
            "has learned from them", "was made of version 2, which has learned from them"
        ]  # fmt: skip
    assert forget(capture, subject="p77", learned=[learned.by_releases([release.directory], [])]).elsewhere == []
    assert release.check() == 4


def test_the_work_that_a_retraining_left_goes_with_the_words_in_it(capture: Capture, tmp_path: Path) -> None:
    Model.from_preset("test").save(tmp_path / "model")
    release = Release(tmp_path / "release")
    release.add(tmp_path / "model")
    works = [release.directory / learned.WORK / name for name in ("ab-finetune-1", "cd-finetune-1")]
    for work, whose in zip(works, ("p7", "p8"), strict=True):
        work.mkdir(parents=True)
        (work / "mix.jsonl").write_text(json.dumps({"messages": [], "group": learned.cut.name_of(whose)}) + "\n")
    named = learned.by_releases([release.directory], [])
    with alone(release.directory / learned.LOCK, ResourceError("")):
        assert "a retraining that runs has read them" in forget(capture, subject="p7", learned=[named]).elsewhere[0]
    assert works[0].exists()
    assert forget(capture, subject="p7", learned=[named]).elsewhere[0].startswith(str(works[0]))
    assert not works[0].exists() and works[1].exists()


def test_of_two_who_forget_at_once_neither_writes_the_other_s_person_back(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def meanwhile(*given: object, **more: object) -> None:
        if not seen:
            seen.append("other")
            monkeypatch.setattr("shoal.loop.forget.LOCK_SECONDS", 0.0)
            with pytest.raises(ResourceError, match=f"another forgets in {capture.folder}"):
                forget(capture, subject=BOB)
        write_part(*given, **more)  # type: ignore[arg-type]

    adopted = Writer(capture, start=False)
    for number, whose in enumerate((ANN, BOB, "c" * 32)):
        adopted.put(Row(name(20 + number), NOON, subject=whose))
    adopted.close()
    monkeypatch.setattr("shoal.loop.forget.write_part", meanwhile)
    forget(capture, subject=ANN)
    forget(capture, subject=ANN)  # whoever comes next does what the other could not
    assert seen and set(ds.dataset(capture.folder / "rows").to_table()["subject"].to_pylist()) == {"c" * 32}
    assert (capture.folder / LOCK).exists()


@pytest.mark.parametrize("where", ["journal", "part", "memory"])
def test_no_vote_is_taken_on_what_somebody_who_is_forgotten_was_told(tmp_path: Path, where: str) -> None:
    capture = Capture(tmp_path, create=True)
    writer, votes = Writer(capture, start=False), Votes(capture)
    for number, whose in enumerate((ANN, BOB)):
        writer.put(Row(name(number), NOON, subject=whose))
        if where == "memory":
            votes.saw(name(number), whose)
    if where == "part":
        writer.close()
        assert votes.knows(name(0)), "and it is remembered from now on"
    forget(capture, subject=ANN)
    assert [votes.knows(name(number)) for number in (0, 1)] == [False, True]
    assert not votes.comes(name(0))
    if where != "part":
        writer.close()


def test_who_is_in_an_earlier_cut_that_is_replayed_goes_from_the_later_one_as_well(tmp_path: Path) -> None:
    def rows(asked: str, begin: int) -> list[Labelled]:
        said = {"role": "assistant", "content": "soon"}
        chats = [[{"role": "user", "content": f"{asked}, {n}?"}, said] for n in range(begin, begin + 40)]
        return [Labelled(chat, CORRECTION, f"p{begin + n}", f"id-{begin + n}") for n, chat in enumerate(chats)]

    cut(Found(rows("when", 0), 40), tmp_path / "1", Settings())
    cut(Found(rows("why", 100), 40), tmp_path / "2", Settings(), replay=tmp_path / "1/train.jsonl")
    trained = (tmp_path / "1/train.jsonl").read_text()
    number = next(n for n in range(40) if learned.cut.name_of(f"p{n}") in trained)
    assert f"when, {number}?" in (tmp_path / "2/train.jsonl").read_text()
    assert learned.forget(tmp_path / "2", Forgotten(set(), {f"p{number}"})) == [f"{tmp_path / '2'}: 1 rows taken out"]
    assert f"when, {number}?" not in (tmp_path / "2/train.jsonl").read_text()
    assert learned.cut.read(tmp_path / "2")["before"][0]["lost"] == [learned.cut.name_of(f"p{number}")]
