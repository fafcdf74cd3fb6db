"""Feedback on answers: votes, scores, corrections and comments, a line each, as they come.

    CAPTURE/feedback/day=2026-11-27/votes.jsonl

Notable: of one person on one answer the newest line counts, and one that says nothing withdraws; so the same vote sent twice is
one. Votes are given by those who want to: they may raise an alarm, and never promote a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.errors import DataError
from shoal.loop.capture import FEEDBACK, Capture, append, day_of, lines_of, now_ms

FILE = "votes.jsonl"
REMEMBERED = 10_000  # ids
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
        self._known: dict[str, None] = {}  # ids that are there, the newest last

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

    def saw(self, id_: str) -> None:
        """An answer of this id is being given: its row is on its way."""
        self._known[id_] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    def knows(self, id_: str) -> bool:
        """Whether an answer of this id was captured, and is not forgotten. May read all of the capture: call it in a
        thread."""
        if id_ in self._capture.forgotten().ids:
            return False
        if id_ not in self._known and (self._in_journals(id_) or self._in_parts(id_) or self._elsewhere(id_)):
            self.saw(id_)
        return id_ in self._known

    def comes(self, id_: str) -> bool:
        """Whether it has come into a journal since it was not known: of an answer by another gateway, whose scribe writes its
        row a moment after it was read. Call it in a thread."""
        found = id_ not in self._capture.forgotten().ids and self._in_journals(id_)
        if found:
            self.saw(id_)
        return found

    def _elsewhere(self, id_: str) -> bool:
        """Whether another machine has captured it, where the capture is in S3."""
        if self._capture.bucket is None:
            return False
        with suppress(DataError):  # nobody can tell now
            self._capture.bucket.pull("rows/")
        return self._in_parts(id_)

    def _in_journals(self, id_: str) -> bool:
        return any(line.get("id") == id_ for _, lines in self._capture.journals() for line in lines)

    def _in_parts(self, id_: str) -> bool:
        for path in reversed(self._capture.parts()):
            with suppress(FileNotFoundError):  # its day went since it was listed
                if pc.any(pc.equal(pq.read_table(path, columns=["id"], partitioning=None)["id"], id_)).as_py():
                    return True
        return False


def _timed(lines: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file with when they came: none came before the one above it, whatever the clock said."""
    latest = 0
    for line in lines:
        latest = max(latest, line["at"])
        yield latest, line


NAMES: Any = tuple(field.name for field in fields(Vote))
