"""How surprising a prompt's tokens are to one who has only counted: the signal of new words and new languages.

A table of how often tokens, and pairs of them, stood in the chats that a model was trained on. One number of a prompt, and no
histogram of it: that of a short prompt *is* the prompt.

Letters: V tokens in the vocabulary, n tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shoal.errors import DataError
from shoal.machine import aside

PAIRS = 1 << 16  # places that pairs are counted in, by a hash
UNSEEN = 0.5  # of a token that never stood there
TRUST = 5.0  # times that a token must have stood there until its pairs count for half
_FIRST, _SECOND = np.uint64(2654435761), np.uint64(40503)


class Surprisal:
    """Counts of tokens [V], of tokens that something follows [V], and of hashed pairs [PAIRS]."""

    def __init__(self, single: np.ndarray, followed: np.ndarray, pairs: np.ndarray) -> None:
        self._single, self._followed, self._pairs = single, followed, pairs

    @classmethod
    def counted(cls, prompts: Iterable[Sequence[int]], vocab: int) -> Surprisal:
        """Of prompts as token ids, each below `vocab`."""
        single, followed, pairs = np.zeros(vocab), np.zeros(vocab), np.zeros(PAIRS)
        for prompt in prompts:
            ids = np.asarray(prompt, dtype=np.int64)
            np.add.at(single, ids, 1)
            np.add.at(followed, ids[:-1], 1)
            np.add.at(pairs, _places(ids), 1)
        return cls(single, followed, pairs)

    def of(self, prompt: Sequence[int]) -> float | None:
        """Mean nats a token of a prompt; None for an empty one. Ids beyond the vocabulary are as good as unseen."""
        ids = np.asarray(prompt, dtype=np.int64)
        if not len(ids):
            return None
        vocab = len(self._single)
        known = np.minimum(ids, vocab - 1)
        counts = np.where(ids < vocab, self._single[known], 0.0)
        alone = (counts + UNSEEN) / (self._single.sum() + UNSEEN * vocab)
        before = np.where(ids[:-1] < vocab, self._followed[known[:-1]], 0.0)
        trust = before / (before + TRUST)
        # a place that other pairs share counts too many: no more than always
        after = np.minimum(self._pairs[_places(ids)] / np.maximum(before, 1.0), 1.0)
        chance = np.concatenate([alone[:1], trust * after + (1 - trust) * alone[1:]])
        return float(-np.log(chance).mean())

    def write(self, path: Path) -> None:
        with aside(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, single=self._single, followed=self._followed, pairs=self._pairs)

    @classmethod
    def read(cls, path: Path) -> Surprisal:
        """Raises DataError for a file that is none."""
        try:
            with np.load(path) as stored:
                found = [np.asarray(stored[name], dtype=float) for name in ("single", "followed", "pairs")]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is no table of tokens", got=str(error), do="count one anew") from error
        if found[0].shape != found[1].shape or found[2].shape != (PAIRS,):
            raise DataError(f"{path} is no table of tokens", got=[one.shape for one in found], do="count one anew")
        return cls(*found)


def _places(ids: np.ndarray) -> np.ndarray:
    """Where the pairs of a prompt [n] are counted, [n - 1]."""
    some = ids.astype(np.uint64)
    return np.asarray((some[:-1] * _FIRST + some[1:] * _SECOND) % np.uint64(PAIRS), dtype=np.int64)
