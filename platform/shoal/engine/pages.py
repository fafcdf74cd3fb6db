"""The pool of KV units, and the prefix cache over it.

A unit is one page (P token slots) of one layer group; unit 0 is the null unit, which pads block tables and is never given
out. Every other unit is in exactly one state:

    free ──allocate──> owned (refs >= 1) ──release──> free            never registered
     ^                   ^          └──────release──> cached (refs 0) registered: a full page that others may find
     │                   └───────────match─────────────┘ │
     └───── evicted, least recently used, or forgotten <─┘

Sharing is by whole pages, and the scheduler runs a row whose K/V already stand without writing it again. So a shared unit
is never written, and copy-on-write has nothing to copy.

A page is found by the digest of (parent's digest, token ids, images, adapter's identity, cache salt), chained from the first
page on, in the group's own index. What was stored is then compared page by page, so a collision is a miss. Whoever holds a page
holds all pages before it, so a page is never evicted while one that hangs on it can still be found.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Digest = Callable[[bytes], bytes]
PatchRun = tuple[str, int]  # patches in a row of one image: its sha256, and the number of the first of them in it


@dataclass(frozen=True, slots=True)
class PageKey:
    """What a full page holds: its own tokens and images, and through `parent` all that came before."""

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]
    images: tuple[PatchRun, ...]  # each run of patches in this page, in order: equal ids do not make equal patches
    adapter: str = ""  # identity of the one that K/V were made with
    salt: str = ""  # `Request.cache_salt`


class Pages:
    """Who owns which unit. No tensors here: the memory itself is the runner's."""

    def __init__(self, units: int, weights: str = "", digest: Digest | None = None) -> None:
        """`units` counts the null unit; `weights` names the model, so that no two models' pages are ever equal."""
        if units < 2:
            raise ValueError(f"a pool needs the null unit and at least one more, got {units}")
        self.total = units - 1
        self._digest = digest or _blake2b
        self._root = self._digest(weights.encode())
        self._free = list(range(units - 1, 0, -1))
        self._refs = [0] * units
        self._key: dict[int, tuple[int, PageKey]] = {}  # registered unit -> (group, key)
        self._unit: dict[tuple[int, bytes], int] = {}  # (group, digest) -> registered unit
        self._cached: OrderedDict[int, None] = OrderedDict()  # registered and unreferenced, least recently used first
        self._notes: dict[int, Any] = {}  # what the runner keeps about a registered unit (its router sums)

    @property
    def available(self) -> int:
        """Units that can be allocated now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Units that hold a findable page which nobody uses."""
        return len(self._cached)

    def key(
        self,
        parent: PageKey | None,
        tokens: Sequence[int],
        images: Iterable[PatchRun] = (),
        adapter: str = "",
        salt: str = "",
    ) -> PageKey:
        """The key of a full page of `tokens` after `parent` (None: the first page), made with an `adapter` for a request of
        that cache `salt`."""
        before, runs = parent.digest if parent else self._root, tuple(images)
        data = before + array("q", tokens).tobytes() + repr((runs, adapter, salt)).encode()
        return PageKey(self._digest(data), before, tuple(tokens), runs, adapter, salt)

    def allocate(self, count: int) -> list[int]:
        """`count` units, each with one reference. The caller has checked `available`."""
        if count > self.available:
            raise ValueError(f"{count} units asked of a pool with {self.available} available")
        units = []
        for _ in range(count):
            if self._free:
                unit = self._free.pop()
            else:
                unit, _ = self._cached.popitem(last=False)
                self._forget(unit)
            self._refs[unit] = 1
            units.append(unit)
        return units

    def release(self, units: Sequence[int]) -> None:
        """Drop one reference of each of a request's `units`, given in page order. Later pages become older in the cache
        than the pages they hang on, so that eviction takes a prefix from its end."""
        for unit in reversed(units):
            if unit == 0 or self._refs[unit] < 1:
                raise ValueError(f"unit {unit} released more often than it was taken")
            self._refs[unit] -= 1
            if self._refs[unit] == 0:
                if unit in self._key:
                    self._cached[unit] = None
                else:
                    self._free.append(unit)

    def match(self, group: int, keys: Iterable[PageKey]) -> list[int]:
        """Units of the longest stored run of `keys` in `group`, one reference taken on each."""
        units = []
        for key in keys:
            unit = self._find(group, key)
            if unit is None:
                break
            self._cached.pop(unit, None)
            self._refs[unit] += 1
            units.append(unit)
        return units

    def peek(self, group: int, keys: Iterable[PageKey]) -> tuple[int, int]:
        """How many of `keys` `match` would find, and how many of those units are cached (so that taking them makes
        fewer `available`)."""
        found = cached = 0
        for key in keys:
            unit = self._find(group, key)
            if unit is None:
                break
            found += 1
            cached += unit in self._cached
        return found, cached

    def register(self, group: int, key: PageKey, unit: int) -> int | None:
        """Make a full, owned unit findable, and return the unit to hold for this page from now on.

        Where the page was stored by another request meanwhile, that unit is returned with a reference taken, and `unit`
        is released: equal pages are kept once. None when a different page of equal digest is there: `unit` stays
        private, and no later page of its request may be registered.
        """
        there = self._unit.get((group, key.digest))
        if there is None:
            if unit in self._key or self._refs[unit] < 1:
                raise ValueError(f"unit {unit} cannot be registered: it is registered already, or owned by nobody")
            self._unit[group, key.digest] = unit
            self._key[unit] = (group, key)
            return unit
        if self._key[there][1] != key:
            return None
        self.release([unit])
        return self.match(group, [key])[0]

    def forget(self) -> None:
        """Make every cached unit free: no page is found any more that nobody uses."""
        while self._cached:
            unit, _ = self._cached.popitem()
            self._forget(unit)
            self._free.append(unit)

    def note(self, unit: int, value: Any) -> None:
        """Keep `value` beside a unit for as long as its page is findable; private units keep nothing."""
        if unit in self._key:
            self._notes[unit] = value

    def noted(self, unit: int) -> Any:
        """What `note` kept, or None."""
        return self._notes.get(unit)

    def check_integrity(self, tables: Iterable[Iterable[int]] = ()) -> None:
        """Raise RuntimeError unless free + cached + owned == total, every unit is in one state, and the references are
        exactly those of `tables` (the units of every live request)."""
        uses = [0] * len(self._refs)
        for table in tables:
            for unit in table:
                uses[unit] += 1
        free, cached = set(self._free), set(self._cached)
        owned = {unit for unit, refs in enumerate(self._refs) if refs > 0}
        problems = [
            (uses != self._refs, f"references {self._refs} are not the live requests' {uses}"),
            (len(free) != len(self._free), "a unit is free twice"),
            (bool(free & cached or free & owned or cached & owned), "a unit is in two states"),
            (free | cached | owned != set(range(1, self.total + 1)), "free + cached + owned != total"),
            (bool(free & self._key.keys()), "a free unit is registered"),
            (not cached <= self._key.keys(), "a cached unit is not registered"),
            (self._orphans(), "a page outlived the page before it"),
            (not self._notes.keys() <= self._key.keys(), "a note outlived its page"),
            ({(g, k.digest): u for u, (g, k) in self._key.items()} != self._unit, "the two indexes disagree"),
        ]
        for broken, what in problems:
            if broken:
                raise RuntimeError(f"page pool: {what}")

    def _orphans(self) -> bool:
        return any(k.parent != self._root and (g, k.parent) not in self._unit for g, k in self._key.values())

    def _find(self, group: int, key: PageKey) -> int | None:
        unit = self._unit.get((group, key.digest))
        return unit if unit is not None and self._key[unit][1] == key else None

    def _forget(self, unit: int) -> None:
        group, key = self._key.pop(unit)
        del self._unit[group, key.digest]
        self._notes.pop(unit, None)


def _blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
