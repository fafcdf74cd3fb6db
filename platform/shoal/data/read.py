"""One file in, `Document`s and counted `Skipped`s out.

Notable: reading never fails for one bad file or row; it yields a `Skipped` with a reason, and the job goes on. Memory is
bounded whatever a file holds: plain text is read in pieces, tables and archives row by row, anything else up to a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from shoal.data import pysource, rows
from shoal.data.documents import Document, Skipped
from shoal.data.files import File, Unusable, reading
from shoal.data.kinds import ARCHIVE, HTML, IMAGES, PLAIN, TABLES, Kind, kind_of
from shoal.data.webpage import html_text
from shoal.errors import DataError
from shoal.inputs import media

MAX_FILE = 64 * 2**20  # bytes of a file that can only be one document: code, HTML
PIECE = 16 * 2**20  # bytes of plain text from which a file becomes several documents, cut between lines


def read(file: File) -> Iterator[Document | Skipped]:
    """The documents of one file, in its own order, and what had to be left out. Never raises for what the file holds; raises
    DataError where S3 does not give it."""
    try:
        with reading(f"source {file.spec.name}: {file.name}"):
            yield from _documents(file)
    except Unusable as error:
        yield file.skipped(str(error))
    except DataError:  # the store fails, not the file
        raise
    except Exception as error:  # of a parser that met what its authors did not think of: one file, not the job
        yield file.skipped(f"reader failed: {type(error).__name__}")


def _documents(file: File) -> Iterator[Document | Skipped]:
    kind = file.kind
    if file.spec.reader == "docstrings":
        with file.open() as stream:
            yield _docstrings(file, _text(_all(stream, MAX_FILE)))
    elif kind.suffix in IMAGES:
        yield from _picture(file)
    elif kind.suffix in TABLES:
        with file.open() as stream:
            yield from _rows(file, rows.jsonl(stream) if kind.suffix != ".parquet" else rows.parquet(stream))
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
    elif kind.suffix in HTML:
        yield file.document("text", row=row, text=_filled(html_text(_text(_all(stream, MAX_FILE)))))
    elif kind.code:
        yield file.document("code", row=row, text=_text(_all(stream, MAX_FILE)))
    elif not kind.suffix and (data := stream.read(2)) == b"#!":
        yield file.document("code", row=row, text=_text(data + _all(stream, MAX_FILE)))
    else:
        raise Unusable(f"suffix {kind.suffix or '(none)'} is not read")


def _plain(file: File, stream: IO[bytes], row: str) -> Iterator[Document | Skipped]:
    """Plain text: one document, or one for each piece of a long file."""
    number, long = 0, False
    for number, piece in enumerate(_pieces(stream), 1):
        long = long or piece is None or len(piece) >= PIECE
        place = "/".join(filter(None, (row, str(number) if long else "")))
        try:
            if piece is None:
                raise Unusable(f"line longer than {PIECE >> 20} MiB")
            yield file.document("text", row=place, text=_text(piece))
        except Unusable as error:
            yield file.skipped(str(error), place)
    if not number:
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


def _picture(file: File) -> Iterator[Document | Skipped]:
    with file.open() as stream:
        image = _all(stream, media.MAX_BYTES, "image is larger than")
    if not image:
        raise Unusable("empty")
    caption = ""
    try:
        caption = _text(file.beside(file.caption)).strip() if file.caption else ""
    except Unusable as error:  # the image is none the worse for it
        yield file.skipped(f"caption: {error}")
    yield file.document("image", text=caption, image=image, caption=bool(caption))


def _all(stream: IO[bytes], most: int, fault: str = "larger than") -> bytes:
    data = stream.read(most + 1)
    if len(data) > most:
        raise Unusable(f"{fault} {most >> 20} MiB")
    return data


def _text(data: bytes) -> str:
    if b"\0" in data:
        raise Unusable("binary")
    try:
        return _filled(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8") from error


def _filled(text: str) -> str:
    if not text.strip():
        raise Unusable("empty")
    return text


# ---- files of many documents


def _rows(file: File, found: Iterable[tuple[str, Mapping[str, object] | Unusable]]) -> Iterator[Document | Skipped]:
    seen = False
    for number, row in found:
        seen = True
        try:
            if isinstance(row, Unusable):
                raise row
            yield rows.document(file, number, row)
        except Unusable as error:
            yield file.skipped(str(error), number)
    if not seen:
        raise Unusable("empty")


def _archive(file: File, stream: IO[bytes]) -> Iterator[Document | Skipped]:
    """A WebDataset's samples, and the texts and sources of any other tar, member by member."""
    for key, members in rows.samples(stream):
        if any(suffix in IMAGES or suffix == ".json" for suffix in members):
            yield from _rows(file, [rows.sample_row(key, members)])
            continue
        for suffix, member in members.items():
            try:
                if isinstance(member, Unusable):
                    raise member
                yield from _whole(file, kind_of(key + suffix), member.open(), key + suffix)
            except Unusable as error:
                yield file.skipped(str(error), key + suffix)
