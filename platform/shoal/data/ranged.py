"""Shards that stay in S3: rows are read by range, through a cache of blocks on this machine's disk that has a bound.

    local folder   index.json  tokenizer.json  ...  origin.json: where the shards are
    CACHE/blocks/CORPUS/SHARD/NUMBER   a block each, renamed when it is complete; the oldest go when there are too many bytes

Notable: of a shard itself only the metadata of its batches is read, which says where in the file each column lies; a row is
then a few ranges. Processes of one machine share the blocks and need no lock: who finds one missing fetches it. They count
together what they add, so the bound is the machine's, however many they are and however short they live.
What a whole copy is checked by, the sha256 of a file, cannot be asked of a range: the length of the object is, at each, and
what its metadata says.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.config import load
from shoal.data.sources import s3
from shoal.data.sources.s3 import S3
from shoal.errors import DataError, ResourceError, ShoalError
from shoal.machine import aside

ORIGIN = "origin.json"
BLOCK = 2**18  # bytes of one request
METADATA = 2**12  # bytes in which the metadata of a batch is, at most
CACHE_BYTES = 2**36  # of all blocks on this machine, unless SHOAL_CACHE_BYTES says otherwise
LOOKS = 16  # the cache is looked through when this share of its bound has been added
# file in a folder of the cache: a byte for each so many that all processes added since it was looked through
ADDED, UNIT = ".added", 2**12


@dataclass(frozen=True)
class Origin:
    """Where the shards of a corpus are."""

    uri: str
    endpoint: str = ""
    region: str = ""


def cache() -> Path:
    """The folder of copies."""
    return Path(os.environ.get("SHOAL_CACHE") or Path.home() / ".cache" / "shoal")


def cache_bytes() -> int:
    """How much of a corpus may lie on this machine's disk. Raises ResourceError where SHOAL_CACHE_BYTES is no such number."""
    said = os.environ.get("SHOAL_CACHE_BYTES") or str(CACHE_BYTES)
    if not said.isdecimal() or int(said) < 64 * BLOCK:
        raise ResourceError("SHOAL_CACHE_BYTES", got=said, allowed=f"bytes, {64 * BLOCK} or more")
    return int(said)


