"""What a gateway's capture once lost, doubled or kept without bound: no free descriptor, long prompts while there is no scribe,
a journal that became a part between two scribes, a clock that jumped before the second."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.loop import outbox
from shoal.loop.capture import FORGOTTEN, JOURNAL, Capture, now_ms
from shoal.loop.facts import Facts, packed
from shoal.loop.forget import forget
from shoal.loop.outbox import WHOLE, Outbox
from shoal.loop.parts import adopt
from shoal.loop.rows import Row
from shoal.loop.votes import Vote, Votes
from shoal.loop.writer import Writer

NOON = 1_795_780_800_000  # 2026-11-27 12:00, UTC
DAY = 86_400_000


def facts(number: int, prompt: int = 0) -> Facts:
    return {"id": f"chatcmpl-{number}", "at": NOON + number}, [[2**20] * prompt], ("v", 9), []


def ids(capture: Capture) -> list[str]:
    return capture.rows()["id"].to_pylist()


def until(true: Callable[[], bool], box: Outbox) -> None:
    for _ in range(6000):
        if true():
            return
        box.look()
        time.sleep(0.01)
    raise AssertionError("it does not come")


def killed(box: Outbox) -> None:
    """Its scribe is, and has ended."""
    os.kill(box.scribe, signal.SIGKILL)
    while box._lives():
        time.sleep(0.01)


@pytest.mark.drill
def test_a_gateway_that_has_no_free_descriptor_keeps_its_rows_until_it_has_one(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as less:
        less.setattr(os, "pipe", full)
        box.put(facts(1))
        box.look()  # what calls it once a second would end with an error
        box.put(facts(2))
    assert box.lag > 0 and not box.dropped
    until(lambda: box.lag == 0, box)
    assert ids(capture) == ["chatcmpl-1", "chatcmpl-2"]


def test_prompts_that_wait_for_a_scribe_take_no_more_memory_than_they_may(
    capture: Capture, box: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 prompts of 100,000 tokens were 2 GB. The rows come, without what surprises in them."""
    monkeypatch.setattr(outbox, "KEPT_BYTES", 2**17)
    box._again = time.monotonic() + 1e6  # no scribe can be begun
    for number in range(200):
        box.put(facts(number, prompt=10_000))
    held = sum(len(frame) for _, frame in box._kept)
    assert held == box._kept_bytes < 2**17 + 200 * WHOLE
    box._again = 0.0
    until(lambda: box.lag == 0, box)
    assert ids(capture) == [f"chatcmpl-{number}" for number in range(200)]
    assert box._kept_bytes == 0 and not box.dropped


def test_what_a_killed_scribe_had_written_is_not_written_again_where_somebody_made_a_part_of_it(
    capture: Capture, box: Outbox
) -> None:
    """As `shoal forget` does, and a gateway that starts."""
    box.put(facts(1))
    box.put(facts(2))
    until(lambda: box.lag == 0, box)
    killed(box)
    box._shared["taken"], box._taken = 0, 0  # as if it had been killed a moment before it told
    assert adopt(capture) == 1
    for number in (1, 2, 3):
        box._keep(time.monotonic(), packed(facts(number)))
    until(lambda: box.lag == 0, box)
    assert ids(capture) == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]


