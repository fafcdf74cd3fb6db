"""Captured rows, each once, whatever the clocks of those who wrote them say.

What was read is known by the files' names: a part that was read whole is done, and of a journal that still grows the ids are
kept until it is a part; several rows may have one id, such as those of a client that tries a refused request again. So a row
that comes late, or with the wrong time, is read like any other. A vote is a row of its own, with the version of the answer that
it is on and the column ``down``, for it may come days after the answer; those of the last two days are known one by one, since
another machine's come after ours that were given later.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.errors import DataError, first_line
from shoal.loop.capture import Capture, journal_of, now_ms
from shoal.loop.rows import COPIES, SCHEMA, table_of
from shoal.loop.votes import Vote, Votes
from shoal.loop.watched import COLUMNS

AHEAD_MS = 300_000  # by which a clock may be ahead of ours
LATE_MS = 2 * 86_400_000  # by which a vote may come late
OF = ("weights", "version", "role", "slice")  # columns of an answer that a vote on it has as well
LOOKED_AT = pa.schema([SCHEMA.field(name) for name in COLUMNS])  # what is read: a day of rows may be a million


@dataclass(frozen=True)
class Read:
    """What of a capture was read."""

    done: list[str] = field(default_factory=list)  # parts, as DAY/NAME
    open: dict[str, list[str]] = field(default_factory=dict)  # journal -> ids of its rows
    voted: int = 0  # the newest vote, in ms since 1970
    votes: list[str] | None = None  # those of `LATE_MS` before it; None: all


def unread(capture: Capture, read: Read, now: float | None = None) -> tuple[pa.Table, Read]:
    """The rows that are not in `read`, of `LOOKED_AT` and `down`, in the order of their times, and what was read then. `now`:
    epoch seconds. Raises DataError for a part that cannot be read."""
    journals = dict(capture.journals())  # before the parts: what becomes a part meanwhile is known by its name
    done, tables = [], [LOOKED_AT.empty_table()]
    still_open = {name: [*map(_one, lines)] for name, lines in journals.items()}
    for name, lines in journals.items():
        tables.append(_looked_at(lines).filter(_beyond(still_open[name], read.open.get(name, ()))))
    before = set(read.done)
    for path in capture.parts():
        name, stem = f"{path.parent.name}/{path.stem}", journal_of(path)
        if stem in journals:
            continue
        done.append(name)
        if name not in before:
            table = _part(path)
            if known := read.open.get(stem):
                table = table.filter(_beyond([*map(_one, table.select(["id", "role"]).to_pylist())], known))
            tables.append(table)
    found = capture.forgotten().seen(pa.concat_tables(tables))
    votes, voted, names = _votes(capture, read, (now_ms() if now is None else round(now * 1000)) + AHEAD_MS)
    found = pa.concat_tables([found, votes], promote_options="default")
    return found.take(pc.sort_indices(found, [("at", "ascending")])), Read(done, still_open, voted, names)


def _one(line: Mapping[str, Any]) -> str:
    """What tells a row from others: of a copy not its id alone, which is its request's."""
    role = line.get("role")
    return f"{role} of {line.get('id')}" if role in COPIES else str(line.get("id"))


def _beyond(names: Sequence[str], known: Iterable[str]) -> pa.Array:
    """Which of the rows with these names (`_one`) are not among those that are `known`, each of which is one row."""
    left, wanted = Counter(known), list[bool]()
    for one in names:
        wanted.append(not left[one])
        left[one] -= not wanted[-1]
    return pa.array(wanted, pa.bool_())


def _votes(capture: Capture, read: Read, until: int) -> tuple[pa.Table, int, list[str]]:
    """Thumbs that are not in `read` on answers that were captured, with who gave them, and the version and slice of the answer;
    and what of `Read` they make: `voted` and `votes`. One that says it comes from the future waits until then."""
    every = [vote for vote in Votes(capture).all() if vote.rating is not None and vote.at <= until]
    known = None if read.votes is None else set(read.votes)
    since = read.voted - (0 if known is None else LATE_MS)
    votes = [vote for vote in every if vote.at > since and (known is None or _name(vote) not in known)]
    voted = max([read.voted, *(vote.at for vote in votes)])
    names = [_name(vote) for vote in every if vote.at > voted - LATE_MS]
    if not votes:
        return LOOKED_AT.empty_table().append_column("down", pa.array([], pa.float64())), voted, names
    of = {row["id"]: row for row in capture.rows(columns=["id", *OF]).to_pylist()}
    votes = [vote for vote in votes if vote.id in of]
    lines = [
        {"id": f"vote-{vote.id}", "at": vote.at, "subject": vote.subject, **{name: of[vote.id][name] for name in OF}}
        for vote in votes
    ]
    down = pa.array([float(vote.rating == "down") for vote in votes], pa.float64())
    return _looked_at(lines).append_column("down", down), voted, names


def _name(vote: Vote) -> str:
    """What tells a vote from others, in twelve digits."""
    return hashlib.blake2b(f"{vote.id} {vote.subject} {vote.at}".encode(), digest_size=6).hexdigest()


def _looked_at(lines: list[dict[str, Any]]) -> pa.Table:
    return table_of(lines).select(COLUMNS)


def _part(path: object) -> pa.Table:
    """A part in today's columns; those that it does not have are null."""
    try:
        file = pq.ParquetFile(path)
        found = file.read([name for name in COLUMNS if name in file.schema_arrow.names])
    except FileNotFoundError:  # its day went since it was listed, or all that it had was forgotten
        return LOOKED_AT.empty_table()
    except (OSError, pa.ArrowException) as error:
        raise DataError("capture", got=f"{path}: {first_line(error)}", do="move that part away") from error
    columns = [
        found[column.name].cast(column.type) if column.name in found.column_names else pa.nulls(len(found), column.type)
        for column in LOOKED_AT
    ]
    return pa.table(columns, schema=LOOKED_AT)
