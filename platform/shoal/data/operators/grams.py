"""Words and runs of n words as 64-bit hashes: what two texts are compared by. Letters: n words in a gram, W words in a text."""

from __future__ import annotations

import re

import numpy as np
import xxhash

# A character of a script that has no spaces between words is a word.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u9fff]+"
)
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the order of the words counts


def words(text: str) -> np.ndarray:
    """uint64 [W]: the words of a text, in lower case and without punctuation."""
    known: dict[str, int] = {}
    hashed = [known[w] if w in known else known.setdefault(w, _hash(w)) for w in _WORD.findall(text.lower())]
    return np.array(hashed, dtype=np.uint64)


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [W - n + 1]: every run of n words; empty when there are fewer."""
    size = len(words) - n + 1
    if size <= 0:
        return np.empty(0, dtype=np.uint64)
    total = words[:size].copy()
    for at in range(1, n):  # wraps around, which is meant
        total = total * _FACTOR + words[at : at + size]
    return total ^ (total >> np.uint64(29))


def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
