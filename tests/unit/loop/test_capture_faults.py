"""What went wrong once in a capture: lines after a lost machine, values that no column holds, a writer that is used after its
end, two who write one file, and words of the forgotten that stayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shoal.errors import DataError
from shoal.loop import parts, texts, writer
from shoal.loop.capture import FORGOTTEN, Capture, append, day_of, lines_of, now_ms
from shoal.loop.forget import forget
from shoal.loop.rows import Row
from shoal.loop.texts import Texts
from shoal.loop.unread import Read, unread
from shoal.loop.votes import FILE, Vote, Votes
from shoal.loop.writer import Bounds, Writer
from shoal.machine import write_aside
from tests.clocks import tells

NOON = 1_795_780_800_000  # 2026-11-27 12:00, UTC
DAY = 86_400_000
ANN = "a" * 32
ID = f"chatcmpl-{7:032x}"


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "capture", create=True)


def put(capture: Capture, content: Any = "hello", subject: str | None = None, **completion: Any) -> Texts:
    held = Texts(capture)
    held.put("shop", subject, [{"role": "user", "content": content}],
             {"id": ID, "model": "fish", "choices": [], **completion}, {})  # fmt: skip
    return held


def test_the_line_after_one_that_a_machine_was_lost_over_is_not_lost_with_it(capture: Capture) -> None:
    (capture.folder / FORGOTTEN).write_text('{"id":"chatc')
    append(capture.folder / FORGOTTEN, {"id": ID})
    append(capture.folder / FORGOTTEN, {"subject": ANN})
    assert capture.forgotten().ids == {ID} and capture.forgotten().subjects == {ANN}


@pytest.mark.parametrize("odd", [{"tools": 40_000}, {"slice": "\ud800"}, {"max_tokens": 2**31}])
def test_a_value_that_its_column_cannot_hold_is_not_known_and_keeps_no_row_from_being_read(
    capture: Capture, odd: dict[str, Any]
) -> None:
    made = Writer(capture, Bounds(journal_seconds=0), start=False)
    made.put(Row("one", NOON, tools=1))
    made.put(Row("two", NOON, temperature=0.5, **odd))
    (name,) = odd
    for _ in range(2):  # as a journal, and as a part
        one, two = capture.rows().to_pylist()
        assert (one["id"], one["tools"], two["id"], two["temperature"], two[name]) == ("one", 1, "two", 0.5, None)
        made.look()
        assert len(capture.parts()) == 1
    made.close()


def test_a_row_that_comes_after_the_end_is_counted_and_goes_into_no_other_file(
    capture: Capture, tmp_path: Path
) -> None:
    made = Writer(capture)
    made.put(Row("one", NOON))
    made.close()
    with (tmp_path / "another").open("w"):  # which has the descriptor of the journal that was closed
        made.put(Row("two", NOON))
    assert (tmp_path / "another").read_text() == "" and made.rows == 1 and made.dropped == {"end": 1}
    made.close()
    assert capture.rows()["id"].to_pylist() == ["one"]


def test_a_row_that_comes_while_the_last_part_is_made_is_kept_or_counted(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = Writer(capture, start=False), writer.make_parts

    def meanwhile(*given: Any) -> None:
        made.put(Row("two", NOON))
        real(*given)
        made.put(Row("three", NOON))

    monkeypatch.setattr(writer, "make_parts", meanwhile)
    made.put(Row("one", NOON))
    made.close()
    assert made.rows == capture.rows().num_rows and made.rows + made.dropped["end"] == 3


def test_who_is_forgotten_while_a_part_is_made_is_not_in_it(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = Writer(capture, start=False), parts.write_part
    made.put(Row("one", NOON - DAY, subject=ANN))
    made.put(Row("two", NOON))

    def meanwhile(path: Path, table: Any) -> None:
        real(path, table)
        if not capture.forgotten().subjects:
            append(capture.folder / FORGOTTEN, {"subject": ANN})

    monkeypatch.setattr(parts, "write_part", meanwhile)
    made.close()
    assert [path.parent.name for path in capture.parts()] == ["day=2026-11-27"]
    assert capture.rows()["id"].to_pylist() == ["two"]


def test_threads_that_write_one_file_aside_each_write_it_whole(tmp_path: Path) -> None:
    faults: list[Exception] = []

    def write(size: int) -> None:
        try:
            for _ in range(100):
                write_aside(tmp_path / "one.json", json.dumps("x" * size))
                json.loads((tmp_path / "one.json").read_text())
        except (OSError, ValueError) as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=[10**n]) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == [] and [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_what_is_deleted_while_it_gets_other_metadata_stays_deleted(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, real = put(capture), texts.write_aside

    def late(path: Path, text: str) -> None:
        assert held.delete("shop", ID)
        real(path, text)

    monkeypatch.setattr(texts, "write_aside", late)
    assert held.tag("shop", ID, {"a": "b"}) is None
    assert held.get("shop", ID) is None and not [*capture.folder.glob("texts/*/*")]


def test_no_token_of_a_stored_answer_tells_what_was_taken_out_of_its_text(capture: Capture) -> None:
    tokens = [{"token": text, "bytes": [*text.encode()], "logprob": -1.0} for text in ("jo", "@", "sea.com")]
    choice = {"message": {"content": "jo@sea.com"}, "logprobs": {"content": tokens}, "token_ids": [4, 5, 6]}
    prompt = {"prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"5": {"decoded_token": "jo"}}]}
    found = put(capture, choices=[choice], **prompt).get("shop", ID)
    assert found is not None and found["completion"] == {
        "id": ID, "model": "fish", "choices": [{"message": {"content": "[email]"}, "logprobs": None}],
    }  # fmt: skip


def test_personal_data_across_parts_and_in_names_is_taken_out(capture: Capture) -> None:
    parts = [{"type": "text", "text": text} for text in ("I am jo", "@sea", ".com", " and")]
    found = put(capture, [*parts, {"type": "image"}, {"type": "text", "text": "so on"}]).get("shop", ID)
    assert found is not None and found["messages"][0]["content"] == [
        {"type": "text", "text": "I am [email] and"},
        {"type": "image"},
        {"type": "text", "text": "so on"},
    ]
    assert Texts(capture).tag("shop", ID, {"jo@sea.com": "yes"})["metadata"] == {"[email]": "yes"}  # type: ignore[index]
    assert put(capture, parts[:1] + parts[3:]).get("shop", ID)["messages"][0]["content"] == [parts[0], parts[3]]  # type: ignore[index]


def test_of_who_was_forgotten_no_vote_is_kept(capture: Capture) -> None:
    forget(capture, subject=ANN)
    forget(capture, id_=ID)
    Votes(capture).put(Vote("another", ANN, correction="my words"))
    Votes(capture).put(Vote(ID, "b" * 32, comment="on it"))
    assert all(lines_of(path) == [] for path in capture.folder.glob(f"feedback/*/{FILE}"))


def test_what_was_deleted_is_gone_from_the_disk_with_the_next_that_is_forgotten(capture: Capture) -> None:
    made = Writer(capture, start=False)
    made.put(Row(ID, now_ms()))
    made.put(Row("another", now_ms()))
    held = put(capture)
    made.close()
    Votes(capture).put(Vote(ID, ANN, correction="better"))
    assert held.delete("shop", ID)
    forget(capture, subject="b" * 32)
    left = [path for path in capture.folder.rglob("*") if path.is_file() and path.name != FORGOTTEN]
    assert not any(ID.encode() in path.read_bytes() or b"better" in path.read_bytes() for path in left)
    (part,) = capture.parts()
    assert pq.read_table(part)["id"].to_pylist() == ["another"]


def test_votes_on_an_answer_whose_row_is_gone_go_with_who_asked_for_it(capture: Capture) -> None:
    put(capture, subject=ANN)
    Votes(capture).put(Vote(ID, "b" * 32, correction="better"))
    assert forget(capture, subject=ANN).votes == 1 and Votes(capture).all() == []


@pytest.mark.parametrize("how", ["forget", "tidy"])
def test_what_a_killed_process_left_beside_a_text_goes(capture: Capture, how: str) -> None:
    work = f"""
        import os
        from pathlib import Path
        from shoal.loop.capture import Capture
        from shoal.loop.texts import Texts
        Path.replace = lambda self, to: os.kill(os.getpid(), {signal.SIGKILL:d})
        asked = [dict(role="user", content="my words")]
        Texts(Capture({str(capture.folder)!r})).put("shop", {ANN!r}, asked, dict(id={ID!r}, model="fish", choices=[]), {{}})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(work)], check=False).returncode == -signal.SIGKILL
    (left,) = capture.folder.glob("texts/*/.*")
    assert b"my words" in left.read_bytes()
    if how == "forget":
        forget(capture, subject="b" * 32)
        assert left.exists(), "somebody may be writing it"
        forget(capture, subject=ANN)
    else:
        os.utime(left, (0, 0))
        Writer(capture, start=False).tidy()
    assert not left.exists()


