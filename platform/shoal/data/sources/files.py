"""The files of a source, on this machine or in S3, and their bytes: decompressed as they are read, and never more than asked.

Notable: what a file cannot give is `Unusable`, whose text is the reason that is counted; what a source cannot give is a
DataError, before any work is done. Sizes come with the listing, so that S3 is asked once for a thousand files.
"""

# long: files of a disk and of S3 are listed, opened, decompressed and refused alike, in one place

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, cast

import pyarrow as pa
import pyarrow.fs as pafs

from shoal.data.documents import Document, Modality, Skipped, SourceSpec
from shoal.data.sources import s3
from shoal.data.sources.kinds import PARQUET, PLAIN, TABLES, Kind, kind_of
from shoal.data.sources.s3 import S3
from shoal.errors import DataError

CUT_BYTES = 2**28  # of a piece; larger files of lines or row groups are cut
CODECS = {".gz": "gzip", ".zst": "zstd"}
LINKED = "folder behind a symbolic link"
# bytes read, or decompressed, at once: of a compressed file that is cut off, as much before the cut is lost
BUFFER = 2**17


class Unusable(Exception):
    """A file or row that cannot be used; its text is the reason that is counted."""


class Entry(NamedTuple):
    """One file of a listing."""

    path: str  # the store's own
    name: str  # the path inside the source
    size: int  # bytes, as stored
    changed: int  # when, in nanoseconds
    fault: str = ""  # why it cannot be read, where the listing says so
    left_out: bool = False  # not by a fault, but by its name or its place

    @property
    def stamp(self) -> str:
        return f"{self.size}:{self.changed}"


class Store(Protocol):
    """Where files lie. Paths are the store's own, as strings."""

    def entries(self, spec: SourceSpec) -> list[Entry]: ...
    def open(self, path: str) -> IO[bytes]: ...
    def beside(self, root: str, path: str, name: str) -> str: ...  # the file `name` beside `path`, inside `root`
    def stamp(self, path: str) -> str: ...  # of its size and date; empty where there is no file


@dataclass(frozen=True)
class File:
    """One file to read. Its `name` is the path inside the source, printable whatever bytes the file system holds."""

    path: str
    name: str
    size: int  # bytes, as stored
    stamp: str  # of its size and date, and its caption's: it is another file when this is another
    spec: SourceSpec
    store: Store
    caption: str | None = None  # of an image: the path of the .txt beside it
    fault: str = ""  # why it cannot be read, where the listing says so
    # of a large file that is cut: the bytes in which the lines, or the row groups, of this piece begin; else 0 and 0
    start: int = 0
    end: int = 0
    # the other files that its rows name, with their stamps
    named: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def kind(self) -> Kind:
        return kind_of(self.path)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file's bytes, decompressed. Raises Unusable when they cannot be had, also while they are read."""
        with (
            reading(f"source {self.spec.name}: {self.name}"),
            self.store.open(self.path) as raw,
            decompressed(raw, self.kind.compression) as stream,
        ):
            yield stream if not self.end or self.kind.suffix == PARQUET else lines_between(stream, self.start, self.end)

    @property
    def prefix(self) -> str:
        """What stands before the number of a line or of a piece of text: of a file that is cut, where this piece starts."""
        return f"{self.start}/" if self.end else ""

    def beside(self, name: str, most: int, fault: str) -> bytes:
        """All bytes of another file of the source, named from this one's folder; `fault`: what is said of one that has more
        than `most`. Raises Unusable."""
        with reading(f"source {self.spec.name}: {name}"):
            path = self.store.beside(self.spec.uri, self.path, name)
            self.named[path] = self.store.stamp(path)
            if not self.named[path]:
                raise Unusable("image file is missing")
            with self.store.open(path) as stream:
                return whole(stream, most, fault)

    def captioned(self, most: int) -> bytes:
        """All bytes of the caption. Raises Unusable."""
        with (
            reading(f"source {self.spec.name}: caption of {self.name}"),
            self.store.open(self.caption or "") as stream,
        ):
            return whole(stream, most)

    def document(
        self, modality: Modality, *, row: str = "", license: str = "", group: str = "", **fields: Any
    ) -> Document:
        """A document of this file; `row` sets the rows of one file apart. Raises Unusable for text that UTF-8 cannot hold: JSON
        and Python may escape half of a pair."""
        where = f"{self.name}#{row}" if row else self.name
        made = Document(
            id=f"{self.spec.name}/{where}",
            group=f"{self.spec.family or self.spec.name}/{group or where}",
            source=self.spec.name,
            license=license or self.spec.license,
            modality=modality,
            origin=where,
            **fields,
        )
        try:
            for value in (made.text, made.license, made.group, *chain.from_iterable(made.questions)):
                value.encode()
        except UnicodeEncodeError as error:
            raise Unusable("not UTF-8") from error
        return made

    def skipped(self, reason: str, row: str = "", operator: str = "read") -> Skipped:
        return Skipped(f"{self.name}#{row}" if row else self.name, self.spec.name, reason, operator)


