"""Near copies: documents that are an earlier one with some words changed.

Three steps. MinHash finds candidates: a signature of 80 values stands for a document's 5-grams of words, and two documents
whose values agree in one of 40 bands of 2 are looked at. Of these, the ones that agree in 5 of all values go on: documents
that share a line agree in a band once there are enough of them, and hardly in more (decision 0018). Then the texts themselves
decide: they are near copies when their words, counted, agree to 80 %, a fifth of their 5-grams too, and half of their figures,
so that neither a shared licence header nor a shared vocabulary nor a form that is filled in makes a copy.

Notable: a document is dropped when an *earlier* one is nearly equal. So there is no union of sets to hold in one memory: a
band is looked at alone, a span of its keys a task, and a part's candidates are compared by a task of its own.
Letters: D documents with a signature.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasketch import MinHash

from shoal.data import tables
from shoal.data.documents import Document
from shoal.data.operators.grams import figures, grams, words
from shoal.data.place import here
from shoal.data.tables import Parts, Span

GRAM = 5  # words
# of a signature: at 42 % of common 5-grams, every tenth word changed, 0.05 % of the copies are not found
BANDS, WIDTH = 40, 2
# of the values of two signatures: one in 90,000 of the near copies whose 5-grams just suffice agrees in a band and in fewer
LEAST_EQUAL = 5
LEAST_WORDS = 20  # fewer say too little
MOST_APART = 16  # documents of one bucket that each is compared with: the ones just before it
SAME_WORDS = 0.8  # share of the words, counted, that near copies have in common ...
SAME_GRAMS = 0.2  # ... of the 5-grams: every changed word breaks five ...
SAME_FIGURES = 0.5  # ... and of the figures of the one with fewer: two sheets of one form differ in them
LEAST_FIGURES = 4  # fewer say too little, as a date does
CHUNK = 4096  # 5-grams hashed at once
SIGNATURES = ".near"  # suffix of a part's table
LOW = [f"low{number}" for number in range(BANDS * WIDTH // 8)]  # columns of it: the lowest bytes of eight values each
WORDS_HELD = 256  # texts whose words are held: neighbours in a bucket come again and again

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
    """Collects the signatures of one part and writes them as a table: the row of each document, its number of words and the
    lowest bytes of its values; and for each band its key of every document, sorted, and which document that is."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, row: int, document: Document) -> None:
        of = signature(document)
        if of is not None:
            self._rows.append(np.concatenate([np.array([row], dtype=np.uint32), of]))

    def write(self, path: Path) -> None:
        empty = np.empty((2 + BANDS * WIDTH, 0), dtype=np.uint32)
        table = np.ascontiguousarray(np.stack(self._rows, axis=1)) if self._rows else empty
        low = np.ascontiguousarray(table[2:].T.astype(np.uint8)).view(np.uint64)
        columns = {"rows": table[0], "words": table[1], **dict(zip(LOW, low.T, strict=True))}
        for band in range(BANDS):
            first = 2 + band * WIDTH
            keys = table[first].astype(np.uint64) << np.uint64(32) | table[first + 1]
            order = np.argsort(keys, kind="stable")  # within a bucket the documents stay in their order
            columns |= {f"key{band}": keys[order], f"at{band}": order.astype(np.uint32)}
        tables.write(path, columns)


def candidates(parts: Parts, bands: Iterable[int], span: Span, out: Path) -> int:
    """Write the pairs of documents, as part and row of the later and of the earlier one, that agree in one of `bands` in a key
    of `span` and could be near copies by their lengths; how many."""
    pairs = np.empty((2, 0), dtype=np.uint64)
    for band in bands:  # one at a time: copies agree in many, and so often nobody is to hold them
        pairs = _once(np.concatenate([pairs, _agreeing(parts, band, span)], axis=1))
    columns = zip(("part", "row", "other_part", "other_row"), (*_place(pairs[0]), *_place(pairs[1])), strict=True)
    tables.write(out, dict(columns))
    return pairs.shape[1]


def confirmed(parts: Parts, number: int, candidates: Iterable[Path], dropped: np.ndarray) -> np.ndarray:
    """int64: the rows of part `number` that are near copies of earlier documents, of those that are not `dropped` (bool [D])
    anyhow. `candidates`: the pairs of all bands and spans.

    One other part after the other is opened, and a row that is found is not compared again.
    """
    names = ("row", "other_part", "other_row")
    pairs = tables.gathered((tables.of_part(path, number) for path in candidates), names)
    left = ~dropped[pairs["row"]]
    row, other, other_row = (pairs[name][left] for name in names)
    order = np.argsort(other)
    row, other, other_row = row[order], other[order], other_row[order]
    found: set[int] = set()
    ours = lru_cache(WORDS_HELD)(Texts(parts[number]).words)
    for part in np.unique(other).tolist():
        at = slice(*np.searchsorted(other, np.array([part, part + 1], dtype=other.dtype)))
        those = _once(np.stack([row[at], other_row[at]]))  # neighbours in turn; two bands may have the same
        those = those[:, _equal(parts[number], those[0], parts[part], those[1]) >= LEAST_EQUAL]
        theirs = lru_cache(WORDS_HELD)(Texts(parts[part]).words)
        for one, place in zip(*those.tolist(), strict=True):
            if one not in found and alike(ours(one), theirs(place)):
                found.add(one)
    return np.array(sorted(found), dtype=np.int64)


