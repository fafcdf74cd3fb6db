"""Packed rows on disk: all that preparing and training share.

    DIR/index.json      written last: a directory without it is not finished
    DIR/tokenizer.json  the tokenizer that made the token ids
    DIR/<split>-<modality>-<part>-<number>.arrow   Arrow IPC, memory-mapped; one row each for one training row

Columns: ``tokens`` fixed_size_list<int32>[T], ``docs`` fixed_size_list<int16>[T] (-1 padding), ``patches`` large_binary
(uint8 patches of the row's images, in order), ``groups`` list<int64> (of each document of the row, by its number in ``docs``,
which group it is of: the pieces that a long document was cut into share one, and so do documents of one file).

Letters: T row length, V numbers in a patch, n patches.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shoal.config import ModelConfig, load
from shoal.data.documents import Modality
from shoal.data.pack import Row
from shoal.data.ranged import RangedBatch, RangedShard, origin_of
from shoal.data.shard_file import RowBatch, ShardFile
from shoal.errors import ConfigError, DataError
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import write_aside

SCHEMA = 2  # of the shards and the index; raised when either changes so that old readers must refuse
SPLITS = ("train", "heldout")
SHARD_BYTES = 256 * 2**20  # of one file, about
BATCH_BYTES = 32 * 2**20  # of the rows that are written at once, which a writer holds
OPENED = 256  # shards of each split and modality that are mapped at once
MOST_BYTES = 2**46  # of a shard that an index may speak of: memory stands for its bytes where they stay in S3
STATED = 1024  # shards whose sizes are looked at when a corpus is opened; of more, each when it is first read
INDEX, TOKENIZER = "index.json", "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    split: str
    modality: Modality
    rows: int
    tokens: int  # padding not counted
    text_bytes: int  # UTF-8 bytes that the tokens stand for
    size: int  # bytes of the file
    sha256: str
    sources: dict[str, int]  # source -> tokens
    licenses: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says about a prepared corpus."""

    length: int  # T
    vocab: int
    patch: int  # pixels on a side of a patch
    image_size: int  # pixels on the longest side of an image
    tokenizer_sha256: str
    seed: int
    mix: dict[str, float]  # target shares by token
    request: dict[str, Any]  # what was asked of prepare: the same request need not be run again
    documents: dict[str, dict[str, int]]  # split -> modality -> documents
    drops: dict[str, dict[str, int]]  # operator -> reason -> documents
    shards: tuple[Shard, ...]
    schema: int = SCHEMA

    @classmethod
    def made_for(
        cls, model: ModelConfig, tokenizer: Tokenizer, mix: Mapping[str, float], shards: Iterable[Shard], *,
        seed: int = 0, request: Mapping[str, Any] = {}, documents: Mapping[str, dict[str, int]] = {},
        drops: Mapping[str, dict[str, int]] = {},
    ) -> Index:  # fmt: skip
        """What is said about `shards` of rows for `model`, in the tokens of `tokenizer`."""
        return cls(
            length=model.train_length,
            vocab=len(tokenizer),
            patch=model.patch,
            image_size=model.image_size,
            tokenizer_sha256=tokenizer.sha256,
            seed=seed,
            mix=dict(mix),
            request=dict(request),
            documents=dict(documents),
            drops=dict(drops),
            shards=tuple(shards),
        )

    @property
    def patch_values(self) -> int:
        """V."""
        return 3 * self.patch**2

    def of(self, split: str, modality: str) -> list[Shard]:
        """The shards of one split and modality, in order."""
        return [s for s in self.shards if s.split == split and s.modality == modality]

    def total(self, what: str, split: str, modality: str) -> int:
        """Sum of ``rows``, ``tokens`` or ``text_bytes`` over those shards."""
        return sum(getattr(s, what) for s in self.of(split, modality))

    def fill(self, split: str, modality: str) -> float:
        """Mean tokens of a row, padding not counted."""
        return self.total("tokens", split, modality) / max(1, self.total("rows", split, modality))

    def row_mix(self, split: str, mix: Mapping[str, float]) -> dict[str, float]:
        """Weights by row that give the shares by token of `mix`: rows that hold less are read more often."""
        return {modality: share / self.fill(split, modality) for modality, share in mix.items() if share}


def write_index(directory: Path, index: Index) -> None:
    """Complete the corpus: from now on it can be opened."""
    write_aside(directory / INDEX, json.dumps(asdict(index), indent=1, sort_keys=True) + "\n")


