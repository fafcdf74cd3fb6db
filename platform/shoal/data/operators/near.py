"""Near copies: documents that are an earlier one with some words changed.

Two steps. MinHash finds candidates: a signature of 80 values stands for a document's 5-grams of words, and two documents
whose values agree in one of 40 bands of 2 are looked at. Then the texts themselves decide: they are near copies when their
words, counted, agree to 80 %, and a fifth of their 5-grams too, so that neither a shared licence header nor a shared
vocabulary makes a copy.

Notable: a document is dropped when an *earlier* one is nearly equal. So there is no union of sets to hold in one memory: a
band is looked at alone, by one task, which holds some 40 bytes a document (100 million documents: 4 GB).
Letters: D documents with a signature.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from shoal.data.documents import Document
from shoal.data.operators.grams import grams, words

GRAM = 5  # words
# of a signature: at 42 % of common 5-grams, every tenth word changed, 0.05 % of the copies are not found
BANDS, WIDTH = 40, 2
LEAST_WORDS = 20  # fewer say too little
MOST_APART = 16  # documents of one bucket that each is compared with: the ones just before it
SAME_WORDS = 0.8  # share of the words, counted, that near copies have in common ...
SAME_GRAMS = 0.2  # ... and of the 5-grams: every changed word breaks five
CHUNK = 4096  # 5-grams hashed at once

_APART = {"text": 0, "code": 0x5BD1E995}  # a module and the page of its docstrings are no copies of each other
_START = MinHash(num_perm=BANDS * WIDTH, seed=1, hashfunc=int, scheme="affine32")


def signature(document: Document) -> np.ndarray | None:
    """uint32 [1 + BANDS * WIDTH]: the number of words, then the MinHash values. None for what is not compared: short texts, and
    what is asked of an image or in a few words, where all are alike by nature."""
    if document.modality == "image" or document.questions:
        return None
    found = words(document.text)
    if len(found) < LEAST_WORDS:
        return None
    some = np.unique(grams(found, GRAM) ^ np.uint64(_APART[document.modality])) & np.uint64(0xFFFFFFFF)
    minhash = _START.copy()
    for start in range(0, len(some), CHUNK):
        minhash.update_batch(some[start : start + CHUNK].tolist())
    return np.concatenate([[len(found)], minhash.hashvalues]).astype(np.uint32)


class Signatures:
    """Collects the signatures of one part and writes them: uint32 [2 + BANDS * WIDTH, D], the row in the part first."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, row: int, document: Document) -> None:
        of = signature(document)
        if of is not None:
            self._rows.append(np.concatenate([np.array([row], dtype=np.uint32), of]))

    def write(self, path: Path) -> None:
        table = np.stack(self._rows, axis=1) if self._rows else np.empty((2 + BANDS * WIDTH, 0), dtype=np.uint32)
        with path.open("wb") as out:
            np.save(out, np.ascontiguousarray(table))


def copies(parts: Sequence[tuple[Path, Path]], bands: Iterable[int]) -> np.ndarray:
    """int64 [copies, 2]: part and row of every document that is a near copy of an earlier one, by some of the bands.

    `parts`: the documents' file and the signatures' file of each part, in order.
    """
    tables = [np.load(path, mmap_mode="r") for _, path in parts]
    starts = np.cumsum([0, *(table.shape[1] for table in tables)])
    lengths = np.concatenate([table[1] for table in tables])
    pairs = [_candidates(tables, band, lengths) for band in bands]
    later, earlier = np.unique(np.concatenate(pairs), axis=0).T if pairs else ((), ())
    texts = _Texts([path for path, _ in parts], tables, starts)
    found: set[int] = set()
    for one, other in zip(map(int, later), map(int, earlier), strict=True):
        if one not in found and nearly_equal(texts.words(one), texts.words(other)):
            found.add(one)
    return np.array([texts.place(number) for number in sorted(found)], dtype=np.int64).reshape(-1, 2)


def shares(count: int) -> list[range]:
    """The bands in `count` shares of about equal size, for as many tasks."""
    return [range(BANDS * i // count, BANDS * (i + 1) // count) for i in range(count)]


def nearly_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two texts, as their words, are near copies."""
    common = sum((Counter(one.tolist()) & Counter(other.tolist())).values())
    if 2 * common < SAME_WORDS * (len(one) + len(other)):
        return False
    a, b = (np.unique(grams(of, GRAM)) for of in (one, other))
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared >= SAME_GRAMS * (len(a) + len(b) - shared)


def _candidates(tables: Sequence[np.ndarray], band: int, lengths: np.ndarray) -> np.ndarray:
    """int64 [pairs, 2]: later and earlier documents that agree in a band and could be near copies by their lengths."""
    first = 2 + band * WIDTH
    keys = np.concatenate([table[first].astype(np.uint64) << np.uint64(32) | table[first + 1] for table in tables])
    order = np.argsort(keys, kind="stable")  # within a bucket the documents stay in their order
    keys = keys[order]
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for apart in range(1, MOST_APART + 1):
        same = np.flatnonzero(keys[apart:] == keys[:-apart])
        if not len(same):
            break
        pair = np.stack([order[same + apart], order[same]], axis=1)
        short, long = np.sort(lengths[pair].astype(np.float64), axis=1).T
        pairs.append(pair[2 * short >= SAME_WORDS * (short + long)])
    return np.concatenate(pairs)


class _Texts:
    """The texts of all parts by document number, mapped and not held."""

    def __init__(self, paths: Sequence[Path], tables: Sequence[np.ndarray], starts: np.ndarray) -> None:
        self._paths, self._tables, self._starts = paths, tables, starts.tolist()
        self._columns = lru_cache(64)(self._open)
        self.words = lru_cache(256)(self._words)  # neighbours in a bucket come again and again

    def place(self, number: int) -> tuple[int, int]:
        """Part and row."""
        part = bisect_right(self._starts, number) - 1
        return part, int(self._tables[part][0, number - self._starts[part]])

    def _words(self, number: int) -> np.ndarray:
        part, row = self.place(number)
        return words(self._columns(part)[row].as_py())

    def _open(self, part: int) -> Any:
        return pa.chunked_array(list(_text_columns(self._paths[part])), pa.large_string())


def _text_columns(path: Path) -> Iterator[pa.Array]:
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            yield batch.column("text")
