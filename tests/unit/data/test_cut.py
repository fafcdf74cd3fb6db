"""Large files in pieces: together they hold what the whole file does, each row once, wherever the cuts fall."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.sources import files, read
from shoal.data.sources.files import File, cut, lines_between, list_files
from shoal.data.sources.read import read as read_file


def pieces(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> list[File]:
    (file,) = list_files(SourceSpec("s", str(folder)))
    monkeypatch.setattr(files, "CUT_BYTES", size)
    return cut(file)


def texts(some: list[File]) -> list[str]:
    found = [item for file in some for item in read_file(file)]
    assert not [item for item in found if isinstance(item, Skipped)]
    assert len({item.id for item in found}) == len(found)
    return [item.text for item in found if isinstance(item, Document)]


@given(st.lists(st.text("ab\n", max_size=9), max_size=12).map("".join), st.integers(1, 5))
def test_every_line_is_in_one_piece(text: str, count: int) -> None:
    data, found = text.encode(), []
    ends = [len(data) * number // count for number in range(count + 1)]
    for start, end in itertools.pairwise(ends):
        with lines_between(io.BytesIO(data), start, end) as lines:
            found.append(lines.read())
    assert b"".join(found) == data
    assert all(not some or some.endswith(b"\n") for some in found[:-1] if b"".join(found[found.index(some) + 1 :]))


@pytest.mark.parametrize("size", [50, 333, 4000])
def test_json_lines_are_read_once_whatever_the_size_of_a_piece(tmp_path: Path, monkeypatch, size: int) -> None:
    said = [f"line {n} of {n * n} words" for n in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in said))
    some = pieces(tmp_path, monkeypatch, size)
    assert len(some) == -(-(tmp_path / "a.jsonl").stat().st_size // size) and texts(some) == said
    assert sum(file.size for file in some) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize("size", [300, 2000, 100_000])
def test_row_groups_of_parquet_are_read_once_and_rows_have_their_numbers(tmp_path: Path, monkeypatch, size) -> None:
    said = [f"row {n} of {n * n} words" for n in range(100)]
    pq.write_table(pa.table({"text": said}), tmp_path / "a.parquet", row_group_size=7)
    some = pieces(tmp_path, monkeypatch, size)
    found = [item for file in some for item in read_file(file)]
    assert [(item.origin, item.text) for item in found if isinstance(item, Document)] == [
        (f"a.parquet#{n + 1}", text) for n, text in enumerate(said)
    ]
    assert len(found) == len(said)


def test_a_long_text_is_cut_between_lines(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(read, "PIECE", 400)
    text = "".join(f"line {n} of {n * n} words\n" for n in range(300))
    (tmp_path / "a.txt").write_text(text)
    assert "".join(texts(pieces(tmp_path, monkeypatch, 1500))) == text


def test_a_broken_table_is_counted_once(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(900) + b"PAR1")
    found = [item for file in pieces(tmp_path, monkeypatch, 100) for item in read_file(file)]
    assert [item.reason for item in found if isinstance(item, Skipped)] == ["broken Parquet"] and len(found) == 1


def test_what_has_no_lines_or_is_compressed_is_not_cut(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "CUT_BYTES", 10)
    (tmp_path / "a.py").write_text("x = 1\n" * 40)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a text that is not cut"}\n' * 40))
    (tmp_path / "c.tar").write_bytes(bytes(2000))
    (tmp_path / "d.txt").write_text("x" * 9)
    assert [cut(file) for file in list_files(SourceSpec("s", str(tmp_path)))] == [
        [file] for file in list_files(SourceSpec("s", str(tmp_path)))
    ]