def open_index(directory: str | Path, *, length: int | None = None) -> Index:
    """The index of a finished corpus, whose files are there in full size (of many, the first `STATED`).

    Raises DataError when there is none, when it is of another schema, row length than `length`, or when a shard is missing
    or truncated. In one process a file is read once, while it is the same.
    """
    path = Path(directory) / INDEX
    if not path.is_file():
        raise DataError(f"{directory} holds no prepared corpus", do="run `shoal prepare --out` on it")
    index = read_index(path)
    if length is not None and index.length != length:
        raise DataError(
            f"{path}: row length", got=index.length, allowed=length, do="prepare it with the preset that you train"
        )
    for shard in index.shards[:STATED] if origin_of(path.parent) is None else ():
        need_size(path.parent / shard.file, shard)
    return index


def read_index(path: Path) -> Index:
    """The index in a file; its shards are not looked at. Raises DataError where it is none, of another schema, or names files
    outside its folder."""
    try:
        stats = path.stat()
    except OSError as error:
        raise DataError(f"{path} is not an index of ours", got=str(error)[:160], do="prepare again") from error
    return _read_index(path, stats.st_ino, stats.st_mtime_ns, stats.st_size)


@lru_cache(maxsize=4)
def _read_index(path: Path, *stamp: int) -> Index:
    """`read_index` of the file that has this `stamp`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        schema = values.get("schema")
        if schema != SCHEMA:
            raise DataError(f"{path}: schema", got=schema, allowed=SCHEMA, do="remove the folder and prepare again")
        index = load(Index, values)
    except (OSError, ValueError, AttributeError, RecursionError, ConfigError) as error:
        raise DataError(f"{path} is not an index of ours", got=str(error)[:160], do="prepare again") from error
    for shard in index.shards:
        if shard.file != Path(shard.file).name or shard.file.startswith("."):
            raise DataError(
                f"{path}: shard", got=shard.file, allowed="names of files in its folder", do="prepare again"
            )
        if shard.rows < 1 or not 0 < shard.size < MOST_BYTES:
            got, allowed = f"{shard.rows} rows, {shard.size} bytes", f"rows, and bytes up to {MOST_BYTES}"
            raise DataError(f"{path}: shard {shard.file}", got=got, allowed=allowed, do="prepare again")
    return index


def clear(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove what earlier runs left, but the shards in `keep`: our own files only, and only while there is no index."""
    if (directory / INDEX).exists():
        raise DataError(f"{directory} holds a finished corpus", do="give another --out, or remove it yourself")
    for split in SPLITS:
        for pattern in (f"{split}-*.arrow", f".{split}-*.tmp", ".*.json.*.tmp", ".*.jsonl.*.tmp"):
            for leftover in directory.glob(pattern):
                if leftover.name not in keep:
                    leftover.unlink()


