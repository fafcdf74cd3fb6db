"""A shard while it is written: batches of rows, one after the other, into a file beside its name until it is finished."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.data.pack import Row
from shoal.machine import aside, sha256_of


class ShardFile:
    """A shard that is being written, a batch of rows after the other; beside its name until it is finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.text_bytes, self.size = path, 0, 0, 0
        self.sources: Counter[str] = Counter()
        self._files = ExitStack()
        self._beside = self._files.enter_context(aside(path))
        self._sink = pa.OSFile(str(self._beside), "wb")
        self._writer: Any = None

    def add(self, held: RowBatch) -> None:
        batch = held.record_batch()
        self._writer = self._writer or pa.ipc.new_file(self._sink, batch.schema)
        self._writer.write_batch(batch)
        self.rows += len(held.patches)
        self.text_bytes += held.text_bytes
        self.sources.update(held.sources)
        self.size += held.size

    def finish(self) -> str:
        """Give it its name; its sha256."""
        self._writer.close()
        self._sink.close()
        digest = sha256_of(self._beside)
        self._files.close()
        return digest


@dataclass
class RowBatch:
    """The rows of a batch that is not written yet. They are copied into two blocks: kept one by one, their small arrays lay
    between what encoding allocates for a moment, and the heap grew from part to part."""

    tokens: np.ndarray  # int32 [rows that there is room for, T]
    docs: np.ndarray  # int16, likewise
    patches: list[bytes] = field(default_factory=list)  # of each row
    groups: list[list[int]] = field(default_factory=list)  # of each row
    sources: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    size: int = 0  # bytes

    @classmethod
    def of(cls, row: Row, size: int) -> RowBatch:
        """Room for as many rows like `row` as a batch of `size` bytes may get."""
        room = size // (row.tokens.nbytes + row.docs.nbytes) + 1
        return cls(np.empty((room, len(row.tokens)), np.int32), np.empty((room, len(row.docs)), np.int16))

    def add(self, row: Row, token_bytes: np.ndarray) -> None:
        at = len(self.patches)
        self.tokens[at], self.docs[at] = row.tokens, row.docs
        self.patches.append(row.patches.tobytes() if row.patches is not None else b"")
        self.groups.append(row.groups)
        self.sources.update(row.sources)
        self.text_bytes += int(token_bytes[row.tokens].sum())
        self.size += row.tokens.nbytes + row.docs.nbytes + len(self.patches[-1])

    def record_batch(self) -> pa.RecordBatch:
        rows, length = len(self.patches), self.tokens.shape[1]
        columns = {"tokens": self.tokens, "docs": self.docs}
        return pa.record_batch(
            {
                **{
                    name: pa.FixedSizeListArray.from_arrays(pa.array(block[:rows].reshape(-1)), length)
                    for name, block in columns.items()
                },
                "patches": pa.array(self.patches, pa.large_binary()),
                "groups": pa.array(self.groups, pa.list_(pa.int64())),
            }
        )
