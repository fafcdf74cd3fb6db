"""What a request holds of the pool: units for what it computes, units that the prefix cache has for it, and its own pages
offered to that cache. The scheduler decides when; here is what then becomes of pool and request."""

from __future__ import annotations

from collections.abc import Sequence as Several

from shoal.engine.pages import Pages
from shoal.engine.plan import Work
from shoal.engine.sequence import Sequence

# pages offered, of a request whose page met another of equal digest (`Pages.register`): no later one may be
NEVER = 1 << 62


def needed(pages: Pages, seq: Sequence) -> int:
    """Units that must be available for all tokens that `seq` has now."""
    seq.extend_keys(pages)
    groups = seq.groups or 1
    need = seq.pages_for(len(seq.tokens)) * groups
    for j in range(groups):
        found, cached = pages.peek(j, seq.keys)
        need += cached - found  # a cached unit is found, but no longer available once it is taken
    return need


def enter(pages: Pages, seq: Sequence) -> None:
    """Give `seq`, which has nothing, what the prefix cache has of it, and set where it starts."""
    for j in range(seq.groups or 1):
        _match(pages, seq, j)
    if seq.groups is None:
        # the router needs the sums of every page: rows of pages without them are run again, unwritten
        for unit in seq.tables[0, : seq.owned[0]].tolist():
            note = pages.noted(unit)
            if note is None:
                break
            seq.notes.append(note)
        known = 0 if seq.scoring else len(seq.notes) * seq.page
        seq.at = seq.held_from = min(known, len(seq.tokens) - 1)
    elif not seq.scoring:
        seq.at = min(len(seq.tokens) - 1, *seq.computed[: seq.groups])


def deepen(pages: Pages, seq: Sequence, notes: Several[object]) -> None:
    """Take in the router's sums of the prompt's pages, and look for it in the cache of the groups that its depth added."""
    for index, note in enumerate(notes, start=len(seq.notes)):
        if index < seq.registered[0]:
            pages.note(int(seq.tables[0, index]), note)
    groups = seq.groups or 1
    for j in range(1, groups):
        _match(pages, seq, j)
    seq.at = 0 if seq.scoring else min([len(seq.tokens) - 1, *seq.computed[1:groups]])


def take(pages: Pages, seq: Sequence, work: Work) -> None:
    """Give `seq` the units that `work` writes; as many must be available."""
    need = seq.pages_for(work.reach)
    for j in range(work.last):
        if need > seq.owned[j]:
            seq.give(j, pages.allocate(need - seq.owned[j]))


def offer(pages: Pages, seq: Sequence, group: int) -> None:
    """Offer the pages of `group` that became full to the prefix cache."""
    full = seq.computed[group] // seq.page
    if seq.registered[group] >= full:
        return
    seq.extend_keys(pages)
    for index in range(seq.registered[group], full):
        unit = pages.register(group, seq.keys[index], int(seq.tables[group, index]))
        if unit is None:
            seq.registered[group] = NEVER
            return
        seq.tables[group, index] = unit
    seq.registered[group] = full


def give_back(pages: Pages, seq: Sequence) -> None:
    """Release what is held beyond the computed tokens: the units that wrong drafts were written to."""
    for j in range(seq.groups or 0):
        pages.release(seq.cut(j, seq.pages_for(seq.computed[j])))


def release(pages: Pages, seq: Sequence) -> None:
    """Release everything; `seq` is back to having nothing stored."""
    for units in seq.units():
        pages.release(units)
    seq.reset()


def _match(pages: Pages, seq: Sequence, group: int) -> None:
    units = pages.match(group, seq.keys)
    seq.give(group, units)
    seq.computed[group] = seq.found[group] = len(units) * seq.page
    seq.registered[group] = len(units)