def test_the_newest_vote_counts_also_where_the_clock_was_set_back(capture: Capture) -> None:
    times = iter([NOON + 3_600_000, NOON, NOON + 1])
    votes = Votes(capture, wall=lambda: next(times))
    votes.put(Vote(ID, ANN, "up"))
    votes.put(Vote(ID, ANN, "down"))
    votes.put(Vote(ID, "b" * 32, "up"))
    assert [(vote.subject, vote.rating) for vote in votes.all()] == [(ANN, "down"), ("b" * 32, "up")]


def test_votes_have_their_days_as_texts_do(capture: Capture) -> None:
    Votes(capture, wall=lambda: NOON - 40 * DAY).put(Vote(ID, ANN, correction="my words"))
    Votes(capture, wall=lambda: NOON - 20 * DAY).put(Vote(ID, "b" * 32, correction="newer"))
    made = Writer(capture, wall=lambda: NOON, start=False)
    made.tidy()
    made.close()
    assert [vote.correction for vote in Votes(capture).all()] == ["newer"]


def test_a_salt_is_there_in_full_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or without room, while it is written."""

    def full(size: int) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.loop.capture.secrets.token_hex", lambda size: "beside" if size == 4 else full(size))
    with pytest.raises(DataError, match="No space left"):
        Capture(tmp_path / "capture", create=True)
    monkeypatch.undo()
    made = Capture(tmp_path / "capture", create=True)
    assert len(made.salt) == 32 and not [*made.folder.glob(".*")]
    (made.folder / "salt").write_text("")
    with pytest.raises(DataError, match="no salt"):
        _ = made.salt


def test_two_gateways_that_begin_one_capture_at_once_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Capture._make

    def late(self: Capture, about: Path) -> None:
        monkeypatch.undo()
        other = Capture(tmp_path / "capture", create=True)
        Votes(other).put(Vote(ID, ANN, "up"))
        real(self, about)

    monkeypatch.setattr(Capture, "_make", late)
    made = Capture(tmp_path / "capture", create=True)
    assert made.salt == Capture(tmp_path / "capture").salt


def test_a_day_that_goes_while_it_is_read_is_no_fault(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Writer(capture, start=False)
    made.put(Row("one", NOON, subject=ANN))
    made.close()
    gone = capture.folder / "rows" / "day=2026-01-01" / "part-gone.parquet"
    there = capture.parts()
    monkeypatch.setattr(Capture, "parts", lambda self, kind="rows": [gone, *there])
    assert capture.rows()["id"].to_pylist() == unread(capture, Read())[0]["id"].to_pylist() == ["one"]
    assert Votes(capture).knows("one") and not Votes(capture).knows("two")
    assert forget(capture, subject=ANN).rows == 1


def test_what_several_gateways_add_is_counted_before_it_is_much_more_than_may_be(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each knows what it adds itself; an hour of what others do was all too much."""
    clock, most, rate = [0.0], 10_000_000, 20_000
    tells(monkeypatch, "shoal.loop.writer", monotonic=lambda: clock[0])
    writer = Writer(capture, Bounds(max_bytes=most), wall=lambda: NOON + round(1000 * clock[0]), start=False)
    others = capture.folder / "texts" / f"day={day_of(NOON)}" / "others.json"
    others.parent.mkdir(parents=True)
    others.touch()
    counts = list[float]()
    count = writer.count
    monkeypatch.setattr(writer, "count", lambda: (counts.append(clock[0]), count()))
    while not writer._over:
        writer.look()
        clock[0] += 1.0
        os.truncate(others, round(rate * clock[0]))
    assert writer.bytes <= most + 35 * rate and len(counts) < 25
    os.truncate(others, 0)
    clock[0] += 31.0
    writer.look()
    assert not writer._over, "and rows are taken again as soon as there is room"
    writer.close()


def test_names_that_are_one_when_they_are_clean_keep_their_values(capture: Capture) -> None:
    said = {"ann@example.com": 1, "bob@example.com": 2, "[email] 2": 3, "plain": 4}
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": json.dumps(said)}}
    choices = [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]
    put(capture, choices=choices)
    found = Texts(capture).get("shop", ID)
    assert found is not None
    kept = json.loads(found["completion"]["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert kept == {"[email]": 1, "[email] 3": 2, "[email] 2": 3, "plain": 4}