def list_files(spec: SourceSpec, s3: S3 | None = None, left_out: list[File] | None = None) -> list[File]:
    """The files of a source, sorted by path. Folders reached through a symbolic link are not entered, hidden ones neither:
    such a folder, and a file that is left out by its name, is put into `left_out`, with the reason as its fault.

    Raises DataError when the source is missing, holds no file, or is neither local nor in S3.
    """
    store = store_of(spec, s3 or S3())
    found = store.entries(spec)
    if spec.reader == "docstrings":
        found = [
            entry
            if entry.fault or kind_of(entry.path).suffix == ".py"
            else entry._replace(fault="no Python, of which docstrings are read", left_out=True)
            for entry in found
        ]
    if left_out is not None:
        left_out += [_file(entry, None, spec, store) for entry in found if entry.left_out]
    found = [entry for entry in found if not entry.left_out]
    beside = {entry.path: os.path.splitext(entry.path)[0] + ".txt" for entry in found if kind_of(entry.path).image}
    texts = {entry.path: entry for entry in found if entry.path in set(beside.values())}
    captions = {path: texts[text] for path, text in beside.items() if text in texts}
    own = sorted((entry for entry in found if entry.path not in texts), key=lambda entry: entry.name.split("/"))
    if not own:
        raise DataError(f"source {spec.name}: {spec.uri} holds no file", do="point it at a folder with documents")
    return [_file(entry, captions.get(entry.path), spec, store) for entry in own]