def shares(count: int) -> list[range]:
    """The bands in `count` shares of about equal size, for as many tasks."""
    return [range(BANDS * i // count, BANDS * (i + 1) // count) for i in range(count)]


def nearly_equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two texts, as their words, are near copies."""
    return alike(Counted.of(one), Counted.of(other))


class Counted(NamedTuple):
    """What comparing a text takes: its words and how often each stands there, its 5-grams and its figures,
    each sorted and once."""

    words: np.ndarray
    times: np.ndarray
    grams: np.ndarray
    figures: np.ndarray
    total: int  # words

    @classmethod
    def of(cls, words: np.ndarray) -> Counted:
        words_, times = np.unique(words, return_counts=True)
        return cls(words_, times, np.unique(grams(words, GRAM)), figures(words), len(words))


def alike(one: Counted, other: Counted) -> bool:
    """Whether two texts are near copies."""
    _, here, there = np.intersect1d(one.words, other.words, assume_unique=True, return_indices=True)
    common = int(np.minimum(one.times[here], other.times[there]).sum())
    if 2 * common < SAME_WORDS * (one.total + other.total):
        return False
    shared = len(np.intersect1d(one.grams, other.grams, assume_unique=True))
    if shared < SAME_GRAMS * (len(one.grams) + len(other.grams) - shared):
        return False
    some = min(len(one.figures), len(other.figures))
    same = len(np.intersect1d(one.figures, other.figures, assume_unique=True))
    return some < LEAST_FIGURES or same >= SAME_FIGURES * some


def _agreeing(parts: Parts, band: int, span: Span) -> np.ndarray:
    """uint64 [2, pairs]: places of later and earlier documents that agree in a band."""

    def of(number: int, path: Path) -> tables.Table:
        key, which = f"key{band}", f"at{band}"
        table = tables.read(path.with_suffix(SIGNATURES), ("rows", "words", key, which))
        at = span.of(table[key])
        place = table[which][at]
        rows = table["rows"][place].astype(np.uint64) | np.uint64(number << 32)
        return {"key": table[key][at], "place": rows, "words": table["words"][place]}

    found = tables.gathered((of(*each) for each in enumerate(parts)), ("key", "place", "words"))
    return found["place"][_pairs(found["key"], found["words"])]


def _once(pairs: np.ndarray) -> np.ndarray:
    """`pairs`, [2, pairs] of later and earlier ones, sorted and each once."""
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    first = np.ones(pairs.shape[1], dtype=bool)
    first[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    return pairs[:, first]


def _pairs(keys: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [2, pairs]: later and earlier documents that have equal `keys` (uint64 [D], in the documents' order) and could be
    near copies by their `lengths` in words."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for apart in range(1, MOST_APART + 1):
        same = np.flatnonzero(keys[apart:] == keys[:-apart])
        if not len(same):
            break
        pair = np.stack([order[same + apart], order[same]])
        short, long = np.sort(lengths[pair].astype(np.float64), axis=0)
        pairs.append(pair[:, 2 * short >= SAME_WORDS * (short + long)])
    return np.concatenate(pairs, axis=1)


def _equal(path: Path, rows: np.ndarray, other: Path, other_rows: np.ndarray) -> np.ndarray:
    """int64 [pairs]: how many values the signature of a document in `rows` of a part has in common with that of the one in
    `other_rows` of another, by their lowest bytes: of values that differ one in 256 counts as well."""

    def low(path: Path, rows: np.ndarray) -> np.ndarray:
        table = tables.read(path.with_suffix(SIGNATURES), ("rows", *LOW))
        at = np.searchsorted(table["rows"], rows)
        return np.stack([table[name][at] for name in LOW], axis=1).view(np.uint8)

    return np.asarray((low(path, rows) == low(other, other_rows)).sum(axis=1))


def _place(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Part and row of documents, uint32, out of both in one number."""
    return (numbers >> np.uint64(32)).astype(np.uint32), (numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32)


class Texts:
    """The texts of a part by row, mapped and not held; opened when the first is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _column(self) -> Any:
        with pa.memory_map(str(here(self._path))) as source:
            return pa.chunked_array([batch.column("text") for batch in pa.ipc.open_stream(source)], pa.large_string())

    def words(self, row: int) -> Counted:
        return Counted.of(words(self._column[row].as_py()))
