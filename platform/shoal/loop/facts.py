"""What a gateway hands over of a request that has ended, in a form that costs it little, and the row that it becomes.

    gateway: columns as they are known, ids of prompts, a tuple a choice ─ `packed` ─> frame ─ pipe ─> `Frames` ─ `row` ─> Row

Notable: the bytes are msgpack's, of plain values, a tenth of the time that JSON takes. Ids of a prompt are in the pipe, which
is memory, and never on a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import msgpack

from shoal.loop.rows import Row

# a choice: its layers, and of one that has ended cached tokens, seconds in the queue, and `signals` or None
Choice = tuple[int | None, int | None, float | None, tuple[Any, ...] | None]
# columns; the prompts' ids; name and size of the vocabulary that they are of; choices
Facts = tuple[dict[str, Any], Sequence[Sequence[int]], tuple[str, int] | None, Sequence[Choice]]

MEANS = ("prompt_nll", "router_bound", "router_distance", "answer_nll")
signals: Callable[[Any], tuple[Any, ...]] = attrgetter(*MEANS, "answer_nll_max", "predicted_gaps", "drafts_accepted")
SIZE = 4  # bytes before a frame that tell how long it is


def packed(facts: Facts) -> bytes:
    """`facts`, all of it of Python's own types, as a frame. Raises TypeError for others, OverflowError for an integer of more
    than 64 bits."""
    data: bytes = msgpack.packb(facts, unicode_errors="surrogatepass")  # what clients send may hold half a character
    return len(data).to_bytes(SIZE, "little") + data


def unpacked(frame: bytes) -> Facts:
    """What was `packed`, with tuples for its lists. Raises ValueError for what is no frame."""
    found: Facts = msgpack.unpackb(frame[SIZE:], use_list=False, unicode_errors="surrogatepass")
    return found


def lighter(frame: bytes, room: int) -> bytes:
    """`frame` without its prompts, of whose row no surprisal is known; where it has more than `room` bytes still, without what
    its choices say too."""
    columns, _, _, choices = unpacked(frame)
    found = packed((columns, [], None, choices))
    return found if len(found) <= room else packed((columns, [], None, []))


class Frames:
    """Cuts what comes out of a pipe into frames, wherever a read has ended."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> Iterator[bytes]:
        """Those that are whole with `data`, each for `unpacked`."""
        data, at = self._rest + data, 0
        while len(data) >= at + SIZE:
            end = at + SIZE + int.from_bytes(data[at : at + SIZE], "little")
            if len(data) < end:
                break
            yield data[at:end]
            at = end
        self._rest = data[at:]


def row(facts: Facts, surprisal: Callable[[tuple[str, int], Sequence[int]], float | None]) -> Row:
    """The row of a request; `surprisal` of a prompt's ids, by the vocabulary that they are of. What the columns say themselves
    holds; of several choices sums of what is counted and means of what is measured."""
    columns, prompts, vocabulary, choices = facts
    found: dict[str, Any] = {}
    depths = [choice[0] for choice in choices if choice[0]]
    found["layers"] = round(sum(depths) / len(depths)) if depths else None
    ends = [choice for choice in choices if choice[1] is not None]
    if ends:
        found["cached_tokens"] = sum(end[1] or 0 for end in ends)
        found["queue_s"] = max(end[2] or 0.0 for end in ends)
        found |= _of_signals([end[3] for end in ends if end[3] is not None])
    if vocabulary is not None:
        found["prompt_surprisal"] = _mean([surprisal(vocabulary, prompt) for prompt in prompts])
    return Row(**(found | columns))


def _of_signals(told: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """What the engines said of several choices, each as `signals` has it, as one."""
    if not told:
        return {}
    found = {name: _mean([each[place] for each in told]) for place, name in enumerate(MEANS)}
    most, gaps, drafts = zip(*(each[len(MEANS) :] for each in told), strict=True)
    some = [each for each in gaps if each]
    return found | {
        "answer_nll_max": max((each for each in most if each is not None), default=None),
        "predicted_gaps": [sum(column) / len(some) for column in zip(*some, strict=True)] or None,
        "drafts_accepted": sum(drafts),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
