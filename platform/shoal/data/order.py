"""The order in which rows are trained on: pure functions of seed, epoch and position, so that a cursor is one integer.

Notable: only the raw stream of numpy's PCG64 is used, which numpy promises never to change; its shuffles are not promised. An
order of many rows is never whole in memory (decision 0017): one span of it is, the rows whose numbers begin with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import gcd

import numpy as np

from shoal.data.documents import MODALITIES
from shoal.errors import ConfigError, UsageError

PARTS = 1000  # a mix is kept to a tenth of a percent
WINDOW = 1024  # rows that are sorted by length together
SPAN = 2**20  # rows of an order that are held at once at most, in the mean over its spans
SPANS = 8  # spans that stay: of each modality the one that is read, and the next while a step ahead is asked for
DRAWN = 2**16  # numbers of the stream that are drawn at once
BITS = 64  # of each of them


@lru_cache(maxsize=SPANS)
def permutation(count: int, *key: int) -> np.ndarray:
    """The numbers 0 to count - 1 in an order that depends on `key` alone."""
    raw = _numbers(*key).random_raw(count)
    order = np.argsort(raw, kind="stable")
    order.setflags(write=False)
    return order


def _numbers(*key: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(key))


def permuted(count: int, place: int, *key: int) -> int:
    """``permutation(count, *key)[place]``, of which no more is held than the span that `place` is in: all of it takes 8 bytes a
    number, and 20 while it is sorted. A span is drawn in one pass over the stream, some 4 ns a number of all."""
    bits = span_bits(count)
    if not bits:
        return int(permutation(count, *key)[place])
    ends = _ends(count, bits, *key)
    span = int(np.searchsorted(ends, place, side="right"))
    before = int(ends[span - 1]) if span else 0
    return int(_span(count, bits, span, *key)[place - before])


def span_bits(count: int) -> int:
    """How many of a number's highest bits tell its span: as few as leave each of the spans `SPAN` numbers in the mean."""
    return ((count - 1) // SPAN).bit_length()


@lru_cache(maxsize=SPANS)
def _ends(count: int, bits: int, *key: int) -> np.ndarray:
    """int64 [2^bits]: how many numbers of the stream are in the spans up to each, which their highest `bits` bits tell."""
    found = np.zeros(2**bits, np.int64)
    for _, spans in _stream(count, bits, *key):
        found += np.bincount(spans.view(np.int64), minlength=2**bits)
    return found.cumsum()


@lru_cache(maxsize=SPANS)
def _span(count: int, bits: int, span: int, *key: int) -> np.ndarray:
    """The part of `permutation` that one span is: where its numbers stand in the stream, by their size, equal ones as they
    come."""
    values, places, start = list[np.ndarray](), list[np.ndarray](), 0
    for raw, spans in _stream(count, bits, *key):
        mine = np.flatnonzero(spans == span)
        values.append(raw[mine])
        places.append(start + mine)
        start += len(raw)
    order = np.concatenate(places)[np.argsort(np.concatenate(values), kind="stable")]
    order.setflags(write=False)
    return order


def _stream(count: int, bits: int, *key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers that `permutation` sorts, uint64, `DRAWN` at a time, and the span of each."""
    stream = _numbers(*key)
    for start in range(0, count, DRAWN):
        raw = stream.random_raw(min(DRAWN, count - start))
        yield raw, raw >> np.uint64(BITS - bits)


def parse_mix(mix: str | Mapping[str, float]) -> dict[str, float]:
    """``text=60,image=20,code=20``, or the mapping, as shares that sum to 1. Raises UsageError."""
    pairs = mix.items() if isinstance(mix, Mapping) else [part.partition("=")[::2] for part in mix.split(",")]
    try:
        shares = {str(name).strip(): float(share) for name, share in pairs}
    except (TypeError, ValueError):
        shares = {}
    if (
        not shares
        or set(shares) - set(MODALITIES)
        or min(shares.values()) < 0
        or not 0 < sum(shares.values()) < math.inf
    ):
        raise UsageError("--mix", got=mix, allowed="shares of text, image and code, such as text=60,image=20,code=20")
    return {name: share / sum(shares.values()) for name, share in shares.items()}


class Mix:
    """Which modality stands at each position of the global order, so that every stretch of it has the shares asked for.

    Each position goes to the modality that is furthest behind its share (a deficit counter). The pattern repeats, so any
    position is found at once.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        total = sum(shares.values())
        if not shares or min(shares.values()) < 0 or total <= 0:
            raise ConfigError("mix", got=dict(shares), allowed="shares of 0 or more that do not sum to 0")
        exact = {name: share / total * PARTS for name, share in shares.items()}
        parts = {name: int(value) for name, value in exact.items()}
        rounded_up = sorted(exact, key=lambda name: parts[name] - exact[name])[: PARTS - sum(parts.values())]
        for name in rounded_up:
            parts[name] += 1
        divisor = gcd(*parts.values())
        self.parts = {name: n // divisor for name, n in parts.items() if n}  # of one period
        self.period = sum(self.parts.values())
        self._pattern = self._one_period()

    @property
    def shares(self) -> dict[str, float]:
        return {name: n / self.period for name, n in self.parts.items()}

    def at(self, position: int) -> tuple[str, int]:
        """The modality at a position, and how many of that modality come before."""
        periods, inside = divmod(position, self.period)
        name, before = self._pattern[inside]
        return name, periods * self.parts[name] + before

    def _one_period(self) -> list[tuple[str, int]]:
        seen = dict.fromkeys(self.parts, 0)
        pattern = []
        for position in range(1, self.period + 1):
            name = max(seen, key=lambda n: self.parts[n] * position - seen[n] * self.period)
            pattern.append((name, seen[name]))
            seen[name] += 1
        return pattern


class RowOrder:
    """The endless sequence of rows that training reads: which modality's, and which of its rows, at every position.

    Within the mix, each modality's rows are shuffled anew whenever they have all been seen; a short source repeats.
    """

    def __init__(self, weights: Mapping[str, float], counts: Mapping[str, int], seed: int) -> None:
        """`weights`: of each modality, by row; `counts`: rows that it has."""
        self.mix, self.counts, self.seed = Mix(weights), counts, seed

    def at(self, position: int) -> tuple[str, int]:
        """Modality and row number."""
        name, occurrence = self.mix.at(position)
        return name, shuffled(self.counts[name], occurrence, self.seed, self._key(name))

    def _key(self, name: str) -> int:
        return MODALITIES.index(name) if name in MODALITIES else len(MODALITIES)


def shuffled(count: int, occurrence: int, *key: int) -> int:
    """Which of `count` rows is taken at the n-th `occurrence`: each once an epoch, shuffled anew for every epoch."""
    epoch, place = divmod(occurrence, count)
    return permuted(count, place, *key, epoch)


def length_groups(lengths: np.ndarray, budget: int, *key: int) -> list[np.ndarray]:
    """One epoch of groups of row numbers, similar lengths together, in shuffled order.

    A group's rows times its longest is at most `budget` tokens (one row may exceed it alone). Rows are shuffled, sorted by
    length within windows, and cut: so the grouping differs from epoch to epoch.
    """
    order = permutation(len(lengths), *key, 0)
    groups: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        groups += cut(window, lengths, budget)
    return [groups[index] for index in permutation(len(groups), *key, 1)]


def cut(rows: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Consecutive `rows` in groups whose number of rows times longest row is within `budget`."""
    groups, start, longest = [], 0, 0
    for at, length in enumerate(lengths[rows].tolist()):
        if at > start and max(longest, length) * (at - start + 1) > budget:
            groups.append(rows[start:at])
            start, longest = at, 0
        longest = max(longest, length)
    return [*groups, rows[start:]] if len(rows) else []


def padding(groups: Sequence[np.ndarray], lengths: np.ndarray) -> float:
    """Share of padding when each group is padded to its longest row."""
    padded = sum(len(group) * int(lengths[group].max()) for group in groups)
    return 1 - sum(int(lengths[group].sum()) for group in groups) / max(1, padded)
