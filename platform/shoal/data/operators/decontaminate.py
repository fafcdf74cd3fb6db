"""Training documents that hold what a model will be evaluated on, found by runs of 13 words that both have.

Notable: every string of an evaluation set counts, whatever its field is called, so the benchmarks' own files can be named.
The texts are read once; each process loads the hashes of their runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shoal.data.documents import Document, Skipped
from shoal.data.operators.grams import grams, words
from shoal.data.place import here
from shoal.data.sources import rows
from shoal.data.sources.files import File, Unusable
from shoal.data.sources.kinds import TABLES
from shoal.data.sources.read import read
from shoal.errors import DataError

GRAM = 13  # words; what GPT-3 and most after it took
LEAST = 8  # words of an item shorter than that: it counts as a whole; still shorter ones are said by chance


class Decontaminate:
    """The operator. `path`: what `collect` wrote."""

    def __init__(self, path: Path) -> None:
        with np.load(here(path)) as stored:
            self._known = {int(n): stored[n] for n in stored.files}

    def __call__(self, document: Document) -> Document | Skipped:
        found = words(document.text)
        for n, known in self._known.items():
            if _any_in(grams(found, n), known):
                reason = f"shares {GRAM} words with an evaluation set" if n == GRAM else "holds an evaluation item"
                return Skipped(document.origin, document.source, reason, operator="decontamination")
        return document


def collect(files: Sequence[File], path: Path) -> None:
    """Write the runs of words of evaluation files. Raises DataError when there is none: nothing would be looked for."""
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for text in (text for file in files for text in _texts(file)):
        of = words(text)
        if len(of) >= LEAST:
            n = min(GRAM, len(of))
            found[n].append(grams(of, n))
    if not found:
        raise DataError(
            f"evaluation sets {', '.join(sorted({file.spec.uri for file in files}))}",
            got="no text", allowed=f"files with texts of {LEAST} words or more",
        )  # fmt: skip
    with path.open("wb") as out:
        np.savez(out, **{str(n): np.unique(np.concatenate(some)) for n, some in sorted(found.items())})  # type: ignore[arg-type]


def _texts(file: File) -> Iterator[str]:
    """All texts of a file. Raises DataError when it cannot be read: what is not known cannot be looked for."""
    try:
        if file.kind.suffix not in TABLES:
            for item in read(file):
                if isinstance(item, Skipped):
                    raise Unusable(item.reason)
                yield item.text
            return
        with file.open() as stream:
            found = rows.parquet(stream, None) if file.kind.suffix == ".parquet" else rows.jsonl(stream)
            for _, row in found:
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
    if not len(some):
        return False
    at = np.minimum(np.searchsorted(known, some), len(known) - 1)
    return bool((known[at] == some).any())