@dataclass
class ShardWriter:
    """Rows of one split and modality into files of about `shard_bytes`; each is there in full or not at all."""

    directory: Path
    split: str
    modality: Modality
    token_bytes: np.ndarray  # int64 [vocab]: bytes a token stands for
    licenses: Mapping[str, str]  # source -> licences, as text
    part: int = 0  # of the corpus: parts are written by different processes
    shard_bytes: int = SHARD_BYTES
    shards: list[Shard] = field(default_factory=list)
    _held: RowBatch | None = None
    _open: ShardFile | None = None

    def add(self, row: Row) -> None:
        if self._held is None:
            self._held = RowBatch.of(row, min(BATCH_BYTES, self.shard_bytes))
        self._held.add(row, self.token_bytes)
        if self._held.size >= min(BATCH_BYTES, self.shard_bytes):
            self._write()
        if self._open is not None and self._open.size >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write out what is held."""
        self._write()
        shard, self._open = self._open, None
        if shard is None:
            return
        digest = shard.finish()
        self.shards.append(
            Shard(
                file=shard.path.name,
                split=self.split,
                modality=self.modality,
                rows=shard.rows,
                tokens=shard.sources.total(),
                text_bytes=shard.text_bytes,
                size=shard.path.stat().st_size,
                sha256=digest,
                sources=dict(sorted(shard.sources.items())),
                licenses=tuple(sorted({self.licenses[source] for source in shard.sources})),
            )
        )

    def _write(self) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        if self._open is None:
            name = f"{self.split}-{self.modality}-{self.part:05}-{len(self.shards):03}.arrow"
            self._open = ShardFile(self.directory / name)
        self._open.add(held)


class Rows:
    """The rows of some shards as one sequence, memory-mapped: opening is instant and reading touches only what is asked. The
    shards that were used last stay open, `OPENED` of them; of a corpus that is too large for this machine they stay in S3."""

    def __init__(self, directory: str | Path, index: Index, split: str, modality: str) -> None:
        self._directory, self._index = Path(directory), index
        self._origin = origin_of(self._directory)
        self._shards = index.of(split, modality)
        self._ends = np.cumsum([shard.rows for shard in self._shards])
        self._batches = lru_cache(OPENED)(self._opened)

    @property
    def remote(self) -> bool:
        """Whether the shards stay in S3, so that reading a row may take an answer of the service."""
        return self._origin is not None

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens int32 [T], docs int16 [T], patches uint8 [n, V]; views of the file, where that is here."""
        batch, inside = self._at(row)
        tokens, docs, patches = batch.row(inside)
        return tokens, docs, patches.reshape(-1, self._index.patch_values)

    def groups(self, row: int) -> list[int]:
        """Which group each document of a row is of, by its number in the row's docs."""
        batch, inside = self._at(row)
        return batch.groups(inside)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return (self[row] for row in range(len(self)))

    def _at(self, row: int) -> tuple[_Mapped | RangedBatch, int]:
        """The batch that holds a row, and the row's place in it."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        at = int(np.searchsorted(self._ends, row, side="right"))
        inside = row - (int(self._ends[at - 1]) if at else 0)
        for batch in self._batches(at):
            if inside < batch.rows:
                return batch, inside
            inside -= batch.rows
        raise AssertionError("a shard has as many rows as its index says, which is looked at when it is opened")

    def _opened(self, at: int) -> Sequence[_Mapped | RangedBatch]:
        """The batches of a shard."""
        shard, path = self._shards[at], self._directory / self._shards[at].file
        try:
            if self._origin is not None:
                there = RangedShard(self._origin, shard.file, shard.size, self._directory)
                return list(there.batches(shard.rows, self._index.length))
            need_size(path, shard)
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
            # What a row has of the file the file says: where that lies beyond its end, the process would be killed.
            for batch in batches:
                batch.validate(full=True)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise DataError(f"shard {path} cannot be read", got=str(error)[:160], do="prepare again") from error
        rows = sum(map(len, batches))
        if rows != shard.rows:
            raise DataError(f"shard {path}: rows", got=rows, allowed=shard.rows, do="prepare again")
        return [_Mapped(batch, self._index.length, path) for batch in batches]


class _Mapped:
    """One batch of rows of a shard that is here."""

    def __init__(self, batch: pa.RecordBatch, length: int, path: Path) -> None:
        self.rows = len(batch)
        tokens, docs = (batch.column(name).flatten().to_numpy() for name in ("tokens", "docs"))
        shape = (self.rows, length)
        if tokens.size != docs.size or tokens.size != self.rows * length:
            raise DataError(f"shard {path}: tokens", got=tokens.size, allowed=shape, do="prepare again")
        self._tokens, self._docs = tokens.reshape(shape), docs.reshape(shape)
        self._patches, self._groups = batch.column("patches"), batch.column("groups")

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens int32 [T], docs int16 [T], patches as bytes."""
        patches = np.frombuffer(self._patches[number].as_buffer(), dtype=np.uint8)
        return self._tokens[number], self._docs[number], patches

    def groups(self, number: int) -> list[int]:
        return self._groups[number].as_py()


def need_size(path: Path, shard: Shard) -> None:
    """Raises DataError where a shard is not there in full size."""
    size = path.stat().st_size if path.is_file() else None
    if size != shard.size:
        raise DataError(
            f"shard {path}", got=f"{size} bytes", allowed=shard.size, do="remove the folder and prepare again"
        )


def group_number(group: str) -> int:
    """What stands for a group in the shards: a hash of its name, so that it is the same in every part and every corpus."""
    return xxhash.xxh3_64_intdigest(group.encode()) >> 1  # int64 has no room for the last bit


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [vocab]: how many UTF-8 bytes each token stands for; 0 for control tokens."""
    return np.array([len(tokenizer.token_bytes(token)) for token in range(len(tokenizer))], dtype=np.int64)
