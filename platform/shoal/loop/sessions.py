"""The first request of each session: what the watch counts, since requests of one session are alike.

A session is what one subject (a key's `user`) asks without a pause of half an hour, for an hour at most, or `MOST_REQUESTS`
conversations: who asks more at a time is a program, and one that asks all day is not to count once. Turns of a conversation
belong to one session, however late they come. Of one person's thumbs the first of a day counts. Rows without a subject have
their conversation alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.loop.rows import RERUN
from shoal.loop.watched import column, texts

PAUSE_S, LONGEST_S, MOST_REQUESTS = 1_800.0, 3_600.0, 20
VOTE_S = 86_400.0
CONVERSATIONS, SUBJECTS = 1_024, 4_096  # the last ones, which are known


@dataclass
class Sessions:
    """The sessions that are open, as JSON can hold them."""

    conversations: list[str] = field(default_factory=list)
    # name -> first and last request, epoch seconds; count
    subjects: dict[str, list[float]] = field(default_factory=dict)

    def first_requests(self, table: pa.Table) -> pa.Table:
        """The rows of `table`, in their order, that begin a session; the same however the rows are cut into tables."""
        conversations, wanted = dict.fromkeys(self.conversations), []
        at = np.asarray(table["at"].to_numpy(zero_copy_only=False), dtype=float) / 1000
        kinds = np.where(~np.isnan(column(table, "down")), "vote", "request")
        kinds = np.where(np.array(texts(table, "role"), dtype=object) == RERUN, RERUN, kinds)
        rows = zip(at.tolist(), kinds.tolist(), texts(table, "subject"), texts(table, "conversation"), strict=True)
        for place, (when, kind, subject, conversation) in enumerate(rows):
            is_new = not conversation or conversation not in conversations
            if conversation:
                _newest(conversations, conversation, None, CONVERSATIONS)
            if subject:
                is_new = self._begins(f"{kind} {subject}", when, is_new, is_vote=kind == "vote")
            if is_new:
                wanted.append(place)
        self.conversations = list(conversations)
        return table.take(np.array(wanted, dtype=np.int64))

    def _begins(self, name: str, when: float, is_new: bool, *, is_vote: bool) -> bool:
        """Whether a row of `name` begins a session, where its conversation `is_new`."""
        first, last, count = self.subjects.get(name, (-np.inf, -np.inf, 0))
        if is_vote:
            over = abs(when - first) >= VOTE_S
        else:
            over = abs(when - last) >= PAUSE_S or abs(when - first) >= LONGEST_S or count >= MOST_REQUESTS
        if over and is_new:
            first, count = when, 0
        if np.isfinite(first):  # else no session of theirs has begun, and JSON has no infinity
            _newest(self.subjects, name, [float(first), when, count + int(is_new)], SUBJECTS)
        return over and is_new


def _newest(known: dict[str, Any], name: str, value: Any, most: int) -> None:
    """`name` is the newest of `known`, which keeps the last `most`."""
    known.pop(name, None)
    known[name] = value
    if len(known) > most:
        known.pop(next(iter(known)))
