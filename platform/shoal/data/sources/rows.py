"""Tables as rows, JSON lines and Parquet, and what a row means.

A row's fields: text (or content, or caption), image, question with answer (or lists of them), modality, license, id, group.
Null, NaN and blank strings are not given; 0 and false are. A broken row is `Unusable`, and the next one is read.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from shoal.data.documents import MODALITIES, Document, Skipped
from shoal.data.sources.files import File, Unusable, printable
from shoal.data.sources.s3 import is_fault
from shoal.errors import RequestError
from shoal.inputs import media

MAX_ROW = 16 * 2**20  # bytes of one line, row or member; holds the largest image that `media` would decode
MAX_TABLE = 2**33  # bytes that a compressed Parquet file may unpack to, on disk
BATCH = 64  # rows of a Parquet file held at once ...
HELD = 2**30  # ... and bytes that they may take where each stands for the largest value of its column chunk
TEXTS = ("text", "content", "caption")
TOO_LONG = f"row longer than {MAX_ROW >> 20} MiB"
KNOWN = {*TEXTS, "image", "question", "answer", "modality", "license", "id", "group"}

Fields = Mapping[str, Any]
Numbered = Iterator[tuple[str, Fields | Unusable]]


def documents(file: File, number: str, row: Fields) -> Iterator[Document | Skipped]:
    """The document that a row stands for, and the questions that have no answer; `number` names a row that has no id. Raises
    Unusable."""
    row = {name: value for name, value in row.items() if name in KNOWN and _given(value)}
    number = printable(str(row.get("id", number)))
    image = _image(file, row["image"]) if "image" in row else None
    pairs = _pairs(row)
    asked = tuple((question, answer) for question, answer in pairs if question and answer)
    for _ in range(len(pairs) - len(asked)):
        yield file.skipped("question without an answer", number)
    text = "\n".join(f"Question: {q} Answer: {a}" for q, a in asked) or _text(row)
    if image is None and not text:
        if pairs:  # it is counted already
            return
        raise Unusable("no text and no image")
    modality = "image" if image is not None else _plain("modality", row.get("modality")) or "text"
    if modality not in MODALITIES:
        raise Unusable("unknown modality")
    yield file.document(
        modality,
        row=number,
        license=", ".join(filter(None, (_plain("license", one) for one in _listed(row.get("license"))))),
        group=str(row.get("group", "")),
        text=text,
        image=image,
        caption=image is not None and bool(text) and not asked,
        questions=asked,
    )


def _given(value: object) -> bool:
    """Whether a field says anything: null, NaN (what pandas makes of null), blank strings and empty mappings do not."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, Mapping):
        return any(map(_given, value.values()))
    return value is not None and value == value


def _plain(name: str, value: object) -> str:
    """A value of a row as text, as JSON would write it; empty for one that is not given. Raises Unusable for what is none."""
    if not _given(value):
        return ""
    if isinstance(value, (bytes, Mapping, list, tuple)):
        raise Unusable(f"{name} is neither a string nor a number")
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _text(row: Fields) -> str:
    value = next((row[name] for name in TEXTS if name in row), "")
    if not isinstance(value, str):
        raise Unusable("text is not a string")
    return value


def _pairs(row: Fields) -> list[tuple[str, str]]:
    """The questions of a row with their answers; what is not given is empty."""
    if "question" not in row:
        return []
    asked = _listed(row["question"])
    answers = _listed(row["answer"]) if "answer" in row else [None] * len(asked)
    if len(asked) != len(answers):
        raise Unusable("not as many answers as questions")
    return [(_plain("question", q), _plain("answer", a)) for q, a in zip(asked, answers, strict=True)]


def _image(file: File, value: object) -> bytes:
    """Image bytes of a row: a ``data:`` URL, a path inside the source, or Parquet's ``{"bytes": ...}``."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return _bounded(value)
    if not isinstance(value, str):
        raise Unusable("image is neither a data URL nor a path")
    if value.startswith("data:"):
        try:
            return media.from_data_url(value)
        except RequestError as error:
            raise Unusable("image URL cannot be decoded") from error
    return _bounded(file.beside(value, media.MAX_BYTES, "image is larger than"))


def _bounded(image: bytes) -> bytes:
    if not image:
        raise Unusable("empty")
    if len(image) > media.MAX_BYTES:
        raise Unusable(f"image is larger than {media.MAX_BYTES >> 20} MiB")
    return image


# ---- JSON lines and Parquet


def jsonl(stream: IO[bytes]) -> Numbered:
    """The rows of a file of JSON lines, by line number."""
    for number, line in enumerate(lines(stream), 1):
        if line is None:
            yield str(number), Unusable(TOO_LONG)
        elif line.strip():
            yield str(number), parsed(line)


def lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a stream; None for one that is longer than MAX_ROW, which is never held in memory."""
    while line := stream.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW)
        yield None


