"""Feedback on answers: votes, scores, corrections and comments, a line each, as they come.

    CAPTURE/feedback/day=2026-11-27/votes.jsonl

Notable: of one person on one answer the newest line counts, and one that says nothing withdraws; so the same vote sent twice is
one. Votes are given by those who want to: they may raise an alarm, and never promote a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.errors import DataError
from shoal.loop.capture import FEEDBACK, Capture, append, day_of, lines_of, now_ms

FILE = "votes.jsonl"
REMEMBERED = 10_000  # ids
WHOSE: dict[str, Any] = {"id": None, "subject": None}  # of a row
Rating = Literal["up", "down"]


@dataclass(frozen=True)
class Vote:
    """What one person says of one answer."""

    id: str  # of the answer
    subject: str | None = None  # who says so
    rating: Rating | None = None
    score: float | None = None  # -1 to 1
    correction: str | None = None  # the better answer
    comment: str | None = None
    at: int = 0  # ms since 1970

    @property
    def empty(self) -> bool:
        """Does it say nothing, and so withdraw?"""
        return (self.rating, self.score, self.correction, self.comment) == (None, None, None, None)


class Votes:
    """The feedback of a capture."""

    def __init__(self, capture: Capture, wall: Callable[[], int] = now_ms) -> None:
        self._capture, self._wall = capture, wall
        self._known: dict[str, str | None] = {}  # ids that are there, the newest last -> who asked

    def put(self, vote: Vote) -> None:
        """Keep `vote`, unless it is of somebody, or on an answer, that was forgotten. Raises OSError."""
        at = self._wall()
        folder = self._capture.folder / FEEDBACK
        folder.mkdir(exist_ok=True, mode=0o700)
        folder = folder / f"day={day_of(at)}"
        folder.mkdir(exist_ok=True, mode=0o700)
        told = {name: value for name, value in asdict(vote).items() if value is not None}
        append(folder / FILE, {**told, "at": at}, unless=lambda: self._capture.forgotten().hides(told))

    def all(self) -> list[Vote]:
        """What counts, by time: the newest of each person on each answer, without those that were withdrawn or forgotten."""
        forgotten, found = self._capture.forgotten(), dict[tuple[str, str | None], Vote]()
        for day in self._capture.days(FEEDBACK):
            folder = self._capture.folder / FEEDBACK / f"day={day}"
            paths = folder.glob("votes*.jsonl")  # of this machine, and of others
            timed = (pair for path in paths for pair in _timed(lines_of(path)))
            for _, line in sorted(timed, key=lambda pair: pair[0]):
                said: dict[str, Any] = {name: line.get(name) for name in NAMES}
                vote = Vote(**said)
                if not forgotten.hides(line):
                    found.pop((vote.id, vote.subject), None)
                    found[vote.id, vote.subject] = vote
        return [vote for vote in found.values() if not vote.empty]

    def saw(self, id_: str, subject: str | None = None) -> None:
        """An answer of this id is being given, to `subject`: its row is on its way."""
        self._known[id_] = subject
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    def knows(self, id_: str) -> bool:
        """Whether an answer of this id was captured, and neither it nor who asked for it is forgotten. May read all of the
        capture: call it in a thread."""
        return self._is_kept(id_, (self._in_journals, self._in_parts, self._elsewhere))

    def comes(self, id_: str) -> bool:
        """Whether it has come into a journal since it was not known: of an answer by another gateway, whose scribe writes its
        row a moment after it was read. Call it in a thread."""
        return self._is_kept(id_, (self._in_journals,))

    def _is_kept(self, id_: str, places: Sequence[Callable[[str], dict[str, Any] | None]]) -> bool:
        if id_ not in self._known:
            row = next((found for place in places if (found := place(id_)) is not None), None)
            if row is None:
                return False
            self.saw(id_, row["subject"])
        return not self._capture.forgotten().hides({"id": id_, "subject": self._known[id_]})

    def _elsewhere(self, id_: str) -> dict[str, Any] | None:
        """Its row where another machine has captured it, and the capture is in S3. Of days that went to make room nobody knows
        any more, as without a bucket."""
        if self._capture.bucket is None:
            return None
        with suppress(DataError):  # nobody can tell now
            self._capture.bucket.pull("rows/")
        return self._in_parts(id_)

    def _in_journals(self, id_: str) -> dict[str, Any] | None:
        """Its row's id and subject; None where it is in none."""
        lines = (line for _, lines in self._capture.journals() for line in lines)
        return next(({**WHOSE, **line} for line in lines if line.get("id") == id_), None)

    def _in_parts(self, id_: str) -> dict[str, Any] | None:
        for path in reversed(self._capture.parts()):
            with suppress(FileNotFoundError):  # its day went since it was listed
                table = pq.read_table(path, columns=[*WHOSE], partitioning=None)
                for row in table.filter(pc.equal(table["id"], id_)).slice(0, 1).to_pylist():
                    return dict(row)
        return None


def _timed(lines: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file with when they came: none came before the one above it, whatever the clock said."""
    latest = 0
    for line in lines:
        latest = max(latest, line["at"])
        yield latest, line


NAMES: Any = tuple(field.name for field in fields(Vote))
