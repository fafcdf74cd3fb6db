"""What a request holds: units of the pool for what is computed of it, those among them that the prefix cache had, its pages
offered to that cache, and states that wait for its deeper groups. All of it goes with a preemption. The scheduler decides when;
here is what then becomes of pool and request.

Letters: G layer groups, M pages a request can grow to, P token slots in a page.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.config import GROUPS
from shoal.engine.images import PromptImages
from shoal.engine.pages import PageKey, Pages

# pages offered, of a request whose page met another of equal digest (`Pages.register`): no later one may be
NEVER = 1 << 62


def _none() -> list[int]:
    return [0] * GROUPS


@dataclass(eq=False)
class Holding:
    """`computed[j]` tokens have their K/V in group j; `at` is the next row to run in the present pass, which may be an earlier
    one (a row that stands already is run again without being written)."""

    tokens: list[int]  # the request's own: its prompt, then its answer
    images: PromptImages | None  # of the prompt
    adapter: str  # identity of its adapter; "": none
    salt: str  # `Request.cache_salt`
    page: int  # P
    tables: np.ndarray  # int64 [G, M]: units of its pages, 0 where it owns none
    owned: list[int] = field(default_factory=_none)  # units a group
    computed: list[int] = field(default_factory=_none)
    found: list[int] = field(default_factory=_none)  # tokens a group got from the prefix cache
    offered: list[int] = field(default_factory=_none)  # pages a group offered to the prefix cache
    keys: list[PageKey] = field(default_factory=list)  # of its full pages
    at: int = 0
    states_from: int | None = None  # first position whose state after group 1 is kept for the deeper groups
    states: list[Any] = field(default_factory=list)  # those states: the runner's
    notes: list[Any] = field(default_factory=list)  # router sums of the first cached pages: the runner's

    @classmethod
    def nothing(
        cls,
        tokens: list[int],
        images: PromptImages | None,
        page: int,
        longest: int,
        adapter: str = "",
        salt: str = "",
    ) -> Holding:
        """Of a request that may grow to `longest` tokens."""
        return cls(tokens, images, adapter, salt, page, np.zeros((GROUPS, -(-longest // page)), dtype=np.int64))

    def ahead(self, tokens: list[int]) -> Holding:
        """The same units as they would be held if the tokens were `tokens`, with no states after group 1 but those from the
        newest token on, which are yet to come. `self` stays as it is."""
        ahead = copy.copy(self)
        ahead.tokens, ahead.states, ahead.states_from = tokens, [], len(self.tokens) - 1
        return ahead

    # --- counting -----------------------------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def lacking(self, tokens: int, groups: int) -> int:
        """Units it still needs for `tokens` tokens in its first `groups` groups."""
        need, lack = self.pages_for(tokens), 0
        for have in self.owned[:groups]:
            if have < need:
                lack += need - have
        return lack

    def needed(self, pages: Pages, groups: int) -> int:
        """Units that must be available before a request that holds nothing can hold all of its tokens in `groups` groups."""
        self.extend_keys(pages)
        need = self.pages_for(len(self.tokens)) * groups
        for j in range(groups):
            found, cached = pages.peek(j, self.keys)
            need += cached - found  # a cached unit is found, but no longer available once it is taken
        return need

    def units(self) -> list[list[int]]:
        """Its units in page order, a list for each group."""
        return [self.tables[j, :have].tolist() for j, have in enumerate(self.owned)]

    def check(self, name: str) -> None:
        """Raise RuntimeError, about the request `name`, unless it owns what its computed tokens need."""
        need = [self.pages_for(computed) for computed in self.computed]
        if self.owned != need:
            raise RuntimeError(f"request {name} owns {self.owned} units for pages {need}")

    # --- taking -------------------------------------------------------------------------------------------------------

    def enter(self, pages: Pages, groups: int | None, scoring: bool) -> None:
        """Take what the prefix cache has of a request that holds nothing, and set where it starts: all of its rows run where it
        is `scoring`, whatever is cached. `groups`: None until the router has decided."""
        for j in range(groups or 1):
            self._match(pages, j)
        if groups is None:
            self._begin_at_notes(pages, scoring)
        elif not scoring:
            self.at = min(len(self.tokens) - 1, *self.computed[:groups])

    def look(self, pages: Pages) -> None:
        """Go back to where the router decides, now by all tokens: what is computed stays, and group 1 runs over what has no
        sums of its pages."""
        self.states, self.notes = [], []
        self._begin_at_notes(pages, scoring=False)

    def deepen(self, pages: Pages, groups: int, scoring: bool, notes: Sequence[object]) -> None:
        """Go on with `groups` groups, which the router chose: keep its sums of the pages (`notes`), and look for the tokens in
        the prefix cache of the groups that came to those that it has."""
        for index, note in enumerate(notes, start=len(self.notes)):
            pages.note(int(self.tables[0, index]), note)  # nothing is kept of a page that is not full
        for j in range(1, groups):
            if not self.owned[j]:
                self._match(pages, j)
        self.at = 0 if scoring else min(len(self.tokens) - 1, *self.computed[:groups])

    def take(self, pages: Pages, tokens: int, groups: int) -> None:
        """Take the units that it lacks (`lacking`); as many must be available."""
        need = self.pages_for(tokens)
        for j in range(groups):
            if need > self.owned[j]:
                self.give(j, pages.allocate(need - self.owned[j]))

    def give(self, group: int, units: list[int]) -> None:
        """Append `units` to its table of `group`."""
        have = self.owned[group]
        self.tables[group, have : have + len(units)] = units
        self.owned[group] = have + len(units)

    def advance(self, pages: Pages, end: int, first: int, last: int) -> None:
        """The rows before `end` stand in the groups `first` .. `last` - 1: pages that became full are offered to the prefix
        cache."""
        fills = end // self.page > self.at // self.page
        for j in range(first, last):
            if self.computed[j] < end:
                self.computed[j] = end
            if fills:
                self._offer(pages, j)
        self.at = end

    def extend_keys(self, pages: Pages) -> None:
        """Make the keys of all pages that its tokens fill."""
        while (len(self.keys) + 1) * self.page <= len(self.tokens):
            start = len(self.keys) * self.page
            runs = [] if self.images is None else self.images.runs(start, start + self.page)
            parent = self.keys[-1] if self.keys else None
            self.keys.append(pages.key(parent, self.tokens[start : start + self.page], runs, self.adapter, self.salt))

    # --- releasing ---------------------------------------------------------------------------------------------------

    def trim(self, pages: Pages, groups: int) -> None:
        """Release what lies beyond the computed tokens: the units that wrong drafts were written to."""
        for j in range(groups):
            kept = self.pages_for(self.computed[j])
            units = self.tables[j, kept : self.owned[j]].tolist()
            self.tables[j, kept:] = 0
            self.owned[j] -= len(units)
            pages.release(units)

    def release(self, pages: Pages) -> None:
        """Release everything: nothing is stored any more."""
        for units in self.units():
            pages.release(units)
        self.tables[:] = 0
        self.owned, self.computed, self.offered = _none(), _none(), _none()
        self.at, self.states_from = 0, None
        self.states, self.notes = [], []

    # --- the prefix cache ---------------------------------------------------------------------------------------------

    def _begin_at_notes(self, pages: Pages, scoring: bool) -> None:
        """Start where the router's sums end. It needs those of every page: rows of pages without them are run again,
        unwritten."""
        for unit in self.tables[0, : self.owned[0]].tolist():
            note = pages.noted(unit)
            if note is None:
                break
            self.notes.append(note)
        known = 0 if scoring else len(self.notes) * self.page
        self.at = self.states_from = min(known, len(self.tokens) - 1)

    def _match(self, pages: Pages, group: int) -> None:
        units = pages.match(group, self.keys)
        self.give(group, units)
        self.computed[group] = self.found[group] = len(units) * self.page
        self.offered[group] = len(units)

    def _offer(self, pages: Pages, group: int) -> None:
        """Offer the pages of `group` that became full."""
        full = self.computed[group] // self.page
        if self.offered[group] >= full:
            return
        self.extend_keys(pages)
        for index in range(self.offered[group], full):
            unit = pages.register(group, self.keys[index], int(self.tables[group, index]))
            if unit is None:
                self.offered[group] = NEVER
                return
            self.tables[group, index] = unit
        self.offered[group] = full
