"""What a corpus is made of, and how its files are read: one URI in, `Document`s and counted `Skipped`s out.

Notable: reading never fails for one bad file or row; it yields a `Skipped` with a reason, and the job goes on. Only a source
that gives nothing at all is an error. The order is that of the sorted file names, so the same folder always reads the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.data import pysource
from shoal.errors import DataError, RequestError, UsageError
from shoal.inputs import media

Modality = Literal["text", "code", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

TEXT = frozenset({".txt", ".md", ".rst", ".html", ".htm"})
CODE = frozenset({
    ".c", ".cc", ".cpp", ".cs", ".go", ".h", ".hpp", ".java", ".js", ".jsx", ".kt", ".lua", ".php", ".pl", ".py", ".pyi",
    ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".tsx",
})  # fmt: skip
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
TABLES = frozenset({".jsonl", ".parquet"})
SUFFIXES = TEXT | CODE | IMAGES | TABLES

MAX_FILE = 64 * 2**20  # bytes of a file that is one document
MAX_ROW = 16 * 2**20  # bytes of one line of a JSONL; holds the largest image that `media` would decode


@dataclass(frozen=True)
class SourceSpec:
    """One source of a corpus, as a user names it (``--source NAME=URI``)."""

    name: str
    uri: str  # a folder (read recursively) or a file
    license: str = "unstated"
    reader: Literal["files", "docstrings"] = "files"  # docstrings: of Python files, as pages of text
    exclude: tuple[str, ...] = ()  # names of folders and files that are left out; patterns as in a shell
    family: str = ""  # sources of one family keep a file's documents on one side of the held-out split
    heldout: bool | None = None  # the side that all of it is on; None: each group's is drawn

    @classmethod
    def parse(cls, text: str) -> SourceSpec:
        """``NAME=URI`` as a source. Raises UsageError."""
        name, _, uri = text.partition("=")
        if not name or not uri:
            raise UsageError("--source", got=text, allowed="NAME=URI, such as notes=docs/")
        return cls(name, uri)


@dataclass(frozen=True)
class Document:
    """One piece of a corpus. Two documents of the same `group` are never on different sides of the held-out split."""

    id: str  # unique: source, file, and row where a file has several
    group: str
    source: str
    license: str
    modality: Modality
    origin: str  # the file's path inside its source
    text: str = ""  # of an image: its caption, or a question with its answer
    image: bytes | None = None  # as encoded in its file
    caption: bool = False  # the text names the image, so it may as well stand before it
    questions: tuple[tuple[str, str], ...] = ()  # with their answers, where the text is made of them

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Skipped:
    """A document, file or row that was left out: by which operator, and why."""

    origin: str
    source: str
    reason: str
    operator: str = "read"


@dataclass(frozen=True)
class File:
    """One file to read. Its `name` is the path inside the source, printable whatever bytes the file system holds."""

    path: Path
    name: str
    spec: SourceSpec
    caption: Path | None = None  # of an image: the .txt beside it

    @cached_property
    def root(self) -> Path:
        """The folder that the source may refer to."""
        start = Path(self.spec.uri)
        return (start if start.is_dir() else start.parent).resolve()

    def document(self, modality: Modality, *, row: str = "", license: str = "", **fields: Any) -> Document:
        """A document of this file; `row` sets the rows of one file apart."""
        where = f"{self.name}#{row}" if row else self.name
        return Document(
            id=f"{self.spec.name}/{where}",
            group=f"{self.spec.family or self.spec.name}/{where}",
            source=self.spec.name,
            license=license or self.spec.license,
            modality=modality,
            origin=where,
            **fields,
        )

    def skipped(self, reason: str, row: str = "") -> Skipped:
        return Skipped(f"{self.name}#{row}" if row else self.name, self.spec.name, reason)


def list_files(spec: SourceSpec) -> list[File]:
    """The files of a source, sorted by path. Folders reached through a symbolic link are not entered, hidden ones neither.

    Raises DataError when the source is missing, is not local, or holds no file.
    """
    if "://" in spec.uri:
        raise DataError(f"source {spec.name}", got=spec.uri, allowed="a local folder or file")
    start = Path(spec.uri).expanduser()
    if start.is_file():
        return [File(start, _printable(start.name), spec)]
    if not start.is_dir():
        raise DataError(f"source {spec.name}: {spec.uri} does not exist", do="give an existing folder or file")
    paths: list[Path] = []
    for folder, names, files in os.walk(start):
        names[:] = sorted(n for n in names if not _left_out(n, spec))
        paths += [Path(folder) / n for n in files if not _left_out(n, spec)]
    if spec.reader == "docstrings":
        paths = [p for p in paths if p.suffix == ".py"]
    pictured = {p.with_suffix(".txt"): p for p in paths if p.suffix.lower() in IMAGES}
    captions = {pictured[p]: p for p in paths if p in pictured}
    own = sorted((p for p in paths if p not in pictured), key=lambda p: p.relative_to(start).parts)
    if not own:
        raise DataError(f"source {spec.name}: {spec.uri} holds no file", do="point it at a folder with documents")
    return [File(p, _printable(p.relative_to(start).as_posix()), spec, captions.get(p)) for p in own]


def _left_out(name: str, spec: SourceSpec) -> bool:
    return name.startswith(".") or any(fnmatchcase(name, pattern) for pattern in spec.exclude)


def read(file: File) -> Iterator[Document | Skipped]:
    """The documents of one file, in its own order, and what had to be left out. Never raises for what the file holds."""
    suffix = file.path.suffix.lower()
    try:
        if not file.path.is_file():  # a dangling link, a socket, a device
            yield file.skipped("not a regular file")
        elif file.spec.reader == "docstrings":
            yield _docstrings(file)
        elif suffix in TABLES:
            yield from _rows(file, _jsonl(file) if suffix == ".jsonl" else _parquet(file))
        elif suffix in IMAGES:
            yield _picture(file)
        elif suffix in TEXT | CODE:
            yield _whole_file(file, suffix)
        else:
            yield file.skipped(f"suffix {suffix or '(none)'} is not read")
    except _Unusable as error:
        yield file.skipped(str(error))
    except OSError as error:
        yield file.skipped(f"cannot be read: {error.strerror or type(error).__name__}")


# ---- files that are one document


class _Unusable(Exception):
    """A file or row that cannot be used; its text is the reason that is counted."""


def _whole_file(file: File, suffix: str) -> Document:
    text = _text(file.path)
    if suffix in CODE:
        return file.document("code", text=text)
    return file.document("text", text=html_text(text) if suffix.startswith(".htm") else text)


def _docstrings(file: File) -> Document:
    page = pysource.docstring_page(_text(file.path), file.name)
    if not page:
        raise _Unusable("does not parse" if page is None else "no docstrings")
    return file.document("text", text=page)


def _picture(file: File) -> Document:
    caption = _text(file.caption).strip() if file.caption else ""
    return file.document("image", text=caption, image=_image(file.path), caption=bool(caption))


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE:
        raise _Unusable(f"larger than {MAX_FILE >> 20} MiB")
    data = path.read_bytes()
    if b"\0" in data:
        raise _Unusable("binary")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("not UTF-8") from error
    if not text.strip():
        raise _Unusable("empty")
    return text


def _image(path: Path) -> bytes:
    size = path.stat().st_size
    if not 0 < size <= media.MAX_BYTES:
        raise _Unusable("image is too large" if size else "empty")
    return path.read_bytes()


class _Visible(HTMLParser):
    """Collects the text that a browser would show; block elements end a line."""

    BLOCKS = frozenset({
        "article", "blockquote", "br", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "ol", "p", "pre", "section", "table",
        "title", "tr", "ul",
    })  # fmt: skip
    HIDDEN = frozenset({"noscript", "script", "style", "template"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def html_text(source: str) -> str:
    """The visible text of an HTML page, one line a block, blank lines left out."""
    parser = _Visible()
    parser.feed(source)
    parser.close()
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)


# ---- files of many rows


def _rows(file: File, rows: Iterable[tuple[str, Mapping[str, Any] | _Unusable]]) -> Iterator[Document | Skipped]:
    for number, row in rows:
        try:
            if isinstance(row, _Unusable):
                raise row
            yield _row_document(file, number, row)
        except _Unusable as error:
            yield file.skipped(str(error), number)


def _row_document(file: File, number: str, row: Mapping[str, Any]) -> Document:
    """The fields that count: text (or content), image, question with answer (or lists of them), modality, license, id,
    group."""
    image = _row_image(file, row["image"]) if row.get("image") else None
    asked = _questions(row.get("question"), row.get("answer"))
    text = "\n".join(f"Question: {q} Answer: {a}" for q, a in asked) or row.get("text", row.get("content"))
    if not isinstance(text, str):
        text = ""
    if image is None and not text.strip():
        raise _Unusable("no text and no image")
    modality = "image" if image is not None else row.get("modality", "text")
    if modality not in MODALITIES:
        raise _Unusable("unknown modality")
    document = file.document(
        cast(Modality, modality),
        row=str(row.get("id") or number),
        license=str(row.get("license") or ""),
        text=text,
        image=image,
        caption=image is not None and bool(text) and not asked,
        questions=asked,
    )
    group = row.get("group")
    return replace(document, group=f"{file.spec.family or file.spec.name}/{group}") if group else document


def _questions(asked: object, answers: object) -> tuple[tuple[str, str], ...]:
    if not asked or not answers:
        return ()
    pair = [value if isinstance(value, list) else [value] for value in (asked, answers)]
    if len(pair[0]) != len(pair[1]):
        raise _Unusable("not as many answers as questions")
    return tuple((str(q), str(a)) for q, a in zip(*pair, strict=True))


def _row_image(file: File, value: object) -> bytes:
    """Image bytes of a row: a ``data:`` URL, a path inside the source, or Parquet's ``{"bytes": ...}``."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _Unusable("image is neither a data URL nor a path")
    if value.startswith("data:"):
        try:
            return media.from_data_url(value)
        except RequestError as error:
            raise _Unusable("image URL cannot be decoded") from error
    path = (file.path.parent / value).resolve()
    if not path.is_relative_to(file.root):
        raise _Unusable("image path leads out of the source")
    if not path.is_file():
        raise _Unusable("image file is missing")
    return _image(path)