def parsed(line: bytes) -> Fields | Unusable:
    """The object that a line of JSON holds."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except (ValueError, RecursionError):
        return Unusable("broken JSON")
    return row if isinstance(row, dict) else Unusable("row is not an object")


def parquet(
    stream: IO[bytes], wanted: Collection[str] | None = KNOWN, within: tuple[int, int] | None = None
) -> Numbered:
    """The rows of a Parquet file, by number, with the `wanted` columns (None: all); with `within`, of the row groups that begin
    between these bytes, and a fault of the whole file where the first of them is 0.

    It is read from its end, so a compressed one is unpacked on disk first.
    """
    if stream.seekable():
        yield from _table(stream, wanted, within or (0, stream.seek(0, io.SEEK_END)))
        return
    with tempfile.TemporaryFile() as whole:
        while whole.tell() <= MAX_TABLE and (block := stream.read(2**20)):
            whole.write(block)
        if whole.tell() > MAX_TABLE:
            raise Unusable(f"larger than {MAX_TABLE >> 30} GiB")
        yield from _table(whole, wanted, (0, whole.tell()))


def _table(stream: IO[bytes], wanted: Collection[str] | None, within: tuple[int, int]) -> Numbered:
    """The rows, a row group at a time: one that is broken leaves the others."""
    fault = ""
    try:
        table = pq.ParquetFile(stream, metadata=_metadata(stream))
        columns = [name for name in table.schema_arrow.names if wanted is None or name in wanted]
    except (pa.ArrowException, OSError) as error:
        if is_fault(error):
            raise
        fault = "broken Parquet"
    else:
        if wanted is not None and not {*TEXTS, "image", "question"} & set(columns):
            fault = "no text or image column"
    if fault:
        if not within[0]:
            yield "", Unusable(fault)
        return
    first = 1  # row of the group
    for group in range(table.num_row_groups):
        try:
            if within[0] <= _begin(table.metadata.row_group(group)) < within[1]:
                yield from _group(table, group, columns, first)
        except (pa.ArrowException, OSError) as error:
            if is_fault(error):
                raise
            yield f"{first}-", Unusable("broken Parquet")
        first += table.metadata.row_group(group).num_rows


def _begin(group: pq.RowGroupMetaData) -> int:
    """Where a row group begins in its file."""
    chunks = (group.column(at) for at in range(group.num_columns))
    return min((chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks), default=0)


def _metadata(stream: IO[bytes]) -> pq.FileMetaData:
    """The file's metadata without the Arrow types that its writer had: of a column that was a dictionary, Arrow would refuse
    all rows where one is not UTF-8."""
    end = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, end - 8))
    tail = stream.read()
    size = int.from_bytes(tail[:4], "little")
    stream.seek(max(0, end - 8 - size))
    footer = stream.read(size).replace(b"ARROW:schema", b"unused:types")
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer + tail))


def _group(table: pq.ParquetFile, group: int, columns: list[str], number: int) -> Numbered:
    meta = table.metadata.row_group(group)
    chunks = [meta.column(at) for at in range(meta.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in columns)
    if size > MAX_ROW * max(1, meta.num_rows):  # even the mean is
        yield f"{number}-", Unusable(TOO_LONG)
        return
    some = max(1, min(BATCH, HELD // max(1, size)))  # each may be the largest: a dictionary has it once for all
    for batch in table.iter_batches(batch_size=some, row_groups=[group], columns=columns):
        for at in range(len(batch)):
            yield str(number), _row(batch.slice(at, 1))
            number += 1


def _row(one: pa.RecordBatch) -> Fields | Unusable:
    if one.nbytes > MAX_ROW:
        return Unusable(TOO_LONG)
    try:
        return cast(Fields, one.to_pylist()[0])
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except Exception as error:  # of a date or time zone that Python does not have
        return Unusable(f"row cannot be read: {type(error).__name__}")
