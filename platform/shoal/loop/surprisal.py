"""How surprising a prompt's tokens are to one who has only counted: the signal of new words and new languages.

A table of how often tokens, and pairs of them, stood in a thousand prompts; a service learns it from the first that come. One
number of a prompt is kept, and no histogram of it: that of a short prompt *is* the prompt. It is of the most surprising tokens
alone, since a new thing is asked for in old words: the mean of all would bury it.

Letters: V tokens in the vocabulary, n tokens of a prompt.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from shoal.errors import DataError
from shoal.machine import aside

log = logging.getLogger("shoal.loop")

WANTED = 1_000  # prompts that a service learns a table from
EVERY = 50  # prompts between two looks for one that another process has made
PAIRS = 1 << 16  # places that pairs are counted in, by a hash
UNSEEN = 0.5  # of a token that never stood there
TAIL, LEAST_TAIL = 0.1, 3  # share of a prompt's tokens that count, the most surprising, and how many at least
TRUST = 5.0  # times that a token must have stood there until its pairs count for half
_FIRST, _SECOND = np.uint64(2654435761), np.uint64(40503)


@dataclass(frozen=True)
class _Rates:
    """What a prompt's chances are made of, of each token [V + 1]; the last is one beyond the vocabulary."""

    alone: np.ndarray  # its chance where nothing is known of the one before
    trust: np.ndarray  # how much its pairs count
    share: np.ndarray  # `trust` for each of the times that something followed it


class Surprisal:
    """Counts of tokens [V], of tokens that something follows [V], and of hashed pairs [PAIRS]."""

    def __init__(self, single: np.ndarray, followed: np.ndarray, pairs: np.ndarray) -> None:
        self._single, self._followed, self._pairs = single, followed, pairs
        self._total = float(single.sum())
        self._known: _Rates | None = None  # of what is counted so far

    @classmethod
    def counted(cls, prompts: Iterable[Sequence[int]], vocab: int) -> Surprisal:
        """Of prompts as token ids, each below `vocab`."""
        table = cls(np.zeros(vocab), np.zeros(vocab), np.zeros(PAIRS))
        for prompt in prompts:
            table.add(prompt)
        return table

    def add(self, prompt: Sequence[int]) -> None:
        """Count a prompt as well; ids beyond the vocabulary are left out."""
        ids = np.asarray(prompt, dtype=np.int64)
        ids = ids[ids < len(self._single)]
        np.add.at(self._single, ids, 1)
        np.add.at(self._followed, ids[:-1], 1)
        np.add.at(self._pairs, _places(ids), 1)
        self._total += len(ids)
        self._known = None

    def of(self, prompt: Sequence[int]) -> float | None:
        """Mean nats of the most surprising tenth of a prompt's tokens, of three at least; None for an empty one. Ids beyond the
        vocabulary are as good as unseen."""
        ids = np.asarray(prompt, dtype=np.int64)
        if not len(ids):
            return None
        rates = self._known = self._known or self._rates()
        known = np.minimum(ids, len(self._single))
        chance, before = rates.alone[known], known[:-1]
        # a place that other pairs share counts too many: no more than always
        after = np.minimum(self._pairs[_places(ids)] * rates.share[before], rates.trust[before])
        chance[1:] = after + (1 - rates.trust[before]) * chance[1:]
        count = min(len(ids), max(LEAST_TAIL, math.ceil(TAIL * len(ids))))
        return float(-np.log(np.partition(chance, count - 1)[:count]).mean())

    def _rates(self) -> _Rates:
        alone = (np.append(self._single, 0.0) + UNSEEN) / (self._total + UNSEEN * len(self._single))
        before = np.append(self._followed, 0.0)
        trust = before / (before + TRUST)
        return _Rates(alone, trust, trust / np.maximum(before, 1.0))

    def write(self, path: Path) -> None:
        with aside(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, single=self._single, followed=self._followed, pairs=self._pairs)

    @classmethod
    def read(cls, path: Path) -> Surprisal:
        """Raises DataError for a file that is none."""
        try:
            with np.load(path) as stored:
                found = [np.asarray(stored[name], dtype=float) for name in ("single", "followed", "pairs")]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{path} is no table of tokens", got=str(error), do="count one anew") from error
        if found[0].shape != found[1].shape or found[2].shape != (PAIRS,):
            raise DataError(f"{path} is no table of tokens", got=[one.shape for one in found], do="count one anew")
        return cls(*found)


class Learned:
    """The table in the file `path`: counted from the first `wanted` prompts that come, and never changed after. Of several
    processes that learn it the first to be done is the one whose table all take."""

    def __init__(self, path: Path, vocab: int, wanted: int = WANTED) -> None:
        self._path, self._wanted = path, wanted
        self._counts, self._seen, self._calls = Surprisal.counted([], vocab), 0, 0
        self._making = threading.Lock()
        self._table: Surprisal | None = None
        self._look()

    def of(self, prompt: Sequence[int]) -> float | None:
        """As `Surprisal.of`; None as long as there is no table, which then learns from `prompt`."""
        if self._table is not None:
            return self._table.of(prompt)
        if self._seen < self._wanted:
            self._counts.add(prompt)
            self._seen += 1
        self._calls += 1
        if self._seen == self._wanted or self._calls % EVERY == 0:
            self._look()
        return None

    def _look(self) -> None:
        """Take the table that is there, or write it, beside whoever calls."""
        done = self._seen == self._wanted
        if (done or self._path.exists()) and self._making.acquire(blocking=False):
            threading.Thread(target=self._take, args=[done], name="surprisal", daemon=True).start()

    def _take(self, done: bool) -> None:
        try:
            if done and not self._path.exists():
                beside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
                try:
                    self._counts.write(beside)
                    os.link(beside, self._path)  # another's stays
                finally:
                    beside.unlink(missing_ok=True)
        except FileExistsError:
            pass
        except OSError as error:
            log.error("no table of tokens can be written: %s: %s", self._path, error.strerror)
        try:
            if self._path.exists():
                self._table = Surprisal.read(self._path)
        except DataError as error:
            log.error("%s", error)
        if self._table is not None or not done:
            self._making.release()  # else it stays as it is until a restart


def _places(ids: np.ndarray) -> np.ndarray:
    """Where the pairs of a prompt [n] are counted, [n - 1]."""
    some = ids.astype(np.uint64)
    return np.asarray((some[:-1] * _FIRST + some[1:] * _SECOND) % np.uint64(PAIRS), dtype=np.int64)
