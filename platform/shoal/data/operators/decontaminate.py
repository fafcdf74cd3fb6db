"""Passages that a model will be evaluated on, taken out of training documents. Runs of 13 words that both have find them.

    a part of the sets   texts -> runs of words as hashes, in tables (`collect`)
    a span of hashes     its share of all these tables -> one table, each hash once (`merge`)

Notable: the passage goes, not the document: a licence that a set quotes is no reason to lose a book. What is compared is words
alone (`grams`), on both sides, so a reformatted item is found. Every string of an evaluation set counts, whatever its field is
called, so the benchmarks' own files can be named.
However much the sets hold, a task holds `HELD` runs or a span; who reads a corpus maps the tables, which the processes of a
machine share.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shoal.data import tables
from shoal.data.documents import Document, Skipped
from shoal.data.operators.grams import grams, placed, words
from shoal.data.sources import rows
from shoal.data.sources.files import File, Unusable
from shoal.data.sources.kinds import PARQUET, TABLES
from shoal.data.sources.read import read
from shoal.data.tables import Span
from shoal.errors import DataError

GRAM = 13  # words; what GPT-3 and most after it took
LEAST = 8  # words of an item shorter than that: it counts as a whole; still shorter ones are said by chance
AROUND = 200  # characters that go with a passage on each side, as GPT-3 had it: an item's answer stands beside it ...
PARAGRAPH = "\n\n"  # ... but never more than its paragraph
LEFT = 40  # characters of a document; with less beside the passages it was nothing else
_SPACE = re.compile(r"\s")
HELD = 2**21  # runs that are held at once while texts are read


@dataclass
class Runs:
    """What `collect` found: tables that it wrote, and by words in a run how many there were."""

    tables: int = 0
    counts: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Known:
    """All that evaluation sets hold: what `merge` wrote for each span of hashes, in order, and how many words runs have."""

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]


class Decontaminate:
    """The operator."""

    def __init__(self, known: Known) -> None:
        self._lengths = sorted(known.lengths)
        self._keys = [tables.read(path)["key"] for path in known.paths]
        count = len(self._keys)
        self._starts = np.array([tables.KEYS * number // count for number in range(count)], dtype=np.uint64)

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Skipped:
        """The document without the passages, counted in `counts`; of questions with answers, without those pairs. It is left
        out where it holds next to nothing else."""
        if document.questions:
            asked = tuple((q, a) for q, a in document.questions if not (self.passages(q) or self.passages(a)))
            out, what = len(document.questions) - len(asked), "questions left out"
            left = replace(document, questions=asked, text="").mended(str)  # whose text is made of them
        else:
            found = self.passages(document.text)
            out, what = len(found), "passages left out"
            left = replace(document, text=without(document.text, found))
        if not out:
            return document
        if not left.questions and len(left.text.strip()) < LEFT:
            reason = "holds next to nothing but evaluation items"
            return Skipped(document.origin, document.source, reason, operator="decontamination")
        counts[what] += out
        return left

    def passages(self, text: str) -> list[tuple[int, int]]:
        """Where runs of words that evaluation sets have begin and end in `text`: apart from each other, in order."""
        found, places = placed(text)
        hit = np.zeros(len(found), dtype=bool)
        for n in self._lengths:
            for at in np.flatnonzero(self._known(grams(found, n))):
                hit[at : at + n] = True
        edges = np.flatnonzero(np.diff(hit, prepend=False, append=False)).reshape(-1, 2)
        return [(int(places[first, 0]), int(places[last - 1, 1])) for first, last in edges]

    def _known(self, some: np.ndarray) -> np.ndarray:
        """bool: which of `some` a table has."""
        of = np.searchsorted(self._starts, some, side="right") - 1
        known = np.zeros(len(some), dtype=bool)
        for number in np.unique(of).tolist():
            known[of == number] = _which_in(some[of == number], self._keys[number])
        return known


def without(text: str, passages: Sequence[tuple[int, int]]) -> str:
    """`text` without the passages and what goes with them."""
    pieces, done = list[str](), 0
    for start, end in passages:
        pieces.append(text[done : max(done, _begin(text, start))])
        done = max(done, _end(text, end))
    return PARAGRAPH.join(piece.strip("\n") for piece in [*pieces, text[done:]] if piece.strip())


def _begin(text: str, start: int) -> int:
    """Where what goes with a passage before it begins: its paragraph, or else a word."""
    least = max(0, start - AROUND)
    if (at := text.rfind(PARAGRAPH, least, start)) >= 0:
        return at + len(PARAGRAPH)
    space = _SPACE.search(text, least, start) if least else None
    return space.start() if space else least


def _end(text: str, end: int) -> int:
    """Where what goes with a passage behind it ends."""
    most = min(len(text), end + AROUND)
    if (at := text.find(PARAGRAPH, end, most)) >= 0:
        return at
    space = max(text.rfind(" ", end, most), text.rfind("\n", end, most)) if most < len(text) else -1
    return space if space >= 0 else most


def collect(files: Sequence[File], path: Path) -> Runs:
    """Write the runs of words of evaluation files as tables beside `path` (`table_of`), the hashes of each sorted. Raises
    DataError for a file that cannot be read: what is not known cannot be looked for."""
    found, held, size = Runs(), list[np.ndarray](), 0
    for text in (text for file in files for text in _texts(file)):
        of = words(text)
        if len(of) < LEAST:
            continue
        n = min(GRAM, len(of))
        held.append(grams(of, n))
        size += len(held[-1])
        found.counts[n] += len(held[-1])
        if size >= HELD:
            _write(found, held, path)
            held, size = [], 0
    if held:
        _write(found, held, path)
    return found


def table_of(path: Path, number: int) -> Path:
    """One of the tables that `collect` writes for `path`."""
    return path.with_suffix(f".{number}.runs")


def merge(paths: Iterable[Path], span: Span, out: Path) -> int:
    """Write the hashes in `span` of the tables at `paths`, sorted and each once; how many."""

    def of(path: Path) -> tables.Table:
        key = tables.read(path)["key"]
        return {"key": key[span.of(key)]}

    keys = np.unique(tables.gathered(map(of, paths), ("key",))["key"])
    tables.write(out, {"key": keys})
    return len(keys)


def need_texts(files: Sequence[File], runs: int) -> None:
    """Raises DataError where evaluation files hold no runs of words: nothing would be looked for."""
    if not runs:
        raise DataError(
            f"evaluation sets {', '.join(sorted({file.spec.uri for file in files}))}",
            got="no text", allowed=f"files with texts of {LEAST} words or more",
        )  # fmt: skip


def _write(found: Runs, held: Sequence[np.ndarray], path: Path) -> None:
    tables.write(table_of(path, found.tables), {"key": np.unique(np.concatenate(held))})
    found.tables += 1


def _texts(file: File) -> Iterator[str]:
    """All texts of a file. Raises DataError when it cannot be read."""
    try:
        if file.kind.suffix not in TABLES:
            for item in read(file):
                if isinstance(item, Skipped):
                    raise Unusable(item.reason)
                yield item.text
            return
        with file.open() as stream:
            within = (file.start, file.end) if file.end else None
            parquet = file.kind.suffix == PARQUET
            for _, row in rows.parquet(stream, None, within) if parquet else rows.jsonl(stream):
                if isinstance(row, Unusable):
                    raise row
                yield from _strings(row.values())
    except Unusable as error:
        raise DataError(
            f"evaluation set {file.spec.uri}: {file.name}", got=str(error), do="mend it, or leave it out"
        ) from error


def _strings(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _strings(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _strings(value)


def _which_in(some: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool: which of `some` are in the sorted array `known`."""
    if not len(known):
        return np.zeros(len(some), dtype=bool)
    at = np.minimum(np.searchsorted(known, some), len(known) - 1)
    return np.asarray(known[at] == some)
