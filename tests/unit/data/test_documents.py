"""Reading: what each kind of file gives, and the reason that is counted for each kind of bad one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.operators.clean import check
from shoal.data.sources.files import File, list_files
from shoal.data.sources.read import read
from shoal.data.sources.rows import MAX_ROW
from shoal.data.sources.webpage import html_text
from shoal.errors import DataError


def reasons(found) -> list[str]:
    return [item.reason for item in found if isinstance(item, Skipped)]


def test_modality_follows_the_suffix_and_order_the_names(tmp_path: Path, png, read_all) -> None:
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "a.md").write_text("# Title\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.PNG").write_bytes(png())
    found = read_all()
    assert [(d.origin, d.modality) for d in found] == [("a.md", "text"), ("b.py", "code"), ("sub/c.PNG", "image")]
    assert len({d.id for d in found}) == 3


def test_a_text_beside_an_image_is_its_caption_and_no_document(tmp_path: Path, png, read_all) -> None:
    (tmp_path / "fish.png").write_bytes(png())
    (tmp_path / "fish.txt").write_text("a red fish\n")
    (only,) = read_all()
    assert (only.modality, only.text, only.caption) == ("image", "a red fish", True)


def test_an_image_is_none_the_worse_for_a_bad_caption(tmp_path: Path, png, read_all) -> None:
    for name, caption in (("a", b"\xff"), ("b", b"")):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_bytes(caption)
    found = read_all()
    assert reasons(found) == ["caption: not UTF-8", "caption: empty"]
    assert [d.origin for d in found if isinstance(d, Document)] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("zero.txt", b"a\0b", "binary"),
        ("empty.md", b"", "empty"),
        ("blank.py", b" \n\t\n", "empty"),
        ("empty.png", b"", "empty"),
        ("thing.exe", b"MZ", "suffix .exe is not read"),
        ("README", b"hello", "suffix (none) is not read"),
        ("rows.parquet", b"not parquet", "broken Parquet"),
        ("rows.jsonl", b"{broken\n", "broken JSON"),
        ("rows.jsonl", b"[1, 2]\n", "row is not an object"),
        ("rows.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("rows.jsonl", b'{"text": 5}\n', "text is not a string"),
        ("rows.jsonl", b'{"id": 5}\n', "no text and no image"),
        ("rows.jsonl", b'{"text": "\\ud800"}\n', "not UTF-8"),
        ("none.jsonl", b"", "empty"),
        ("rows.jsonl", b'{"text": "hi", "modality": "smell"}\n', "unknown modality"),
        ("rows.jsonl", b'{"image": "gone.png"}\n', "image file is missing"),
        ("rows.jsonl", b'{"image": "../../etc/passwd"}\n', "image path leads out of the source"),
        ("rows.jsonl", b'{"image": "data:image/png;base64,!!"}\n', "image URL cannot be decoded"),
        ("rows.jsonl", b'{"image": 7}\n', "image is neither a data URL nor a path"),
        ("rows.jsonl", b'{"question": ["a", "b"], "answer": ["c"]}\n', "not as many answers as questions"),
    ],
)
def test_a_bad_file_is_skipped_with_its_reason_and_the_next_one_is_read(
    tmp_path: Path, read_all, name: str, data: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "zz.txt").write_text("fine\n")
    found = read_all()
    assert reasons(found) == [reason]
    assert [d.text for d in found if isinstance(d, Document)] == ["fine\n"]


def test_one_bad_row_leaves_the_others(tmp_path: Path, read_all) -> None:
    rows = ['{"text": "one"}', "{", "", '{"content": "two", "license": "CC0-1.0", "id": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    first, bad, last = read_all(license="MIT")
    assert (first.text, first.license, first.id) == ("one", "MIT", "s/rows.jsonl#1")
    assert (bad.reason, bad.origin) == ("broken JSON", "rows.jsonl#2")
    assert (last.text, last.license, last.id) == ("two", "CC0-1.0", "s/rows.jsonl#x")


def test_a_row_too_long_to_hold_is_skipped_without_being_held(tmp_path: Path, read_all) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as out:
        out.write(b'{"text": "' + b"a" * (MAX_ROW + 10) + b'"}\n{"text": "after"}\n')
    found = read_all()
    assert reasons(found) == ["row longer than 16 MiB"]
    assert found[-1].text == "after"


def test_questions_keep_their_answers(tmp_path: Path, read_all, data_url: str) -> None:
    row = {"image": data_url, "question": ["what?", "red?"], "answer": ["a box", "yes"], "group": "g"}
    (tmp_path / "vqa.jsonl").write_text(json.dumps(row) + "\n")
    (only,) = read_all(family="f")
    assert only.text == "Question: what? Answer: a box\nQuestion: red? Answer: yes"
    assert only.questions == (("what?", "a box"), ("red?", "yes"))
    assert (only.group, only.caption) == ("f/g", False)


def test_parquet_gives_rows_and_images(tmp_path: Path, png, read_all) -> None:
    table = pa.table({"text": ["a", None], "image": [None, {"bytes": png(), "path": "x"}], "other": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet")
    first, second = read_all()
    assert (first.modality, second.modality, second.image) == ("text", "image", png())


def test_parquet_without_a_column_of_ours_is_skipped(tmp_path: Path, read_all) -> None:
    pq.write_table(pa.table({"other": [1]}), tmp_path / "t.parquet")
    assert reasons(read_all()) == ["no text or image column"]


def test_links_sockets_and_hidden_files_are_no_documents(tmp_path: Path, read_all) -> None:
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert reasons(read_all()) == ["not a regular file"] * 2


@pytest.mark.parametrize("reader", ["files", "docstrings"])
def test_every_file_of_a_folder_is_a_document_a_caption_or_counted_with_its_reason(
    reader: str, tmp_path: Path, png
) -> None:
    folder = tmp_path / "notes"
    for name in (
        "a.txt",
        "b.md",
        "c.csv",
        "d.xlsx",
        "e",
        "f.py",
        ".hidden.txt",
        "draft-g.txt",
        "sub/h.JSON",
        "sub/i.docx",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text('"""Words of it."""\n')
    (folder / "j.png").write_bytes(png())
    (folder / "j.txt").write_text("a caption")
    (tmp_path / "far").mkdir()
    (folder / "linked").symlink_to(tmp_path / "far")
    spec = SourceSpec("s", str(folder), exclude=("draft-*",), reader=reader)  # type: ignore[arg-type]
    left_out: list[File] = []
    found = [item for file in list_files(spec, left_out=left_out) for item in read(file)]
    skipped = {item.origin: item.reason for item in found if isinstance(item, Skipped)}
    skipped |= {file.name: file.fault for file in left_out}
    kept = {item.origin for item in found if isinstance(item, Document)}
    python = reader == "docstrings"
    assert kept == ({"f.py"} if python else {"a.txt", "b.md", "f.py", "j.png"})
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert kept | skipped.keys() == on_disk - (set() if python else {"j.txt"}) and not kept & skipped.keys()
    assert (skipped[".hidden.txt"], skipped["linked"]) == ("name begins with a dot", "folder behind a symbolic link")
    of_csv = "no Python, of which docstrings are read" if python else "suffix .csv is not read"
    assert (skipped["draft-g.txt"], skipped["c.csv"]) == ("excluded by its source", of_csv)


def test_what_the_source_leaves_out_is_not_listed(tmp_path: Path) -> None:
    for name in ("tests/a.py", "src/a.py", "src/gen_a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    spec = SourceSpec("s", str(tmp_path), exclude=("tests", "gen_*"))
    assert [file.name for file in list_files(spec)] == ["src/a.py"]


@pytest.mark.parametrize(
    ("uri", "said"), [("missing", "does not exist"), ("empty", "holds no file"), ("ftp://host/x", "a local folder")]
)
def test_a_source_that_gives_nothing_is_one_line(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said) as caught:
        list_files(SourceSpec("notes", uri if "://" in uri else str(tmp_path / uri)))
    assert "notes" in str(caught.value) and "\n" not in str(caught.value)


def test_html_is_read_as_a_browser_shows_it() -> None:
    page = "<title>T</title><script>x()</script><p>One <b>bold</b> &amp; two</p><style>p{}</style><ul><li>a<li>b</ul>"
    assert html_text(page) == "T\nOne bold & two\na\nb"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table><tr><th>Name<th>Age<tr><td></td><td>7</td></tr></table>", "Name\tAge\n\t7"),
        ("<dl><dt>Fish<dd>swims</dd><dt>Crab</dt><dd>walks</dl>", "Fish\nswims\nCrab\nwalks"),
        ("<td><p>Name</p></td><td><p>Age</p></td>", "Name\nAge"),
        ("a<pre>\ndef f():\n    if x:\n\n        y\n</pre>b", "a\ndef f():\n    if x:\n\n        y\nb"),
        ("<pre><code>  a\n\tb</code></pre>", "  a\n\tb"),
        ("<header>a</header><footer>b</footer><figcaption>c</figcaption><option>d<option>e", "a\nb\nc\nd\ne"),
        ("one\n  line of <i>a\nblock</i>", "one line of a block"),
        ("<p title='a > b' data-x=\"</p>\">one</p><p title=it's>two", "one\ntwo"),
        ("a<!-- <p>x</p> --> b<!>c<?php x ?>d</ 1>e", "a bcde"),
        ("a < b, a <3, AT&T &lt;p&gt; &copy &#65;&#x42;&#xd800;", "a < b, a <3, AT&T <p> \u00a9 AB\ufffd"),
        ("<script>'<p>'</scripts></script >a<SCRIPT>b</Script>c<noscript><img></noscript>d", "acd"),
        ("<title>a <b> c</title>d", "a <b> c\nd"),
        ("<template>a<template>b</template>c</template>d", "d"),
        ("a<script>for ever", "a"),
        ("a<p class='never", "a"),
        ("a<!-- never", "a"),
        ("&#" + "1" * 5000 + ";a", "\ufffda"),
    ],
)
def test_html_keeps_apart_what_a_reader_sees_apart(page: str, text: str) -> None:
    assert html_text(page) == text


@pytest.mark.parametrize(
    "piece",
    [
        "<", "<a ", "<a b='", "<a b=", "<a =", "<!--", "<!", "</", "</a ", "<?", "&", "&#", "<script>", "<script></", "<pre>",
        "<td>", "<title>", "<textarea>", "<template>", "<![CDATA[", "<a/", "<a\t", "=", "'", "<a b", " ", "\n", "<p>a", "</p>",
    ],
)  # fmt: skip
def test_damaged_html_takes_no_longer_than_good_html(piece: str) -> None:
    """The standard library's parser needs 16 s for 20 kB of ``<a <a <a`` and 280 s for 80 kB: here it would not come back."""
    assert isinstance(html_text("<a" + piece * (500_000 // len(piece))), str)


def test_docstrings_become_a_page_and_share_the_group_of_their_code(tmp_path: Path, read_all) -> None:
    (tmp_path / "m.py").write_text('"""About m."""\n\n\ndef f(a, b=1):\n    """Add."""\n    return a + b\n')
    (page,) = read_all(reader="docstrings", family="lib")
    (code,) = read_all(family="lib")
    assert page.text == "m\n\nAbout m.\n\nm.f(a, b=1)\n\nAdd.\n"
    assert (page.modality, code.modality) == ("text", "code")
    assert page.group == code.group


def test_a_docstring_that_no_file_can_hold_and_a_deep_signature_cost_no_page(tmp_path: Path, read_all) -> None:
    deep = "-" * 900 + "1"
    (tmp_path / "m.py").write_text(f'"""Half \\ud800 a pair."""\n\n\ndef f(a={deep}):\n    """Deep."""\n    return a\n')
    (page,) = read_all(reader="docstrings")
    assert page.text == "m\n\nHalf \ufffd a pair.\n\nm.f(...)\n\nDeep.\n" and page.n_bytes > 0


def test_code_whose_tree_would_fill_the_memory_is_not_parsed(document) -> None:
    many = "".join(f"v{n} = [{n}, {n * 7}]\n" for n in range(120_000))
    dropped = check(document(many, "code", origin="a.py"))
    assert isinstance(dropped, Skipped) and dropped.reason == "too long to parse"
    assert not isinstance(check(document(many, "code", origin="a.rs")), Skipped)