def cut(file: File) -> list[File]:
    """A large file in pieces, which are read by themselves, where lines or row groups are what it is made of; else the file."""
    count = -(-file.size // CUT_BYTES)
    kind = file.kind
    whole = count < 2 or file.fault or kind.compression or file.spec.reader != "files"
    if whole or kind.suffix not in PLAIN | TABLES:
        return [file]
    ends = [file.size * number // count for number in range(count + 1)]
    return [replace(file, size=end - start, start=start, end=end, named={}) for start, end in pairwise(ends)]


def lines_between(stream: IO[bytes], start: int, end: int) -> IO[bytes]:
    """The lines that begin at `start` or after it, and before `end`."""
    first, last = (_line_at(stream, at) for at in (start, end))
    stream.seek(first)
    return io.BufferedReader(cast(Any, _Window(stream, last - first)), BUFFER)


def _line_at(stream: IO[bytes], at: int) -> int:
    """Where the first line begins that begins at `at` or after it; the end of the stream where none does."""
    if not at:
        return 0
    stream.seek(at - 1)
    while (some := stream.readline(BUFFER)) and not some.endswith(b"\n"):
        pass
    return stream.tell()


class _Window(io.RawIOBase):
    """The next `left` bytes of a stream."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self._stream, self._left = stream, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _file(entry: Entry, caption: Entry | None, spec: SourceSpec, store: Store) -> File:
    stamp = " ".join(of.stamp for of in (entry, caption) if of)
    beside = caption and caption.path
    return File(entry.path, printable(entry.name), entry.size, stamp, spec, store, beside, entry.fault)


def store_of(spec: SourceSpec, s3_: S3) -> Store:
    """Where a source lies. Raises DataError for a scheme that is not read."""
    if spec.uri.startswith(s3.SCHEME):
        return S3Store(s3_.resolved())
    if "://" in spec.uri:
        raise DataError(f"source {spec.name}", got=spec.uri, allowed="a local folder or file, or s3://BUCKET/PREFIX")
    return Local()


@dataclass(frozen=True)
class Local:
    """The file system of this machine. Names need not be UTF-8."""

    def entries(self, spec: SourceSpec) -> list[Entry]:
        start = local_path(spec.uri)
        if start.is_file():
            return [_entry(str(start), start.name)]
        if not start.is_dir():
            raise DataError(f"source {spec.name}: {spec.uri} does not exist", do="give an existing folder or file")
        found: list[Entry] = []

        def unread(error: OSError) -> None:
            fault = f"folder cannot be read: {error.strerror}"
            found.append(Entry(error.filename, os.path.relpath(error.filename, start), 0, 0, fault))

        for folder, names, files in os.walk(start, onerror=unread):
            for name in [*names, *files]:
                path = os.path.join(folder, name)
                reason = left_out(name, spec) or (LINKED if name in names and os.path.islink(path) else "")
                if reason or name in files:
                    entry = _entry(path, os.path.relpath(path, start))
                    found.append(entry._replace(fault=reason, left_out=bool(reason)))
            names[:] = [name for name in names if not left_out(name, spec)]
        return found

    def open(self, path: str) -> IO[bytes]:
        with reading(path):
            if not stat.S_ISREG(os.stat(path).st_mode):  # a socket, a device; a pipe would wait for ever
                raise Unusable("not a regular file")
            return open(path, "rb", buffering=BUFFER)

    def beside(self, root: str, path: str, name: str) -> str:
        start = local_path(root)
        try:
            start = (start if start.is_dir() else start.parent).resolve()
            found = (Path(path).parent / name).resolve()
        except (ValueError, RuntimeError) as error:  # a NUL, half of a pair, or a loop of links
            raise Unusable("image path leads nowhere") from error
        if not found.is_relative_to(start):
            raise Unusable("image path leads out of the source")
        return str(found)

    def stamp(self, path: str) -> str:
        return _entry(path, "").stamp if os.path.isfile(path) else ""


@dataclass(frozen=True)
class S3Store:
    """The objects of a service. Paths are ``bucket/key``."""

    service: S3

    def entries(self, spec: SourceSpec) -> list[Entry]:
        bucket, key = s3.split(spec.uri)
        start = f"{bucket}/{key}".rstrip("/")
        try:
            system = self.service.filesystem()
            (info,) = system.get_file_info([start])
            if info.type == pafs.FileType.File:
                return [_s3_entry(info, posixpath.basename(start))]
            everything = system.get_file_info(pafs.FileSelector(start, recursive=True))
        except FileNotFoundError as error:
            raise DataError(f"source {spec.name}: {spec.uri} does not exist", do="check bucket and prefix") from error
        except OSError as error:
            raise s3.fault(f"source {spec.name}: {spec.uri}", error) from error
        files = [info for info in everything if info.type == pafs.FileType.File]
        found = []
        for entry in (_s3_entry(info, info.path[len(start) + 1 :]) for info in files):
            reason = next(filter(None, (left_out(part, spec) for part in PurePosixPath(entry.name).parts)), "")
            found.append(entry._replace(fault=reason, left_out=bool(reason)))
        return found

    def open(self, path: str) -> IO[bytes]:
        with reading(s3.SCHEME + path):
            return io.BufferedReader(cast(Any, self.service.filesystem().open_input_file(path)), 2**20)

    def beside(self, root: str, path: str, name: str) -> str:
        bucket, key = s3.split(root)
        start = f"{bucket}/{key}".rstrip("/")
        start = posixpath.dirname(start) if start == path else start
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if not found.startswith(start + "/"):
            raise Unusable("image path leads out of the source")
        return found

    def stamp(self, path: str) -> str:
        (info,) = self.service.filesystem().get_file_info([path])
        return _s3_entry(info, "").stamp if info.type == pafs.FileType.File else ""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Faults of file systems and of compressed data become Unusable, but for S3's: the file is good, and to leave it out would
    lose it, so they are a DataError that ends the run (which goes on where it was)."""
    try:
        yield
    except FileNotFoundError as error:  # a dangling link, or removed since it was listed
        raise Unusable("not a regular file") from error
    except (OSError, pa.ArrowException) as error:
        if s3.is_fault(error):
            raise s3.fault(where, error) from error
        raise Unusable(_reason(error)) from error


def whole(stream: IO[bytes], most: int, fault: str = "larger than") -> bytes:
    """All that is left of a stream. Raises Unusable where that is more than `most` bytes, which are never held."""
    data = stream.read(most + 1)
    if len(data) > most:
        raise Unusable(f"{fault} {most >> 20} MiB")
    return data


def decoded(data: bytes) -> str:
    """The text that a file holds. Raises Unusable where it is none."""
    if b"\0" in data:
        raise Unusable("binary")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error
    return filled(text)


def filled(text: str) -> str:
    """The text. Raises Unusable where there is nothing but white space."""
    if not text.strip():
        raise Unusable("empty")
    return text


def decompressed(raw: IO[bytes], compression: str) -> IO[bytes]:
    """`raw` as it was before it was compressed; read as a stream, so that its size does not matter."""
    if not compression:
        return raw
    return io.BufferedReader(cast(Any, pa.CompressedInputStream(raw, CODECS[compression])), BUFFER)


def local_path(uri: str) -> Path:
    """``~`` is the user's folder, where there is such a user."""
    return Path(os.path.expanduser(uri))


def left_out(name: str, spec: SourceSpec) -> str:
    """Why a file or folder of this name is not looked at; empty where it is."""
    if name.startswith("."):
        return "name begins with a dot"
    return "excluded by its source" if any(fnmatchcase(name, pattern) for pattern in spec.exclude) else ""


def printable(name: str) -> str:
    """The name on one line, with what cannot be shown escaped; different names stay different."""
    if name.isprintable():
        return name
    try:
        plain = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, which no file system gives
        plain = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def _entry(path: str, name: str) -> Entry:
    try:
        stats = os.stat(path)
        return Entry(path, name, stats.st_size, stats.st_mtime_ns)
    except OSError:  # a dangling link, or a loop of them: counted when it is read
        return Entry(path, name, 0, 0)


def _s3_entry(info: pafs.FileInfo, name: str) -> Entry:
    return Entry(info.path, name, info.size or 0, info.mtime_ns or 0)


def _reason(error: Exception) -> str:
    text = str(error)
    if "Truncated compressed" in text:
        return "compressed data is cut off"
    if any(word in text for word in ("inflate", "ZSTD", "zlib")):
        return "broken compressed data"
    return f"cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}"
