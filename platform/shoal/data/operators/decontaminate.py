"""Training documents that hold what a model will be evaluated on, found by runs of 13 words that both have.

    a part of the sets   texts -> runs of words as hashes, in tables (`collect`)
    a span of hashes     its share of all these tables -> one table, each hash once (`merge`)

Notable: every string of an evaluation set counts, whatever its field is called, so the benchmarks' own files can be named.
However much the sets hold, a task holds `HELD` runs or a span; who reads a corpus maps the tables, which the processes of a
machine share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shoal.data import tables
from shoal.data.documents import Document, Skipped
from shoal.data.operators.grams import grams, words
from shoal.data.sources import rows
from shoal.data.sources.files import File, Unusable
from shoal.data.sources.kinds import PARQUET, TABLES
from shoal.data.sources.read import read
from shoal.data.tables import Span
from shoal.errors import DataError

GRAM = 13  # words; what GPT-3 and most after it took
LEAST = 8  # words of an item shorter than that: it counts as a whole; still shorter ones are said by chance
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

    def __call__(self, document: Document) -> Document | Skipped:
        found = words(document.text)
        for n in self._lengths:
            if self._any_known(grams(found, n)):
                reason = f"shares {GRAM} words with an evaluation set" if n == GRAM else "holds an evaluation item"
                return Skipped(document.origin, document.source, reason, operator="decontamination")
        return document

    def _any_known(self, some: np.ndarray) -> bool:
        of = np.searchsorted(self._starts, some, side="right") - 1
        return any(_any_in(some[of == number], self._keys[number]) for number in np.unique(of).tolist())


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


def _any_in(some: np.ndarray, known: np.ndarray) -> bool:
    """Whether one of `some` is in the sorted array `known`."""
    if not len(some) or not len(known):
        return False
    at = np.minimum(np.searchsorted(known, some), len(known) - 1)
    return bool((known[at] == some).any())