def test_a_folder_is_where_it_was_when_the_service_began(
    capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    box = Outbox("capture")
    monkeypatch.chdir("/")
    box.put(facts(1))
    until(lambda: box.lag == 0, box)
    box.close()
    assert ids(capture) == ["chatcmpl-1"]


def test_a_scribe_that_follows_a_killed_one_believes_no_clock_that_was_set_since_the_service_began(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own it would remove all that is older than 90 days of a wrong date."""
    old = Writer(capture, start=False)
    old.put(Row("old", now_ms() - 100 * DAY))
    old.close()
    with monkeypatch.context() as then:
        then.setattr(outbox, "now_ms", lambda: now_ms() - 200 * DAY)
        box = Outbox(str(capture.folder))
    box.put(({"id": "new", "at": now_ms()}, [], None, []))
    until(lambda: box.bytes > 0, box)  # it has begun to tidy
    box.close()
    assert ids(capture) == ["old", "new"]


def test_the_log_says_once_that_the_pipe_is_full_though_some_rows_still_fit(
    box: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    box.put(facts(0))
    until(lambda: box.lag == 0, box)
    os.kill(box.scribe, signal.SIGSTOP)
    try:
        while not box.dropped["queue"]:
            box.put(facts(1, prompt=10_000))
        for _ in range(20):
            box.put(facts(2))
            box.put(facts(3, prompt=10_000))
        assert box.dropped["queue"] == 21
        assert sum("dropped" in record.message for record in caplog.records) == 1
    finally:
        os.kill(box.scribe, signal.SIGCONT)
    until(lambda: box.lag == 0, box)


# ---- the writer ------------------------------------------------------------------------------------------------------


def test_a_row_that_goes_into_a_journal_that_somebody_removed_is_counted_and_the_next_is_kept(capture: Capture) -> None:
    made = Writer(capture, start=False)
    made.put(Row("one", NOON))
    for path in (capture.folder / JOURNAL).iterdir():
        path.unlink()
    made.put(Row("two", NOON))
    assert made.rows == 1 and made.dropped == {"disk": 1}
    made.look()
    made.put(Row("three", NOON))
    assert ids(capture) == ["three"] and made.rows == 2
    made.look()
    assert made._closed == []
    shutil.rmtree(capture.folder / JOURNAL)
    made.put(Row("four", NOON))
    made.look()
    made.put(Row("five", NOON))
    assert made.dropped == {"disk": 3} and made.rows == 2
    made.close()


def odd(capture: Capture) -> Path:
    """A journal of which no part can be made, the first of all."""
    path = capture.folder / JOURNAL / "0-odd.jsonl"
    path.write_text('{"id": "odd", "at": "never"}\n')
    return path


def test_a_journal_that_nobody_can_read_keeps_no_other_from_being_a_part_and_no_day_from_going(
    capture: Capture,
) -> None:
    old = Writer(capture, start=False)
    old.put(Row("old", now_ms() - 100 * DAY))
    old.close()
    (capture.folder / JOURNAL / "1-dead.jsonl").write_text(f'{{"id": "dead", "at": {now_ms()}}}\n')
    journal = odd(capture)
    made = Writer(capture, start=False)
    made.look()
    assert journal.exists() and [path.stem for path in capture.parts()] == ["part-1-dead"]
    first, made._journal = made._journal, made._open()
    second, made._journal = made._journal, made._open()
    first.write([b'{"id": "x", "at": "never"}\n'])
    second.write([Row("two", now_ms()).line()])
    made._closed = [first, second]
    made.look()
    assert made._closed == [first] and {path.stem for path in capture.parts()} >= {f"part-{second.path.stem}"}
    made.close()


def test_nothing_is_captured_any_more_of_who_was_forgotten_a_moment_ago(capture: Capture) -> None:
    made = Writer(capture, start=False)
    made.put(Row("one", NOON, subject="a" * 32))
    assert forget(capture, subject="a" * 32).journals == 1
    made.put(Row("two", NOON, subject="a" * 32), Row("three", NOON))
    ((_, lines),) = capture.journals()
    assert [line["id"] for line in lines] == ["one", "three"]
    (capture.folder / FORGOTTEN).unlink()
    (capture.folder / FORGOTTEN).mkdir()  # as one that belongs to somebody else, it cannot be read
    made.put(Row("four", NOON, subject="a" * 32), Row("five", NOON))
    (capture.folder / FORGOTTEN).rmdir()
    ((_, lines),) = capture.journals()
    assert [line["id"] for line in lines] == ["one", "three", "five"] and not made.dropped
    made.close()


def test_all_but_one_journal_is_rid_of_who_is_forgotten_where_that_one_cannot_be_read(capture: Capture) -> None:
    made = Writer(capture, start=False)
    made.put(Row("chatcmpl-1", NOON, subject="a" * 32))
    made.close()
    Votes(capture).put(Vote("chatcmpl-1", "a" * 32, "down", comment="it is Ann's"))
    odd(capture)
    with pytest.raises(DataError, match="forget"):
        forget(capture, subject="a" * 32)
    assert capture.parts() == [] and "Ann" not in told(capture.folder)


def told(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())