def _jsonl(file: File) -> Iterator[tuple[str, Mapping[str, Any] | _Unusable]]:
    with file.path.open("rb") as stream:
        for number, line in enumerate(_lines(stream), 1):
            if line is None:
                yield str(number), _Unusable(f"row longer than {MAX_ROW >> 20} MiB")
            elif line.strip():
                yield str(number), _json_row(line)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a stream; None for one that is longer than MAX_ROW, which is never held in memory."""
    while line := stream.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW)
        yield None


def _json_row(line: bytes) -> Mapping[str, Any] | _Unusable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return _Unusable("not UTF-8")
    except (ValueError, RecursionError):
        return _Unusable("broken JSON")
    return row if isinstance(row, dict) else _Unusable("row is not an object")


def _parquet(file: File) -> Iterator[tuple[str, Mapping[str, Any] | _Unusable]]:
    known = {"text", "content", "image", "question", "answer", "modality", "license", "id", "group"}
    try:
        table = pq.ParquetFile(file.path)
        columns = [name for name in table.schema_arrow.names if name in known]
        if not {"text", "content", "image", "question"} & set(columns):
            yield "", _Unusable("no text or image column")
            return
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield str(number), row
    except (pa.ArrowException, OSError):
        yield "", _Unusable("broken Parquet")


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
