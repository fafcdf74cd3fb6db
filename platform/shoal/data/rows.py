"""Tables and archives as rows, and what a row means: JSON lines, Parquet, and the samples of a WebDataset tar.

A row's fields: text (or content, or caption), image, question with answer (or lists of them), modality, license, id, group.
A broken row is `Unusable`, and the next one is read.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.data.documents import MODALITIES, Document, Modality
from shoal.data.files import File, Unusable, printable
from shoal.data.kinds import IMAGES
from shoal.data.s3 import is_fault
from shoal.errors import RequestError
from shoal.inputs import media

MAX_ROW = 16 * 2**20  # bytes of one line or member; holds the largest image that `media` would decode
MAX_TABLE = 2**33  # bytes that a compressed Parquet file may unpack to, on disk
BATCH = 64  # rows of a Parquet file held at once
TEXTS = ("text", "content", "caption")
KNOWN = {*TEXTS, "image", "question", "answer", "modality", "license", "id", "group"}

Fields = Mapping[str, Any]
Numbered = Iterator[tuple[str, Fields | Unusable]]


def document(file: File, number: str, row: Fields) -> Document:
    """The document that a row stands for; `number` names a row that has no id. Raises Unusable."""
    image = _image(file, row["image"]) if row.get("image") else None
    asked = _questions(row.get("question"), row.get("answer"))
    text = "\n".join(f"Question: {q} Answer: {a}" for q, a in asked) or _text(row)
    if image is None and not text.strip():
        raise Unusable("no text and no image")
    modality = "image" if image is not None else row.get("modality") or "text"
    if modality not in MODALITIES:
        raise Unusable("unknown modality")
    made = file.document(
        cast(Modality, modality),
        row=printable(str(row.get("id") or number)),
        license=str(row.get("license") or ""),
        text=text,
        image=image,
        caption=image is not None and bool(text) and not asked,
        questions=asked,
    )
    group = row.get("group")
    return replace(made, group=f"{file.spec.family or file.spec.name}/{group}") if group else made


def _text(row: Fields) -> str:
    value = next((row[name] for name in TEXTS if row.get(name) is not None), "")
    if not isinstance(value, str):
        raise Unusable("text is not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a pair
        raise Unusable("not UTF-8") from error
    return value


def _questions(asked: object, answers: object) -> tuple[tuple[str, str], ...]:
    if not asked or not answers:
        return ()
    pair = [value if isinstance(value, list) else [value] for value in (asked, answers)]
    if len(pair[0]) != len(pair[1]):
        raise Unusable("not as many answers as questions")
    return tuple((str(q), str(a)) for q, a in zip(*pair, strict=True))


def _image(file: File, value: object) -> bytes:
    """Image bytes of a row: a ``data:`` URL, a path inside the source, or Parquet's ``{"bytes": ...}``."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _bounded(value)
    if not isinstance(value, str):
        raise Unusable("image is neither a data URL nor a path")
    if value.startswith("data:"):
        try:
            return media.from_data_url(value)
        except RequestError as error:
            raise Unusable("image URL cannot be decoded") from error
    return _bounded(file.beside(value))


def _bounded(image: bytes) -> bytes:
    if not image:
        raise Unusable("empty")
    if len(image) > media.MAX_BYTES:
        raise Unusable(f"image is larger than {media.MAX_BYTES >> 20} MiB")
    return image


# ---- JSON lines and Parquet


def jsonl(stream: IO[bytes]) -> Numbered:
    """The rows of a file of JSON lines, by line number."""
    for number, line in enumerate(_lines(stream), 1):
        if line is None:
            yield str(number), Unusable(f"row longer than {MAX_ROW >> 20} MiB")
        elif line.strip():
            yield str(number), _object(line)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a stream; None for one that is longer than MAX_ROW, which is never held in memory."""
    while line := stream.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW)
        yield None


def _object(line: bytes) -> Fields | Unusable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except (ValueError, RecursionError):
        return Unusable("broken JSON")
    return row if isinstance(row, dict) else Unusable("row is not an object")


def parquet(stream: IO[bytes], wanted: Collection[str] | None = KNOWN) -> Numbered:
    """The rows of a Parquet file, by number, with the `wanted` columns (None: all).

    It is read from its end, so a compressed one is unpacked on disk first.
    """
    if stream.seekable():
        yield from _table(stream, wanted)
        return
    with tempfile.TemporaryFile() as whole:
        while whole.tell() <= MAX_TABLE and (block := stream.read(2**20)):
            whole.write(block)
        if whole.tell() > MAX_TABLE:
            raise Unusable(f"larger than {MAX_TABLE >> 30} GiB")
        yield from _table(whole, wanted)


def _table(stream: IO[bytes], wanted: Collection[str] | None) -> Numbered:
    try:
        table = pq.ParquetFile(stream)
        columns = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
        if wanted is not None and not {*TEXTS, "image", "question"} & set(columns):
            yield "", Unusable("no text or image column")
            return
        number = 0
        for batch in table.iter_batches(batch_size=BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield str(number), row
    except (pa.ArrowException, OSError) as error:
        if is_fault(error):
            raise
        yield "", Unusable("broken Parquet")


# ---- tar


@dataclass(frozen=True)
class Member:
    """One file of an archive."""

    data: bytes

    def open(self) -> IO[bytes]:
        return io.BytesIO(self.data)


Members = dict[str, "Member | Unusable"]  # suffix -> the file


def samples(stream: IO[bytes]) -> Iterator[tuple[str, Members]]:
    """The samples of a tar, in order: neighbours whose names are equal up to the first dot of the last part.

    Raises Unusable where the archive is broken; what came before is not lost.
    """
    key, members = "", Members()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tape:
            for info in tape:
                if info.isdir():
                    continue
                folder, _, last = printable(info.name).rpartition("/")
                stem, dot, suffix = last.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if here != key or dot + suffix.lower() in members:
                    if members:
                        yield key, members
                    key, members = here, {}
                members[dot + suffix.lower()] = _member(tape, info)
    except (tarfile.TarError, EOFError) as error:
        if members:
            yield key, members
        raise Unusable("broken archive") from error
    if members:
        yield key, members


def _member(tape: tarfile.TarFile, info: tarfile.TarInfo) -> Member | Unusable:
    opened = tape.extractfile(info) if info.isfile() else None
    if opened is None:
        return Unusable("not a regular file")
    if info.size > MAX_ROW:
        return Unusable(f"larger than {MAX_ROW >> 20} MiB")
    return Member(opened.read())


def sample_row(key: str, members: Members) -> tuple[str, Fields | Unusable]:
    """A WebDataset sample as a row: its image, its ``.txt`` (or ``.caption``), and the fields of its ``.json``."""
    row: dict[str, Any] = {}
    for suffix, member in members.items():
        if isinstance(member, Unusable):
            return key, member
        if suffix == ".json":
            fields = _object(member.data)
            if isinstance(fields, Unusable):
                return key, fields
            row |= {name: value for name, value in fields.items() if name in KNOWN and name != "image"}
        elif suffix in IMAGES:
            row["image"] = member.data
        elif suffix in (".txt", ".text", ".caption"):
            try:
                row["text"] = member.data.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return key, Unusable("not UTF-8")
    return key, row
