"""Files and what they are stored in: compression, archives, long texts, scripts without a suffix, S3 paths."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.sources import read
from shoal.data.sources.files import S3Store, Unusable, list_files, printable
from shoal.data.sources.kinds import kind_of
from shoal.data.sources.s3 import S3, split
from shoal.errors import ConfigError, DataError

PACK = {".gz": gzip.compress, ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True))}


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tape:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tape.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("suffix", PACK)
def test_any_file_may_be_compressed(tmp_path: Path, png, read_all, suffix: str) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a row"]}), table)
    files = {
        "a.txt": b"a text\n",
        "b.py": b"x = 1\n",
        "c.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
        "d.parquet": table.getvalue(),
        "e.png": png(),
        "f.tar": tar({"in/g.md": b"# In a tar\n"}),
        "h.html": b"<p>page",
    }
    for name, data in files.items():
        (tmp_path / (name + suffix)).write_bytes(PACK[suffix](data))
    found = read_all()
    assert [(d.origin.removesuffix(suffix).replace(suffix, ""), d.text) for d in found] == [
        ("a.txt", "a text\n"), ("b.py", "x = 1\n"), ("c.jsonl#1", "one"), ("c.jsonl#2", "two"), ("d.parquet#1", "a row"),
        ("e.png", ""), ("f.tar#in/g.md", "# In a tar\n"), ("h.html", "page"),
    ]  # fmt: skip
    assert [d.modality for d in found] == ["text", "code", "text", "text", "text", "image", "text", "text"]
    assert found[5].image == png()


def test_compressed_data_of_several_frames_is_one_file(tmp_path: Path, read_all) -> None:
    for suffix, pack in PACK.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one\n") + pack(b"two\n"))
    assert [d.text for d in read_all()] == ["one\ntwo\n"] * 2


def test_the_samples_of_a_webdataset_are_images_with_their_texts(tmp_path: Path, png, read_all) -> None:
    asked = {"question": "what?", "answer": "a box", "license": "CC0-1.0", "url": "not kept"}
    members = {
        "0/000.png": png(), "0/000.txt": b"a red box\n", "0/000.cls": b"7",
        "0/001.jpg": png(), "0/001.json": json.dumps(asked).encode(),
        "0/002.webp": png(), "0/002.json": b"{broken",
        "0/003.txt": b"a text alone\n",
        "0/004.v1.py": b"x = 1\n",
        "0/005.bin": b"\0",
    }  # fmt: skip
    (tmp_path / "some.tar").write_bytes(tar(members))
    caption, label, question, broken, text, code, other = read_all(license="MIT")
    assert (caption.text, caption.caption, caption.image, caption.license) == ("a red box", True, png(), "MIT")
    assert (label.reason, label.origin) == ("suffix .cls is not read", "some.tar#0/000.cls")
    assert question.questions == (("what?", "a box"),) and question.license == "CC0-1.0"
    assert (broken.reason, broken.origin) == ("broken JSON", "some.tar#0/002")
    assert (text.text, text.modality, text.id) == ("a text alone\n", "text", "s/some.tar#0/003.txt")
    assert (code.modality, code.origin) == ("code", "some.tar#0/004.v1.py")
    assert other.reason == "suffix .bin is not read"


@given(st.lists(st.text("ab \u00e9", max_size=30), min_size=1, max_size=40))
def test_a_long_text_becomes_documents_that_hold_all_of_its_lines(lines: list[str]) -> None:
    whole = "\n".join(lines).encode()
    before, read.PIECE = read.PIECE, 64
    try:
        pieces = list(read._pieces(io.BytesIO(whole)))
    finally:
        read.PIECE = before
    assert b"".join(piece or b"" for piece in pieces) == whole  # no line here is longer than a piece
    assert all(piece.endswith(b"\n") and len(piece) < 128 for piece in pieces[:-1])
    for piece in pieces:
        piece.decode()  # no character is cut


def test_a_line_that_is_too_long_is_left_out_and_its_neighbours_are_kept(
    tmp_path: Path, read_all, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "PIECE", 64)
    (tmp_path / "a.txt").write_text("first\n" + "x" * 500 + "\nlast line of it\n")
    first, long, last = read_all()
    assert (first.text, last.text) == ("first\n", "last line of it\n")
    assert isinstance(long, Skipped) and long.reason.startswith("line longer than")


def test_code_of_any_language_is_told_by_suffix_name_or_first_line(tmp_path: Path, read_all) -> None:
    for name in ("a.hs", "b.zig", "c.f90", "Makefile", "Dockerfile", "main.tf"):
        (tmp_path / name).write_text("some source\n")
    (tmp_path / "run").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "NOTES").write_text("no script\n")
    found = read_all()
    assert {d.origin: d.modality for d in found if isinstance(d, Document)} == dict.fromkeys(
        ["a.hs", "b.zig", "c.f90", "Makefile", "Dockerfile", "main.tf", "run"], "code"
    )
    assert [s.reason for s in found if isinstance(s, Skipped)] == ["suffix (none) is not read"]


def test_a_changed_caption_is_another_file(tmp_path: Path, png) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("red")
    (before,) = list_files(SourceSpec("s", str(tmp_path)))
    (tmp_path / "a.txt").write_text("a red square")
    (after,) = list_files(SourceSpec("s", str(tmp_path)))
    assert before.stamp != after.stamp


@given(st.text(), st.text())
def test_names_are_shown_on_one_line_and_stay_apart(one: str, other: str) -> None:
    assert "\n" not in printable(one) and printable(one).isprintable()
    if "\\" not in one + other:
        assert (printable(one) == printable(other)) == (one == other)


def test_an_image_path_stays_inside_its_prefix() -> None:
    store = S3Store(S3())
    assert store.beside("s3://b/data", "b/data/x/rows.jsonl", "images/1.png") == "b/data/x/images/1.png"
    assert store.beside("s3://b/data", "b/data/x/rows.jsonl", "../1.png") == "b/data/1.png"
    assert store.beside("s3://b/data/rows.jsonl", "b/data/rows.jsonl", "1.png") == "b/data/1.png"
    for name in ("../../1.png", "../../data2/1.png", "/etc/passwd"):
        with pytest.raises(Unusable, match="out of the source"):
            store.beside("s3://b/data", "b/data/x/rows.jsonl", name)


def test_an_s3_setting_is_checked_and_the_environment_fills_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert S3().resolved() == S3("http://127.0.0.1:9000", "eu-west-1")
    assert S3("http://127.0.0.1:1").resolved().endpoint == "http://127.0.0.1:1"
    for endpoint, said in [("127.0.0.1:9000", "allowed: http://HOST"), ("http://me:secret@host", "holds a password")]:
        with pytest.raises(ConfigError, match=said) as caught:
            S3(endpoint)
        assert "secret" not in str(caught.value)
    for uri in ("s3://", "s3://b?endpoint_override=x", "b/k"):
        with pytest.raises(ConfigError, match="s3://BUCKET"):
            split(uri)


def test_kinds_see_through_compression() -> None:
    assert kind_of("a/B.PY.GZ") == kind_of("a/b.py.gz")
    assert (kind_of("x.tgz").suffix, kind_of("x.tgz").compression) == (".tar", ".gz")
    assert kind_of("makefile").code and not kind_of("readme").code


def test_a_folder_that_cannot_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_all) -> None:
    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "b.txt").write_text("not seen\n")
    scan = os.scandir

    def closed(path: str) -> object:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)  # modes mean nothing to root
    for options in ({}, {"reader": "docstrings"}):
        skipped = [item for item in read_all(**options) if isinstance(item, Skipped)]
        assert [(s.origin, s.reason) for s in skipped] == [("closed", "folder cannot be read: Permission denied")]


def test_a_caption_is_never_held_when_it_is_too_long(tmp_path: Path, png, read_all) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with (tmp_path / "a.txt").open("wb") as out:
        out.write(b"a red square")
        out.truncate(2**30)  # a hole
    tracemalloc.start()
    skipped, image = read_all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(image, Document) and image.text == "" and peak < 64 * 2**20
    assert isinstance(skipped, Skipped) and skipped.reason == "caption: larger than 16 MiB"


def test_two_images_of_one_name_share_their_caption(tmp_path: Path, png, read_all) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "a.txt").write_text("a red square")
    assert [(d.origin, d.text) for d in read_all()] == [("a.jpg", "a red square"), ("a.png", "a red square")]


def test_a_file_that_is_gone_or_a_folder_since_it_was_listed_is_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.parquet", "d.tar", "e.png"):
        (tmp_path / name).write_text("here\n")
    files = list_files(SourceSpec("s", str(tmp_path)))
    for change in (Path.unlink, Path.mkdir):
        for file in files:
            change(Path(file.path))
        found = [item for file in files for item in read.read(file)]
        assert [item.reason for item in found if isinstance(item, Skipped)] == ["not a regular file"] * 5


def test_a_home_of_nobody_is_one_line() -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_files(SourceSpec("s", "~nobody-of-this-name/x"))
