"""What went wrong once in watching, curating and judging: rows of one id, numbers that are none, files that others left, and
promises about chance that did not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shoal import Model, cli
from shoal.errors import DataError, ResourceError
from shoal.loop.asked import forbidden
from shoal.loop.canary import judged
from shoal.loop.canary_state import Canary
from shoal.loop.capture import Capture, Forgotten
from shoal.loop.cut import MANIFEST, RECENT, TRAIN, Settings, _manifest, cut, read
from shoal.loop.forget import forget as forget_all
from shoal.loop.labels import CORRECTION, Found, Labelled, kept_texts, labelled, said
from shoal.loop.learned import forget
from shoal.loop.reference import measured
from shoal.loop.release import Release
from shoal.loop.rows import Row
from shoal.loop.surprisal import Surprisal
from shoal.loop.texts import Texts
from shoal.loop.unread import Read, unread
from shoal.loop.votes import Vote, Votes
from shoal.loop.writer import Writer
from tests.canaries import both

NOON = 1_795_780_800_000  # 2026-11-27 12:00, UTC
ANN = "a" * 32


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "capture", create=True)


def corrected(count: int) -> Found:
    def chat(number: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"when, {number}?"}, {"role": "assistant", "content": "soon"}]

    return Found([Labelled(chat(number), CORRECTION, f"p{number}", f"id-{number}") for number in range(count)], count)


# --- watching -----------------------------------------------------------------------------------------------------------


def test_requests_of_one_id_are_as_many_rows_as_they_are(capture: Capture) -> None:
    """A client names its requests, and tries a refused one again under its name."""
    made = Writer(capture, start=False)
    read, seen = Read(), list[int]()
    for _ in range(3):
        for _ in range(2):
            made.put(Row("again", NOON + len(seen), status=429))
        some, read = unread(capture, read)
        seen.append(len(some))
    made.put(Row("again", NOON + 9, status=429))
    made.close()
    some, read = unread(capture, read)
    assert [*seen, len(some), len(unread(capture, read)[0])] == [2, 2, 2, 1, 0]


def test_a_vote_from_the_future_hides_none_that_comes_before_it(capture: Capture) -> None:
    made = Writer(capture, start=False)
    for number in range(3):
        made.put(Row(f"chatcmpl-{number}", NOON + number))
    for number, at in enumerate([NOON + 10**10, NOON + 5]):
        Votes(capture, wall=lambda at=at: at).put(Vote(f"chatcmpl-{number}", ANN, "down"))  # type: ignore[misc]
    some, read = unread(capture, Read(), NOON / 1000)
    assert some["id"].to_pylist() == ["chatcmpl-0", "chatcmpl-1", "chatcmpl-2", "vote-chatcmpl-1"]
    Votes(capture, wall=lambda: NOON + 6).put(Vote("chatcmpl-2", ANN, "up"))
    some, read = unread(capture, read, NOON / 1000)
    assert some["id"].to_pylist() == ["vote-chatcmpl-2"]
    some, read = unread(capture, read, NOON / 1000 + 10**7)
    assert some["id"].to_pylist() == ["vote-chatcmpl-0"]
    made.close()


def test_votes_that_another_machine_sends_late_are_read_once_as_well(capture: Capture) -> None:
    """They come after ours that were given later."""
    made = Writer(capture, start=False)
    for number in range(4):
        made.put(Row(f"chatcmpl-{number}", NOON + number))
    made.close()

    def seen(read: Read) -> tuple[list[str], Read]:
        some, read = unread(capture, Read(**json.loads(json.dumps(asdict(read)))), NOON / 1000 + 90)
        return [one for one in some["id"].to_pylist() if one.startswith("vote")], read

    Votes(capture, wall=lambda: NOON + 60_000).put(Vote("chatcmpl-0", ANN, "down"))
    first, read = seen(Read())
    late = capture.folder / "feedback" / "day=2026-11-27" / "votes-other.jsonl"
    late.write_text(json.dumps({"id": "chatcmpl-1", "subject": ANN, "rating": "down", "at": NOON + 31_000}) + "\n")
    second, read = seen(read)
    Votes(capture, wall=lambda: NOON + 70_000).put(Vote("chatcmpl-0", ANN, "up"))
    third, read = seen(read)
    assert [first, second, third, seen(read)[0]] == [["vote-chatcmpl-0"], ["vote-chatcmpl-1"], ["vote-chatcmpl-0"], []]
    before, _ = seen(Read(read.done, read.open, NOON + 60_000))
    assert before == ["vote-chatcmpl-0"], "what was kept by an older version says up to when it had read"


def test_a_number_that_its_column_makes_infinite_is_not_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    far = [10.0**39 if place % 50 == 0 else float(rng.normal()) for place in range(1000)]
    table = pa.table({"at": np.arange(1000) * 1000, "router_bound": pa.array(far, pa.float64()).cast(pa.float32())})
    reference = measured(table, "w")
    reference.write(tmp_path / "reference.json")
    assert all(np.isfinite(standard.mean).all() for standard in reference.standards)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04torn"])
def test_a_table_of_tokens_that_was_not_written_to_its_end_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokens.npz").write_bytes(data)
    with pytest.raises(DataError, match="no table of tokens"):
        Surprisal.read(tmp_path / "tokens.npz")


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_where_few_values_are_far_from_all_others_an_e_value_is_at_most_1_in_the_mean(share: float) -> None:
    """As a router's bound is, which is 0 where it takes all layers, or the depth of answers."""
    rng, found = np.random.default_rng(round(share * 100)), []

    def drawn(count: int) -> pa.Table:
        rare = rng.random(count) < share
        return pa.table(
            {"at": np.arange(count) * 60_000, "router_bound": np.where(rare, rng.exponential(size=count), 0.0)}
        )

    for _ in range(8):
        reference = measured(drawn(2_000), "w")
        values = reference.standardised(drawn(100_000))
        for stream, some in zip(reference.streams, values, strict=True):
            found.append(
                stream.e_values(some[: len(some) // stream.block * stream.block].reshape(-1, stream.block)).mean(0)
            )
    assert np.median(np.max(found, axis=(1, 2))) < 1 and np.max(found) < 3, "estimates of so few rare values vary"


# --- curating -----------------------------------------------------------------------------------------------------------


def test_a_question_in_parts_is_compared_with_what_suites_ask(capture: Capture, tmp_path: Path) -> None:
    question = "where is my order of the first of may please tell me now before it is too late"
    for number in range(2):
        id_ = f"chatcmpl-{number:032x}"
        parts = [{"type": "text", "text": text} for text in (f"{number}: hello, ", question)]
        answer = {"id": id_, "model": "fish", "choices": [{"message": {"content": "?"}}]}
        Texts(capture).put("shop", ANN, [{"role": "user", "content": parts}], answer, {})
        Votes(capture).put(Vote(id_, ANN, correction="It is there."))
    (tmp_path / "suite.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    found = labelled(kept_texts(capture), said(capture), {})
    assert found.rows[0].messages[0]["content"] == f"0: hello, {question}"
    never = forbidden(None, [tmp_path / "suite.jsonl"])
    assert all(never.holds(row.messages[:-1]) for row in found.rows)


def test_who_is_forgotten_while_a_cut_is_made_is_not_in_it(
    capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        id_, whose = f"chatcmpl-{number:032x}", f"{number:032x}"
        answer = {"id": id_, "model": "fish", "choices": [{"message": {"content": "?"}}]}
        Texts(capture).put("shop", whose, [{"role": "user", "content": f"secret {number}?"}], answer, {})
        Votes(capture).put(Vote(id_, whose, correction="It is there."))

    def meanwhile(*given: Any, **more: Any) -> Any:
        forget_all(capture, subject=f"{7:032x}")
        return cut(*given, **more)

    monkeypatch.setattr("shoal.loop.cut.cut", meanwhile)
    assert cli.main(["curate", "--capture", str(capture.folder), "--out", str(tmp_path / "cut"), "--json"]) == 0
    files = {name: (tmp_path / "cut" / name).read_text() for name in (TRAIN, RECENT, MANIFEST)}
    assert "secret 7?" not in files[TRAIN] + files[RECENT] and "secret 8?" in files[TRAIN] + files[RECENT]
    assert read(tmp_path / "cut")["sha256"] == json.loads(files[MANIFEST])["sha256"]


def test_the_second_of_two_that_make_one_cut_is_told_so_and_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        cut(corrected(50), out, Settings(seed=1))
        return _manifest(*given)

    monkeypatch.setattr("shoal.loop.cut._manifest", meanwhile)
    monkeypatch.setattr("shoal.loop.cut.os.getpid", lambda: 1)  # of another process
    with pytest.raises(DataError, match="exists"):
        cut(corrected(50), out, Settings())
    assert read(out)["settings"]["seed"] == 1 and [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_disk_that_is_full_while_a_cut_is_made_or_loses_somebody_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    out = tmp_path / "cut"
    with monkeypatch.context() as then:
        then.setattr("os.fsync", full)
        with pytest.raises(ResourceError, match="cut cannot be written: got 'No space left on device'; make room"):
            cut(corrected(50), out, Settings())
        assert [*tmp_path.iterdir()] == []
        then.undo()
        cut(corrected(50), out, Settings())
        before, id_ = (out / TRAIN).read_text(), json.loads((out / TRAIN).read_text().splitlines()[0])["id"]
        then.setattr("os.fsync", full)
        with pytest.raises(
            ResourceError, match="cut cannot be written: got 'No space left on device'; make room, and do"
        ):
            forget(out, Forgotten({id_}, set()))
    assert (out / TRAIN).read_text() == before and read(out)["train"]
    assert forget(out, Forgotten({id_}, set())) == [f"{out}: 1 rows taken out"]


def test_one_whose_half_is_taken_away_with_somebody_who_is_forgotten_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"

    def meanwhile(*given: Any) -> Any:
        monkeypatch.undo()
        with monkeypatch.context() as then:
            then.setattr("shoal.loop.cut.os.getpid", lambda: 1)  # of another process
            cut(corrected(50), out, Settings(seed=1))
        forget(out, Forgotten({"x"}, set()))
        return _manifest(*given)

    monkeypatch.setattr("shoal.loop.cut._manifest", meanwhile)
    with pytest.raises(DataError, match="somebody was forgotten there, or another cut was made, meanwhile: give"):
        cut(corrected(50), out, Settings())
    assert read(out)["settings"]["seed"] == 1 and [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_what_a_killed_curate_left_goes_when_somebody_is_forgotten(tmp_path: Path) -> None:
    cut(corrected(50), tmp_path / "cut", Settings())
    left = tmp_path / ".cut.123.partial"
    left.mkdir()
    (left / TRAIN).write_text("words")
    forget(tmp_path / "cut", Forgotten({"nobody"}))
    assert not left.exists() and (tmp_path / "cut").exists()


# --- releasing ----------------------------------------------------------------------------------------------------------


@pytest.mark.drill
def test_what_a_killed_command_left_of_a_version_goes_with_the_next(tmp_path: Path) -> None:
    release = Release(tmp_path / "release")
    Model.from_preset("test").save(tmp_path / "model")
    release.add(tmp_path / "model")
    work = f"""
import os, signal
from pathlib import Path
from shoal.loop import versions
from shoal.loop.release import Release
versions.content_sha256 = lambda directory: os.kill(os.getpid(), signal.SIGKILL)
Release({str(release.directory)!r}).add({str(tmp_path / "model")!r})
"""
    assert subprocess.run([sys.executable, "-c", work], check=False).returncode == -9
    assert len([*(release.directory / "versions").iterdir()]) == 2
    assert release.add(tmp_path / "model").number == 2
    assert sorted(path.name for path in (release.directory / "versions").iterdir()) == ["000001", "000002"]
    assert release.check() == 2


def test_one_that_fails_more_often_is_taken_back_all_the_same() -> None:
    for failures, of in ((5, 5), (6, 20), (16, 200)):
        evidence = both((of, 19 * of), 1, failures=(failures, round(0.01 * 19 * of)))
        assert judged(Canary(2, 1, "now"), evidence)[0] == "back"
