"""Forgetting a person, or one answer: out of rows, texts, votes and cuts; and which models were trained on them.

    forgotten.jsonl first: from that line on no reader sees anything of them, whatever happens to what follows
    parts, texts, votes     written anew without them, aside and renamed
    journals                of dead processes at once; one that is written now loses them when it becomes a part
    watch.json              without what they asked, which a look may show
    cuts                    by who makes them: `elsewhere` is called with all that was ever forgotten, and says what it changed

Notable: what is forgotten stays so: of a subject nothing is captured again. Two who forget at once would each write a part
with the other's person in it, so the second waits. On two machines, with a bucket, neither waits: who comes second writes over
nothing (`bucket`), and each looks again until nothing is left of whom anybody has forgotten; a gateway takes out what it had
sent before it heard of that (`take_out`). The weights of a model cannot forget; so it is said which versions were trained on
them, by whoever keeps those (`learned`), as often as one asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError, first_line
from shoal.loop import looked
from shoal.loop.capture import FEEDBACK, FORGOTTEN, ROWS, TEXTS, Capture, Forgotten, append, held, lines_of, now_ms
from shoal.loop.parts import adopt, sweep, write_part
from shoal.machine import see_on_disk, write_aside

# what was forgotten -> what was changed of it, or was made of it, in words: one line each
Elsewhere = Callable[[Forgotten], list[str]]
LOCK, LOCK_SECONDS = ".forget.lock", 600.0  # for another that forgets: a million rows take less than a minute
DONE = ".forgotten"  # of whom this machine's copy has nothing any more: a hash
WRITERS = 4  # parts at once
ROUNDS = 10  # in which other machines may change what is written here


@dataclass
class Report:
    """What was removed."""

    rows: int = 0
    texts: int = 0
    votes: int = 0
    journals: int = 0  # that are written now, and hold rows of them until they become parts
    elsewhere: list[str] = field(default_factory=list)  # lines of cuts and versions


def forget(
    capture: Capture,
    *,
    subject: str | None = None,
    id_: str | None = None,
    elsewhere: Sequence[Elsewhere] = (),
    learned: Sequence[Elsewhere] = (),
) -> Report:
    """Forget all of `subject` (of `capture.subject`), or the answer `id_`. `elsewhere`: whoever made something of the rows,
    such as cuts; `learned`: who says what learned from them, of these alone. Twice does no harm. Raises DataError where a file
    cannot be written: do it again then; ResourceError while another forgets for too long."""
    line = {"subject": subject} if subject else {"id": id_}
    busy = ResourceError(f"another forgets in {capture.folder}", do="do it again: no reader sees them from now on")
    try:
        append(capture.folder / FORGOTTEN, {**line, "at": now_ms()}, sync=True)
        capture.sent(FORGOTTEN.partition(".")[0])  # whoever sends anything from now on hears of it after that
        with alone(capture.folder / LOCK, busy, wait=LOCK_SECONDS):
            report, whole, gone = _forgotten(
                capture, Forgotten({id_} if id_ else set(), {subject} if subject else set())
            )
            for each in elsewhere:
                report.elsewhere += each(gone)
    except (OSError, ValueError, pa.ArrowException) as error:
        do = "make room, and do it again: no reader sees them from now on"
        raise DataError("forget", got=first_line(error), do=do) from error
    for each in learned:
        report.elsewhere += each(whole)
    return report


def take_out(capture: Capture) -> bool:
    """Take out of this machine's copy of a bucket whom anybody has forgotten, and of the bucket what this machine had sent
    before it heard of that; whether it looked, which it does once for what it has heard of. Raises ResourceError while
    somebody forgets here, DataError, OSError."""
    mark, hidden = capture.folder / DONE, capture.forgotten()
    if not (hidden.ids or hidden.subjects):
        return False
    told = hashlib.sha256(json.dumps([sorted(hidden.ids), sorted(hidden.subjects)]).encode()).hexdigest()
    if mark.exists() and mark.read_text(encoding="utf-8") == told:
        return False
    with alone(capture.folder / LOCK, ResourceError(f"another forgets in {capture.folder}")):
        _taken_out(capture, Forgotten(hidden.ids | _ids(capture, hidden), hidden.subjects), _Gone())
        capture.sent()
        write_aside(mark, told)
    return True


@dataclass
class _Gone:
    """What was removed, by file: of one that is removed from again the last time counts."""

    rows: dict[Path, int] = field(default_factory=dict)
    texts: set[Path] = field(default_factory=set)
    votes: dict[Path, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.rows.values()) + len(self.texts) + sum(self.votes.values())


def _forgotten(capture: Capture, who: Forgotten) -> tuple[Report, Forgotten, Forgotten]:
    """What was removed of the capture; `who` with all of their answers; and with these whoever was forgotten before."""
    late, all_, whole = _adopted(capture), _Gone(), Forgotten(set(who.ids), set(who.subjects))
    for _ in range(ROUNDS):
        capture.fresh()
        whole.ids |= _ids(capture, who)
        before = capture.forgotten()  # answers that were deleted, and what somebody was interrupted at
        gone = Forgotten(before.ids | whole.ids, before.subjects | whole.subjects)
        now = _Gone()
        _taken_out(capture, gone, now)
        all_ = _Gone(all_.rows | now.rows, all_.texts | now.texts, all_.votes | now.votes)
        if capture.bucket is None:
            break
        capture.sent()
        if not now.count:
            break
    else:
        raise DataError(f"{capture.folder} changes all the time", do="do it again: no reader sees them from now on")
    report = Report(sum(all_.rows.values()), len(all_.texts), sum(all_.votes.values()))
    report.journals = sum(any(map(who.hides, lines)) for _, lines in capture.journals())
    if late is not None:
        raise late
    return report, whole, gone


def _taken_out(capture: Capture, gone: Forgotten, found: _Gone) -> None:
    """Removes what is of them from all that is written; what that was goes to `found`."""
    _rows(capture, gone, found)
    _texts(capture, gone, found)
    _votes(capture, gone, found)
    looked.forget(capture.folder, gone)
    sweep(capture.folder, [*gone.ids, *gone.subjects])


def _adopted(capture: Capture) -> OSError | None:
    """Makes parts of what dead processes left; what is wrong with one that cannot be made, once all else is done."""
    try:
        adopt(capture)
    except OSError as error:
        return error
    return None


def _ids(capture: Capture, who: Forgotten) -> set[str]:
    """The answers that `who` asked for: votes of others are on these too."""
    found = {line["id"] for _, lines in capture.journals() for line in lines if who.hides(line)}
    for path in capture.parts():
        with suppress(FileNotFoundError):  # its day went since it was listed
            table = _whose(path)
            found |= set(table.filter(_hidden(table, who))["id"].to_pylist())
    return found | {path.stem for path in _stored(capture, who)}  # of some of these no row was kept, or not for so long


def _rows(capture: Capture, who: Forgotten, found: _Gone) -> None:
    """Parts without the rows of `who`; several at once, since each waits for the disk."""
    parts = capture.parts()
    with ThreadPoolExecutor(WRITERS) as pool:
        counts = [*pool.map(partial(_without, who), parts)]
    found.rows |= {path: count for path, count in zip(parts, counts, strict=True) if count}
    _see_days(capture, ROWS)


def _without(who: Forgotten, path: Path) -> int:
    """How many rows of `who` a part had, and has no more; its name is not seen onto the disk."""
    with suppress(FileNotFoundError):  # its day went since it was listed
        count: int = pc.sum(_hidden(_whose(path), who)).as_py() or 0
        if not count:
            return 0
        with pq.ParquetFile(path) as file:
            whole = file.read(use_threads=False)
        kept = whole.filter(pc.invert(_hidden(whole, who)))
        if kept.num_rows:
            write_part(path, kept, name=False)
        else:
            path.unlink()
        return count
    return 0


def _whose(path: Path) -> pa.Table:
    """Ids and subjects of a part; a tenth of the time that `read_table` takes, which looks for a data set."""
    with pq.ParquetFile(path) as file:
        return file.read(["id", "subject"], use_threads=False)


def _see_days(capture: Capture, kind: str) -> None:
    """Returns when the disk has what was removed from the days of a kind, or took a name there: by one that was interrupted,
    too, which has nothing left to remove."""
    for folder in (capture.folder / kind).glob("day=*"):
        with suppress(FileNotFoundError):  # it went
            see_on_disk(folder)


def _hidden(table: pa.Table, who: Forgotten) -> pa.ChunkedArray:
    by_id = pc.is_in(table["id"], pa.array([*who.ids], pa.string()))
    return pc.or_(by_id, pc.is_in(table["subject"], pa.array([*who.subjects], pa.string())))


def _texts(capture: Capture, who: Forgotten, found: _Gone) -> None:
    for path in [*_stored(capture, who)]:
        path.unlink(missing_ok=True)
        found.texts.add(path)
    _see_days(capture, TEXTS)


def _stored(capture: Capture, who: Forgotten) -> Iterator[Path]:
    for path in (capture.folder / TEXTS).glob("day=*/*.json"):
        with suppress(FileNotFoundError):  # it is deleted meanwhile
            if path.stem in who.ids or json.loads(path.read_text("utf-8")).get("subject") in who.subjects:
                yield path


def _votes(capture: Capture, who: Forgotten, found: _Gone) -> None:
    for path in (capture.folder / FEEDBACK).glob("day=*/*.jsonl"):
        descriptor = held(path)  # so that nobody votes meanwhile
        try:
            lines = lines_of(path)
            kept = [line for line in lines if not who.hides(line)]
            if len(kept) < len(lines):
                _replace(path, kept)
                found.votes[path] = len(lines) - len(kept)
        finally:
            os.close(descriptor)
        if capture.bucket is not None and len(kept) < len(lines):
            _name(
                capture,
                {str(line["id"]) for line in lines if who.hides(line) and line.get("subject") not in who.subjects},
            )


def _name(capture: Capture, ids: set[str]) -> None:
    """Forget these answers by name: a machine that has others' votes on them may have no row that says whose they were."""
    for id_ in sorted(ids - capture.forgotten().ids):
        append(capture.folder / FORGOTTEN, {"id": id_, "at": now_ms()})


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    write_aside(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), sync=True)