def origin_of(folder: Path) -> Origin | None:
    """Where the shards of the corpus in `folder` are, when they are not there."""
    path = folder / ORIGIN
    return load(Origin, json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_origin(folder: Path, uri: str, service: S3) -> None:
    """Say in `folder` that its shards are at `uri`."""
    here = service.resolved()
    with aside(folder / ORIGIN) as beside:
        beside.write_text(json.dumps(asdict(Origin(uri, here.endpoint, here.region))) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Column:
    """Where the bytes of a column of a batch lie in the file; where its values have different lengths, its `offsets` too, and
    the bytes of one of these."""

    start: int
    offsets: int = 0
    width: int = 0


class RangedBatch:
    """One batch of rows of a shard: what `Rows` reads of a mapped one. Letters: T row length."""

    def __init__(self, shard: RangedShard, batch: pa.RecordBatch, base: int, length: int) -> None:
        self.rows, self._shard, self._length = len(batch), shard, length
        tokens, docs, patches, groups = (batch.column(name) for name in ("tokens", "docs", "patches", "groups"))

        def at(buffer: pa.Buffer | None) -> int:
            return buffer.address - base if buffer is not None and buffer.size else 0

        self._tokens, self._docs = (Column(at(column.buffers()[-1])) for column in (tokens, docs))
        self._patches = Column(at(patches.buffers()[2]), at(patches.buffers()[1]), 8)
        self._groups = Column(at(groups.buffers()[-1]), at(groups.buffers()[1]), 4)

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens int32 [T], docs int16 [T], patches as bytes."""
        tokens, docs = (
            np.frombuffer(self._shard.read(column.start + number * size, size), dtype=kind)
            for column, kind, size in (
                (self._tokens, np.int32, 4 * self._length),
                (self._docs, np.int16, 2 * self._length),
            )
        )
        return tokens, docs, np.frombuffer(self._values(self._patches, number, 1), dtype=np.uint8)

    def groups(self, number: int) -> list[int]:
        return np.frombuffer(self._values(self._groups, number, 8), dtype=np.int64).tolist()

    def _values(self, column: Column, number: int, size: int) -> bytes:
        """The bytes of a value of a column whose values have several lengths; `size` of one item of it."""
        kind = np.int64 if column.width == 8 else np.int32
        ends = self._shard.read(column.offsets + column.width * number, 2 * column.width)
        first, last = np.frombuffer(ends, dtype=kind).tolist()
        return self._shard.read(column.start + size * first, size * (last - first)) if last > first else b""


class RangedShard:
    """A shard in S3, of `size` bytes; `folder`: of its corpus."""

    def __init__(self, origin: Origin, name: str, size: int, folder: Path) -> None:
        self._origin, self._name, self._size = origin, name, size
        self._blocks = _Blocks.of(cache() / "blocks" / folder.name)

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file. Raises DataError where they cannot be had, ResourceError where the disk is full."""
        if start < 0 or length < 0 or start + length > self._size:  # by what a broken file says of itself
            raise _other(self._origin, self._name, f"a row at {start}, of {length} bytes", self._size)
        numbers = range(start // BLOCK, -(-(start + length) // BLOCK))
        data = b"".join(self._blocks.get(self._origin, self._name, self._size, number) for number in numbers)
        first = start - numbers.start * BLOCK
        return data[first : first + length]

    def batches(self, rows: int, length: int) -> Iterator[RangedBatch]:
        """The batches, of `rows` rows together. Their metadata alone is read, into memory that stands for the file."""
        image = mmap.mmap(-1, self._size)  # nothing of it exists that is not written
        base = pa.py_buffer(image).address
        file, at, left = pa.BufferReader(pa.py_buffer(image)), len(b"ARROW1\0\0"), rows
        schema: Any = None
        while left > 0:
            if at >= self._size:
                raise pa.ArrowInvalid(f"{rows - left} rows")
            some = min(METADATA, self._size - at)
            image[at : at + some] = self.read(at, some)
            file.seek(at)
            message = pa.ipc.read_message(file)
            at = file.tell()
            if schema is None:
                schema = pa.ipc.read_schema(message)
                continue
            batch = pa.ipc.read_record_batch(message, schema)
            left -= len(batch)
            yield RangedBatch(self, batch, base, length)
        if left:
            raise pa.ArrowInvalid(f"{rows - left} rows")


class _Blocks:
    """The blocks of one corpus on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._most = folder, cache_bytes()

    @staticmethod
    @lru_cache(maxsize=4)
    def of(folder: Path) -> _Blocks:
        return _Blocks(folder)

    def get(self, origin: Origin, name: str, size: int, number: int) -> bytes:
        path = self._folder / name / str(number)
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            if len(data) == min(size, (number + 1) * BLOCK) - number * BLOCK:
                return data  # else the machine stopped before it was on the disk
        data, due = _fetch(origin, name, size, number), False
        # who looks the cache through, or empties it, may take away what is half written: it is only not kept then
        with room(self._folder), suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside(path) as beside:
                beside.write_bytes(data)
            due = is_look_due(self._folder.parent, len(data), self._most)
        if due:
            trim(self._folder.parent.glob("*/*/*"), self._most)  # of all corpora
        return data


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """A disk that is full in this block, where `folder` is, becomes a ResourceError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"disk of the cache at {folder}",
            got=f"full, of {cache_bytes()} bytes that it may take",
            do="free some, or set SHOAL_CACHE_BYTES lower, or SHOAL_CACHE to another disk",
        ) from error


def is_look_due(folder: Path, added: int, most: int) -> bool:
    """Count `added` bytes into `folder`, and say whether all processes of this machine have added so many that it is to be
    looked through, by who is told so: from then on it is counted anew."""
    counted = os.open(folder / ADDED, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(counted, bytes(-(-added // UNIT)))  # appended as a whole, whoever else does
        if os.fstat(counted).st_size * UNIT * LOOKS <= most:
            return False
        os.ftruncate(counted, 0)
        return True
    finally:
        os.close(counted)


def trim(
    paths: Iterable[Path],
    most: int,
    before: float = math.inf,
    may_go: Callable[[os.stat_result], bool] = lambda stats: True,
) -> None:
    """Remove the oldest of these files that are too many for `most` bytes, with some to spare; none that was used since
    `before`, seconds by the clock, and of the others those that `may_go`."""
    found, total = [], 0
    for path in paths:
        with suppress(FileNotFoundError):
            stats = path.stat()
            total += stats.st_size
            if may_go(stats):
                found.append((stats.st_mtime_ns, stats.st_size, path))
    over = total - most * (LOOKS - 2) // LOOKS
    for used, size, path in sorted(found):
        if over <= 0 or used >= before * 1e9:
            return
        with suppress(FileNotFoundError):
            if path.stat().st_mtime_ns == used:  # else another process has used it meanwhile
                path.unlink()
                over -= size


def _fetch(origin: Origin, name: str, size: int, number: int) -> bytes:
    """One block of a shard in S3. Raises DataError, also where the shard is not as long as its index says."""
    bucket, prefix = s3.split(origin.uri)
    key = "/".join(filter(None, (prefix.strip("/"), name)))
    start, end = number * BLOCK, min(size, (number + 1) * BLOCK)
    try:
        reply, data = s3.got(_client(origin), Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    except ShoalError:
        raise
    except Exception as error:
        if "InvalidRange" in str(error) or "NoSuchKey" in str(error):
            raise _other(origin, name, "missing, or shorter", size) from error
        raise s3.fault(origin.uri, error) from error
    total = int(reply["ContentRange"].rpartition("/")[2])
    if total != size or len(data) != end - start:
        raise _other(origin, name, f"{total} bytes", size)
    return data


def _other(origin: Origin, name: str, got: str, size: int) -> DataError:
    return DataError(
        f"{origin.uri}: shard {name}", got=got, allowed=f"{size} bytes, as its index says", do="prepare it again"
    )


@lru_cache(maxsize=4)
def _client(origin: Origin) -> Any:
    return S3(origin.endpoint, origin.region).client()
