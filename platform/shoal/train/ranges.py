"""What a rank needs of a checkpoint in S3, and no more: the headers of all shards, and of the tensors the bytes that it holds.

Files as long as the shards are made on this machine, of which nothing exists but what was fetched (they are sparse);
torch.distributed.checkpoint reads them as any others.

Notable: of a part of a file no sha256 can be asked. Each request names the tag that the manifest has of the object (If-Match),
so what comes is what the rank that wrote it put, or nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from shoal.data.place import Bucket

HEAD = 2**18  # bytes of a shard that are fetched for its header; where that is longer, the rest of it too
APART = 2**20  # bytes between two ranges up to which one request is less than two
MOST = 2**24  # bytes of one request
AT_ONCE = 8  # requests

Span = tuple[int, int]  # first byte, and the one after the last


class RangedReader(HuggingFaceStorageReader):
    """Reads the checkpoint at `prefix` of `bucket` by way of `folder`, which is this rank's alone."""

    def __init__(self, bucket: Bucket, prefix: str, files: dict[str, dict[str, Any]], folder: Path) -> None:
        """`files`: what the manifest says of each shard, by name."""
        super().__init__(path=str(folder))
        self._bucket, self._prefix, self._files, self._folder = bucket, prefix, files, folder
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}  # where the tensors begin, and what is where after it

    def read_metadata(self) -> Metadata:
        """Also brings the headers. Raises DataError."""
        if not self._headers:
            self._folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                self._headers = dict(zip(self._files, pool.map(self._header, self._files), strict=True))
        return super().read_metadata()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Brings what `plan` reads, and reads it. Raises DataError."""
        wanted: dict[str, list[Span]] = {}
        for item in plan.items:
            told = self.storage_data[item.storage_index]
            name = Path(told.relative_path).name
            begin, header = self._headers[name]
            values = header[item.storage_index.fqn]
            start, end = values["data_offsets"]
            if values["shape"]:
                row = (end - start) // max(1, values["shape"][0])
                first = start + row * item.storage_offsets[0]
                start, end = first, first + row * item.lengths[0]
            wanted.setdefault(name, []).append((begin + start, begin + end))
        parts = [(name, part) for name, spans in wanted.items() for part in cut(together(spans))]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda part: self._bring(*part), parts):
                pass
        return super().read_data(plan, planner)

    def _header(self, name: str) -> tuple[int, dict[str, Any]]:
        size = int(self._files[name]["bytes"])
        with (self._folder / name).open("wb") as file:
            file.truncate(size)
        first = self._bring(name, (0, min(size, HEAD)))
        begin = 8 + int.from_bytes(first[:8], "little")
        if begin > len(first):
            first += self._bring(name, (len(first), begin))
        header: dict[str, Any] = json.loads(first[8:begin])
        return begin, header

    def _bring(self, name: str, span: Span) -> bytes:
        data = self._bucket.part(f"{self._prefix}{name}", *span, tag=str(self._files[name]["tag"]))
        with (self._folder / name).open("r+b") as file:
            file.seek(span[0])
            file.write(data)
        return data


def together(spans: Iterable[Span]) -> Iterator[Span]:
    """`spans` in their order, those that are not far `APART` as one."""
    held: Span | None = None
    for first, end in sorted(spans):
        if held is not None and first - held[1] <= APART:
            held = held[0], max(held[1], end)
            continue
        if held is not None:
            yield held
        held = first, end
    if held is not None:
        yield held


def cut(spans: Iterable[Span]) -> Iterator[Span]:
    """`spans` in pieces of at most `MOST` bytes."""
    for first, end in spans:
        for number in range(math.ceil((end - first) / MOST)):
            yield first + number * MOST, min(end, first + (number + 1) * MOST)
