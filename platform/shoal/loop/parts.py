"""A journal becomes parts: the rows of each day in a file of parquet, under the journal's name.

Notable: a part is a function of its journal: made twice, it is the same. It says which frames its rows were in (`scribe`): a
scribe that follows one that was killed may get them once more.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.errors import first_line
from shoal.loop.capture import JOURNAL, ROWS, Capture, day_of, lines_of
from shoal.loop.rows import table_of
from shoal.machine import aside, see_on_disk

FRAMES = b"frames"  # in what a part says of itself: spans of numbers, first and last
LEFT_SECONDS = 60.0  # after which a file that was to get another name is one that nobody writes any more


def adopt(capture: Capture) -> int:
    """Make parts of the journals that dead processes left; returns how many there were. Raises OSError, after all others, for
    one of which none can be made."""
    found, failed = 0, list[Exception]()
    for path in sorted((capture.folder / JOURNAL).glob("*.jsonl")):
        try:
            found += _adopted(capture, path)
        except FileNotFoundError:  # another was quicker
            pass
        except Exception as error:
            failed.append(error)
    if failed:
        raise OSError(first_line(failed[0])) from failed[0]
    return found


def _adopted(capture: Capture, path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        make_parts(capture, path)
        return True
    except BlockingIOError:  # its process lives
        return False
    finally:
        os.close(descriptor)


def make_parts(capture: Capture, journal: Path) -> None:
    """The rows of a journal, a part for each of their days, and then without the journal. Rows that are forgotten are left
    out, those that are meanwhile too: who forgets them has looked for parts before. Raises OSError; the journal stays then."""
    forgotten, made = None, set[Path]()
    while forgotten != (now := capture.forgotten()):
        forgotten, by_part = now, dict[Path, list[dict[str, Any]]]()
        for line in lines_of(journal):
            if not forgotten.hides(line):
                part = capture.folder / ROWS / f"day={day_of(line['at'])}" / f"part-{journal.stem}.parquet"
                by_part.setdefault(part, []).append(line)
        for part in made - by_part.keys():
            part.unlink(missing_ok=True)
        for part, lines in by_part.items():
            frames = json.dumps(_spans(line.get("frame", 0) for line in lines))
            write_part(part, table_of(lines).replace_schema_metadata({FRAMES: frames}))
        made = {*by_part}
    journal.unlink()


def _spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of whole numbers above 0."""
    runs = groupby(enumerate(sorted({*numbers} - {0})), lambda one: one[1] - one[0])
    ends = [[number for _, number in run] for _, run in runs]
    return [(run[0], run[-1]) for run in ends]


def frames_of(part: Path) -> set[int]:
    """The frames of a part's rows, as its journal had them; none of one that is gone, or that nobody can read."""
    try:
        told = pq.read_metadata(part).metadata or {}
    except (OSError, pa.ArrowException):
        return set()
    return {number for first, last in json.loads(told.get(FRAMES, b"[]")) for number in range(first, last + 1)}


def write_part(path: Path, table: pa.Table, *, name: bool = True) -> None:
    """`table` as the part `path`, there in full or not at all; `name` as of `aside`. Raises OSError."""
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, sync=True, name=name) as beside:  # its journal goes then
        pq.write_table(table, beside, compression="zstd")
    if new:
        see_on_disk(path.parent.parent)


def sweep(folder: Path, of: Collection[str] = ()) -> None:
    """Removes what processes that were killed have left beside what they wrote: it may hold anybody's words. What is younger
    than `LEFT_SECONDS` may be about to get its name, and goes only where one of these texts is in it. Raises OSError."""
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > LEFT_SECONDS
            if old or any(text.encode() in path.read_bytes() for text in of):
                path.unlink()
