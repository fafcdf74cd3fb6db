"""One file in, `Document`s and counted `Skipped`s out.

Notable: reading never fails for one bad file or row; it yields a `Skipped` with a reason, and the job goes on. Memory is
bounded whatever a file holds: plain text is read in pieces, tables and archives row by row, anything else up to a limit.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.sources import archive, pysource, rows
from shoal.data.sources.files import File, Unusable, decoded, decompressed, filled, local_path, reading, whole
from shoal.data.sources.kinds import ARCHIVE, HTML, PARQUET, PLAIN, TABLES, Kind, kind_of
from shoal.data.sources.s3 import SCHEME
from shoal.data.sources.webpage import html_text
from shoal.errors import DataError
from shoal.inputs import media

MAX_FILE = 64 * 2**20  # bytes of a file that can only be one document: code, HTML
PIECE = 16 * 2**20  # bytes of plain text from which a file becomes several documents, cut between lines


def need_seen(spec: SourceSpec) -> None:
    """Raises DataError where this machine does not see a source on a disk: each of its files would be counted as one that is
    gone, and the corpus follow from which machine read what."""
    if not spec.uri.startswith(SCHEME) and not local_path(spec.uri).exists():
        raise DataError(
            f"source {spec.name}: {spec.uri} does not exist on {platform.node()}",
            do="put it where every machine sees it under this path, or into S3",
        )


def read(file: File) -> Iterator[Document | Skipped]:
    """The documents of one file, in its own order, and what had to be left out. Never raises for what the file holds; raises
    DataError where S3 does not give it."""
    try:
        with reading(f"source {file.spec.name}: {file.name}"):
            yield from _tried(file, "", _documents(file))
    except Unusable as error:
        yield file.skipped(str(error))


def _tried(file: File, row: str, found: Iterator[Document | Skipped]) -> Iterator[Document | Skipped]:
    """What is `found` in a file or in one row or member of it, and a skip where that fails: it alone is lost."""
    try:
        yield from found
    except Unusable as error:
        yield file.skipped(str(error), row)
    except (DataError, OSError, pa.ArrowException):  # the store fails, or what the whole file is packed in
        raise
    except Exception as error:  # of a parser that met what its authors did not think of
        yield file.skipped(f"reader failed: {type(error).__name__}", row)


def _documents(file: File) -> Iterator[Document | Skipped]:
    if file.fault:
        raise Unusable(file.fault)
    kind = file.kind
    if file.spec.reader == "docstrings":
        with file.open() as stream:
            yield _docstrings(file, decoded(whole(stream, MAX_FILE)))
    elif kind.image:
        with file.open() as stream:
            yield from _picture(file, stream)
    elif kind.suffix in TABLES:
        with file.open() as stream:
            if kind.suffix == PARQUET:
                within = (file.start, file.end) if file.end else None
                yield from _rows(file, rows.parquet(stream, within=within))
            else:
                yield from _rows(file, ((file.prefix + number, row) for number, row in rows.jsonl(stream)))
    elif kind.suffix == ARCHIVE:
        with file.open() as stream:
            yield from _archive(file, stream)
    else:
        with file.open() as stream:
            yield from _whole(file, kind, stream)


def _whole(file: File, kind: Kind, stream: IO[bytes], row: str = "") -> Iterator[Document | Skipped]:
    """A text or source file; `row`: its name in an archive."""
    if kind.suffix in PLAIN:
        yield from _plain(file, stream, row)
    elif kind.image:  # in an archive
        yield from _picture(file, stream, row)
    elif kind.suffix in HTML:
        yield file.document("text", row=row, text=filled(html_text(decoded(whole(stream, MAX_FILE)))))
    elif kind.code:
        yield file.document("code", row=row, text=decoded(whole(stream, MAX_FILE)))
    elif not kind.suffix and (data := stream.read(2)) == b"#!":
        yield file.document("code", row=row, text=decoded(data + whole(stream, MAX_FILE)))
    else:
        raise Unusable(f"suffix {kind.suffix or '(none)'} is not read")


def _plain(file: File, stream: IO[bytes], row: str) -> Iterator[Document | Skipped]:
    """Plain text: one document, or one for each piece of a long file."""
    number, long = 0, False
    for number, piece in enumerate(_pieces(stream), 1):
        long = bool(long or piece is None or len(piece) >= PIECE or file.prefix)
        place = "/".join(filter(None, (row, f"{file.prefix}{number}" if long else "")))
        try:
            if piece is None:
                raise Unusable(f"line longer than {PIECE >> 20} MiB")
            yield file.document("text", row=place, text=decoded(piece))
        except Unusable as error:
            yield file.skipped(str(error), place)
    if not number and not file.start:
        raise Unusable("empty")


def _pieces(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Whole lines, at least PIECE bytes of them but for the last piece; None for a line that is too long to be held."""
    while block := stream.read(PIECE):
        if len(block) < PIECE or block.endswith(b"\n"):
            yield block
            continue
        rest = stream.readline(PIECE)
        if len(rest) < PIECE:
            yield block + rest
            continue
        whole = block[: block.rfind(b"\n") + 1]
        if whole:
            yield whole
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(PIECE)
        yield None


def _docstrings(file: File, source: str) -> Document:
    page = pysource.docstring_page(source, file.name)
    if not page:
        raise Unusable("does not parse" if page is None else "no docstrings")
    return file.document("text", text=page)


def _picture(file: File, stream: IO[bytes], row: str = "") -> Iterator[Document | Skipped]:
    image = whole(stream, media.MAX_BYTES, "image is larger than")
    if not image:
        raise Unusable("empty")
    caption = ""
    try:
        caption = decoded(file.captioned(rows.MAX_ROW)).strip() if file.caption else ""
    except Unusable as error:  # the image is none the worse for it
        yield file.skipped(f"caption: {error}")
    yield file.document("image", row=row, text=caption, image=image, caption=bool(caption))


# ---- files of many documents


def _rows(file: File, found: rows.Numbered) -> Iterator[Document | Skipped]:
    seen = False
    for number, row in found:
        seen = True
        yield from _tried(file, number, _row(file, number, row))
    if not seen and not file.start:
        raise Unusable("empty")


def _row(file: File, number: str, row: rows.Fields | Unusable) -> Iterator[Document | Skipped]:
    if isinstance(row, Unusable):
        raise row
    yield from rows.documents(file, number, row)


def _archive(file: File, stream: IO[bytes]) -> Iterator[Document | Skipped]:
    """A WebDataset's samples, and the texts, sources and images of any other tar, member by member."""
    for item in archive.samples(archive.members(stream, file.spec)):
        if isinstance(item, archive.Sample):
            yield from _tried(file, item.key, _sample(file, item))
        else:
            yield from _tried(file, item.name, _member(file, item))


def _member(file: File, member: archive.Member) -> Iterator[Document | Skipped]:
    kind = kind_of(member.name)
    with reading(member.name):
        yield from _whole(file, kind, decompressed(io.BytesIO(member.read()), kind.compression), member.name)


def _sample(file: File, sample: archive.Sample) -> Iterator[Document | Skipped]:
    row = sample.fields()
    if "text" in sample.parts:
        try:
            row["text"] = decoded(sample.parts["text"].read()).strip()
        except Unusable as error:
            if "image" not in row:
                raise
            yield file.skipped(f"caption: {error}", sample.key)  # the image is none the worse for it
    yield from rows.documents(file, sample.key, row)
