"""Captured rows: to a journal, to parts, and back; whatever happens to the process, the disk and the clock between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import DataError
from shoal.loop.capture import ABOUT, FORGOTTEN, JOURNAL, TEXTS, Capture, day_of
from shoal.loop.parts import adopt
from shoal.loop.rows import SCHEMA, Row, table_of
from shoal.loop.texts import Texts
from shoal.loop.writer import Bounds, Writer

NOON = 1_795_780_800_000  # 2026-11-27 12:00, UTC
DAY = 86_400_000


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    return Capture(tmp_path / "capture", create=True)


def row(number: int, at: int = NOON, **known: Any) -> Row:
    return Row(f"chatcmpl-{number}", at + number, prompt_tokens=number, **known)


def ids(capture: Capture, **of: Any) -> list[str]:
    return capture.rows(**of)["id"].to_pylist()


VALUES = {
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    pa.int64(): st.integers(0, 2**42),
    pa.int32(): st.integers(0, 2**31 - 1),
    pa.int16(): st.integers(0, 2**15 - 1),
    pa.float32(): st.floats(-1e6, 1e6).map(lambda x: round(x, 6)),
    pa.bool_(): st.booleans(),
    pa.list_(pa.float32()): st.lists(st.floats(-10, 10).map(lambda x: round(x, 6)), max_size=3),
}


@st.composite
def any_row(draw: st.DrawFn) -> Row:
    found = {
        column.name: draw(VALUES[column.type] if column.name in ("id", "at") else st.none() | VALUES[column.type])
        for column in SCHEMA
    }
    return Row(**found)


@given(any_row())
def test_a_line_of_a_journal_holds_what_the_row_does(one: Row) -> None:
    line = one.line()
    assert line.count(b"\n") == 1
    assert table_of([json.loads(line)]).equals(pa.Table.from_pylist([asdict(one)], SCHEMA))


def test_a_number_that_is_not_finite_is_not_known() -> None:
    one = replace(row(1), answer_nll=float("nan"), predicted_gaps=[0.5, float("inf")])
    found = json.loads(one.line())
    assert found["answer_nll"] is None and found["predicted_gaps"] == [0.5, None]


def test_rows_are_read_from_the_journal_and_from_parts_once_each(capture: Capture) -> None:
    writer = Writer(capture, Bounds(journal_bytes=1), start=False)
    for number in range(3):
        writer.put(row(number))
        assert ids(capture) == [f"chatcmpl-{n}" for n in range(number + 1)]
        writer.look()  # a part of each
    assert len(capture.parts()) == 3
    writer.put(row(3))
    assert ids(capture) == [f"chatcmpl-{n}" for n in range(4)] and writer.rows == 4
    writer.close()
    assert [*capture.journals()] == [] and len(ids(capture)) == 4
    assert ds.dataset(capture.folder / "rows", partitioning="hive").to_table().num_rows == 4


def test_a_part_whose_journal_is_still_there_is_not_read_twice(capture: Capture) -> None:
    """As between the two moments at which the one comes and the other goes."""
    writer = Writer(capture, start=False)
    writer.put(row(1))
    journal = next((capture.folder / JOURNAL).glob("*.jsonl"))
    kept = journal.read_bytes()
    writer.close()
    journal.write_bytes(kept)
    assert len(capture.parts()) == 1 and ids(capture) == ["chatcmpl-1"]
    assert adopt(capture) == 1 and not journal.exists() and ids(capture) == ["chatcmpl-1"]


def test_rows_go_to_the_day_on_which_they_ended(capture: Capture) -> None:
    writer = Writer(capture, start=False)
    for number, at in enumerate((NOON, NOON + DAY, NOON - DAY)):
        writer.put(row(number, at))
    writer.close()
    assert capture.days() == [day_of(NOON + days * DAY) for days in (-1, 0, 1)]
    assert ids(capture, days=2) == ["chatcmpl-0", "chatcmpl-1"]
    assert ids(capture, since=NOON + DAY) == ["chatcmpl-1"]


def test_forgotten_rows_are_seen_by_no_reader_and_make_no_part(capture: Capture) -> None:
    writer = Writer(capture, start=False)
    for number in range(4):
        writer.put(row(number, subject="a" * 32 if number % 2 else "b" * 32))
    lines = [{"subject": "a" * 32}, {"id": "chatcmpl-0"}]
    (capture.folder / FORGOTTEN).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ids(capture) == ["chatcmpl-2"]
    writer.close()
    assert ids(capture) == ["chatcmpl-2"]
    assert ds.dataset(capture.folder / "rows").to_table()["id"].to_pylist() == ["chatcmpl-2"]
    again = Writer(capture, start=False)
    again.put(row(9, subject="a" * 32))
    again.close()
    assert ids(capture) == ["chatcmpl-2"]


def test_columns_that_an_older_part_lacks_are_null(capture: Capture) -> None:
    import pyarrow.parquet as pq

    place = capture.folder / "rows" / "day=2026-11-01"
    place.mkdir()
    old = pa.table({"id": ["old"], "at": pa.array([NOON], pa.int64()), "status": pa.array([200], pa.int16())})
    pq.write_table(old, place / "part-x.parquet")
    found = capture.rows().to_pylist()[0]
    assert found["id"] == "old" and found["status"] == 200 and found["router_distance"] is None
    assert capture.rows().schema.equals(SCHEMA)


@pytest.mark.parametrize(
    ("about", "told"),
    [
        ('{"format": "shoal.capture", "version": 2}', "shoal.capture 2'; allowed: shoal.capture 1"),
        ('{"format": "other", "version": 1}', "other 1'; allowed: shoal.capture 1"),
        ("[]", "None None"),
        ("{", "not JSON"),
    ],
)
def test_another_version_is_refused_by_name(capture: Capture, about: str, told: str) -> None:
    (capture.folder / ABOUT).write_text(about)
    for create in (False, True):
        with pytest.raises(DataError, match=r"^capture: ") as caught:
            Capture(capture.folder, create=create)
        assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_other_things_does_not_become_a_capture(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        Capture(tmp_path, create=True)
    with pytest.raises(DataError, match=r"no capture\.json"):
        Capture(tmp_path)


# ---- whatever happens ------------------------------------------------------------------------------------------------


def run(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


def test_a_process_that_is_killed_loses_no_row(capture: Capture) -> None:
    """Each row that `put` has returned for is told on stdout; the kill comes while rows are written and parts are made."""
    script = """
        import sys
        from shoal.loop.capture import Capture
        from shoal.loop.rows import Row
        from shoal.loop.writer import Bounds, Writer
        writer = Writer(Capture(sys.argv[1]), Bounds(journal_bytes=20_000))
        for number in range(10**9):
            writer.put(Row(str(number), 1_795_780_800_000 + number))
            sys.stdout.write(f"{number}\\n")
            sys.stdout.flush()
    """
    process = run(script, capture.folder)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(3000)]
    process.send_signal(signal.SIGKILL)
    told += process.stdout.readlines()
    process.wait()
    last = int([line for line in told if line.endswith("\n")][-1])
    found = {int(each) for each in ids(capture)}
    assert found >= set(range(last + 1)) and len(found) == capture.rows().num_rows <= last + 2
    assert adopt(capture) >= 1
    assert {int(each) for each in ids(capture)} == found and [*capture.journals()] == []


def test_the_journal_of_a_process_that_lives_is_not_adopted(capture: Capture) -> None:
    writer, other = Writer(capture, start=False), Writer(capture, start=False)
    writer.put(row(1))
    assert adopt(capture) == 0 and capture.parts() == []
    writer.put(row(2))
    writer.close()
    other.close()
    assert len(ids(capture)) == 2


def test_a_full_disk_drops_and_counts_and_what_is_written_stays_whole(capture: Capture) -> None:
    """The kernel cuts the journal off at 20,000 bytes, within a line; then it has room again."""
    script = """
        import resource, signal, sys
        from shoal.loop.capture import Capture
        from shoal.loop.rows import Row
        from shoal.loop.writer import Bounds, Writer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = Writer(Capture(sys.argv[1]), start=False)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        for number in range(1000):
            writer.put(Row(str(number), 1_795_780_800_000 + number))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        for number in range(1000, 1010):
            writer.put(Row(str(number), 1_795_780_800_000 + number))
        print(writer.rows, writer.dropped["disk"])
    """
    process = run(script, capture.folder, stderr=subprocess.PIPE)
    said, errors = process.communicate(timeout=120)
    rows, dropped = map(int, said.split())
    found = [int(each) for each in ids(capture)]
    assert rows + dropped == 1010 and dropped > 100 and len(found) == rows
    assert found[-10:] == [*range(1000, 1010)]
    assert errors.count("captured rows are dropped") == 1, errors


def test_of_a_batch_that_the_disk_takes_in_part_the_whole_lines_are_kept_and_the_rest_is_counted(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, write = Writer(capture, start=False), os.write
    line = len(row(1).line())
    cuts = [2 * line + 5, 0, 1, 10_000]  # in a line; nothing; the line's end alone
    monkeypatch.setattr("shoal.loop.writer.os.write", lambda descriptor, data: write(descriptor, data[: cuts.pop(0)]))
    kept = []
    for first in (1, 4, 5, 6):
        batch = [row(number) for number in range(first, first + (3 if first in (1, 6) else 1))]
        writer.put(*batch)
        kept.append((writer.rows, writer.dropped["disk"]))
    assert kept == [(2, 1), (2, 2), (2, 3), (5, 3)]
    assert ids(capture) == [f"chatcmpl-{n}" for n in (1, 2, 6, 7, 8)]
    writer.close()


def test_old_days_go_one_at_a_time_and_not_because_a_clock_was_set(
    capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    days = [NOON - 3 * DAY, NOON - 2 * DAY, NOON]
    clock = [NOON]
    writer = Writer(capture, Bounds(keep_days=1), wall=lambda: clock[0], start=False)
    for number, at in enumerate(days):
        writer.put(row(number, at))
    writer.close()
    writer = Writer(capture, Bounds(keep_days=1), wall=lambda: clock[0], start=False)
    clock[0] += 400 * DAY
    writer.tidy()
    writer.tidy()
    assert len(capture.days()) == 3 and caplog.text.count("the clock was set by +9600.0 h") == 1
    clock[0] = NOON
    for left in (2, 1, 1):
        writer.tidy()
        assert len(capture.days()) == left
    writer.close()


def test_texts_count_and_the_oldest_day_goes_with_its_texts_first(capture: Capture) -> None:
    """Texts alone were too much: rows went for them, day after day, and they stayed."""
    writer = Writer(capture, wall=lambda: NOON, start=False)
    for number, at in enumerate([NOON - 2 * DAY, NOON - DAY, NOON]):
        writer.put(row(number, at))
        told = {"id": f"chatcmpl-{number:032x}", "choices": []}
        Texts(capture, lambda at=at: at).put("shop", None, [{"content": "x" * 10_000}], told, {})
    writer.close()
    days = capture.days()
    kept, seen = 2**30, []
    for _ in range(6):
        writer = Writer(capture, Bounds(max_bytes=kept), wall=lambda: NOON, start=False)
        writer.tidy()
        writer.close()
        seen.append((len(capture.days(TEXTS)), len(capture.days())))
        kept = writer.bytes - 1
    assert seen == [(3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (1, 1)] and capture.days() == days[-1:]


def test_a_day_that_the_disk_keeps_is_tried_once_a_round(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(capture, wall=lambda: NOON, start=False)
    writer.put(row(0, NOON - DAY))
    writer.close()
    tried = []

    def kept(folder: Path, ignore_errors: bool) -> None:
        tried.append(folder)
        assert len(tried) < 9, "again and again"

    monkeypatch.setattr(shutil, "rmtree", kept)
    writer = Writer(capture, Bounds(max_bytes=1), wall=lambda: NOON, start=False)
    writer.tidy()
    writer.close()
    assert len(tried) == 1 and len(capture.days()) == 1 and writer._over


def test_the_oldest_day_goes_where_all_is_too_much_and_today_s_rows_are_dropped(capture: Capture) -> None:
    writer = Writer(capture, wall=lambda: NOON, start=False)
    for number, at in enumerate([NOON - DAY, NOON]):
        writer.put(row(number, at))
    writer.close()
    writer = Writer(capture, Bounds(max_bytes=1), wall=lambda: NOON, start=False)
    writer.tidy()
    assert capture.days() == [day_of(NOON)] and writer.bytes > 1
    writer.put(row(7))
    assert writer.dropped == {"bound": 1}
    writer.close()
