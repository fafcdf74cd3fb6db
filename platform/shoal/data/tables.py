"""Tables of numbers that the parts of a corpus leave for what is decided over all of them: columns in one Arrow file, sorted
by a key, of which a task maps the rows whose keys lie in its span. So the keys of a corpus are shared over any number of
tasks, after they were written, and what comes out does not depend on how many.

Notable: keys are 64-bit hashes, so spans of equal width hold about as many. A task opens one part after the other and keeps a
copy of its rows, so neither its descriptors nor its memory grow with the number of parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shoal.data.place import Place, here
from shoal.errors import DataError
from shoal.machine import aside

KEYS = 2**64
SPAN_DOCUMENTS = 2**21  # documents of a span, about: what a task holds of each is some 100 bytes

Table = dict[str, np.ndarray]


@dataclass(frozen=True)
class Parts(Sequence[Path]):
    """The files of cleaned documents of a corpus, by the number of the part; its other files lie beside each. `root`: the work
    folder that they lie in, or the place in S3 of which each machine has one."""

    root: Path | Place
    total: int

    @property
    def folder(self) -> Path:
        return self.root if isinstance(self.root, Path) else self.root.work

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Path:  # type: ignore[override]
        if not 0 <= number < self.total:
            raise IndexError(number)
        return self.folder / f"{number:05}.arrow"


@dataclass(frozen=True)
class Span:
    """One of `count` ranges of equal width that all keys are divided into."""

    number: int
    count: int

    def of(self, keys: np.ndarray) -> slice:
        """Where the keys of this span stand among sorted `keys`, uint64 [D]."""
        start, end = (KEYS * number // self.count for number in (self.number, self.number + 1))
        first = int(np.searchsorted(keys, np.uint64(start)))
        return slice(first, len(keys) if end == KEYS else int(np.searchsorted(keys, np.uint64(end))))


def spans(documents: int, most: int | None = None) -> list[Span]:
    """As many as leave each at most `most` of so many documents [SPAN_DOCUMENTS], about."""
    count = max(1, -(-documents // (most or SPAN_DOCUMENTS)))
    return [Span(number, count) for number in range(count)]


def write(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A table of columns of equal length."""
    write_batch(path, pa.record_batch({n: pa.array(np.ascontiguousarray(column)) for n, column in columns.items()}))


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """The same of columns of any kind."""
    with (
        aside(path) as beside,
        pa.OSFile(str(beside), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def read(path: Path, names: Sequence[str] | None = None) -> Table:
    """The columns of a table, all or those with `names`, mapped. Raises DataError where it is not there or not whole."""
    batch = read_batch(path)
    return {name: batch.column(name).to_numpy() for name in names or batch.schema.names}


def read_batch(path: Path) -> pa.RecordBatch:
    """The same as Arrow has it."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(here(path)))).get_batch(0)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read", got=str(error)[:160], do="remove the folder and prepare again"
        ) from error


def gathered(tables: Iterable[Table], names: Sequence[str]) -> Table:
    """The columns `names` of several tables, one after the other."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for table in tables:
        for name, columns in found.items():
            columns.append(np.array(table[name]))  # a copy, so that the file is let go
    return {name: np.concatenate(columns) if columns else np.empty(0, np.uint32) for name, columns in found.items()}


def of_part(path: Path, number: int) -> Table:
    """The rows of one part out of a table that is sorted by its column ``part``."""
    table = read(path)
    ends = np.searchsorted(table["part"], np.array([number, number + 1], dtype=table["part"].dtype))
    return {name: column[ends[0] : ends[1]] for name, column in table.items()}
