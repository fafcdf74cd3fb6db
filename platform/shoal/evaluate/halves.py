"""Which half of what is held out is asked when models are evaluated; a router is fitted to the other, so that it has seen
nothing of a document or conversation that it is measured on.

Groups are dealt like cards, a task at a time. Which side one falls on follows from the held-out data alone: neither the model
nor the order of the rows changes it. The chats of a corpus are dealt before its documents, so that a file of chats gives its
groups the sides that the folder it lies in gives them. Of a corpus that holds out more than `DEALT` documents nobody holds all
groups: each of a document draws its side (decision 0019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.data import remote
from shoal.data.batches import heldout_groups
from shoal.data.chats.rows import HELDOUT, labels
from shoal.data.documents import MODALITIES
from shoal.data.shards import Index, open_index

DEALT = 2**17  # documents, or packed rows, that are held out: of more the groups draw, and no row is read for it

Labels = Iterable[tuple[str, int]]  # task and group of each row


@dataclass(frozen=True)
class Drawn(Container[int]):
    """One half of the groups of a large corpus: those of its chats as they were dealt, of the others those whose hash is
    even."""

    sides: Mapping[int, int]  # of the groups of chats

    def __contains__(self, group: object) -> bool:
        return isinstance(group, int) and self.sides.get(group, group & 1) == 0


def asked_groups(heldout: str | Path) -> Container[int]:
    """The groups that are asked of `heldout`: a .jsonl of chats, or a prepared corpus. Raises DataError when that cannot be
    read."""
    place = remote.local(heldout)
    if not place.is_dir():
        return dealt(labels(place))
    chats = place / HELDOUT
    of_chats = labels(chats) if chats.is_file() else ()
    if _held_out(open_index(place)) > DEALT:
        return Drawn(_sides(of_chats))
    pieces = ((name, group) for name in MODALITIES for row in heldout_groups(place, name) for group in row)
    return dealt(of_chats, pieces)


def _held_out(index: Index) -> int:
    """Documents or packed rows, whichever are more."""
    rows = sum(index.total("rows", "heldout", name) for name in MODALITIES)
    return max(rows, sum(index.documents.get("heldout", {}).values()))


def dealt(*decks: Labels) -> frozenset[int]:
    """The groups of one half: of each task as many as of the other, or one more or less, and about as many rows.

    A deck is dealt before the next, and in it the tasks of few groups before those of many. A group that was dealt with an
    earlier task stays where it is, and is counted there; the others go, those of most rows first and else in the order of their
    hashes, to the side of fewer groups of the task, then of fewer rows of it, then of fewer groups in all.
    """
    return frozenset(group for group, side in _sides(*decks).items() if side == 0)


def _sides(*decks: Labels) -> dict[int, int]:
    """`dealt`, as 0 or 1 for each group."""
    sides: dict[int, int] = {}
    for deck in decks:
        tasks: dict[str, Counter[int]] = {}
        for task, group in deck:
            tasks.setdefault(task, Counter())[group] += 1
        for _, rows in sorted(tasks.items(), key=lambda item: (len(item[1]), item[0])):
            dealt_before = Counter(sides.values())
            # groups and rows of the task, groups of those before it
            held = [[0, 0, dealt_before[side]] for side in (0, 1)]
            for group in sorted(rows, key=lambda group: (group not in sides, -rows[group], group)):
                side = sides.setdefault(group, held.index(min(held)))
                held[side][0] += 1
                held[side][1] += rows[group]
    return sides
