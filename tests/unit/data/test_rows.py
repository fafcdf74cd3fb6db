"""Values of users, as rows hold them: what is given, what is not, and that one bad value costs its own row."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.parts import documents, read_part
from shoal.data.sources import rows
from shoal.data.sources.files import list_files
from shoal.data.sources.read import read
from shoal.errors import ConfigError

PROSE = "The sea was calm, and the boats lay still; the gulls alone were heard that morning.\n"


def write(folder: Path, *found: dict[str, object]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def split(found: list[Document | Skipped]) -> tuple[list[Document], list[tuple[str, str]]]:
    """The documents, and origin and reason of what was skipped."""
    skipped = [(item.origin, item.reason) for item in found if isinstance(item, Skipped)]
    return [item for item in found if isinstance(item, Document)], skipped


def strings(count: int, bad: int) -> pa.Array:
    """Strings of which one is not UTF-8."""
    return pa.array([b"\xff\xfe" if n == bad else b"row %d" % n for n in range(count)], pa.binary()).view(pa.string())


COLUMNS = {
    "a plain column": lambda bad: {"text": bad},
    "a nested field": lambda bad: {
        "text": pa.array([f"row {n}" for n in range(len(bad))]),
        "image": pa.StructArray.from_arrays([bad], ["path"]),
    },
    "a list": lambda bad: {
        "question": pa.ListArray.from_arrays(pa.array(range(len(bad) + 1), pa.int32()), bad),
        "answer": pa.array([["yes"]] * len(bad)),
    },
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_a_string_that_is_not_utf8_costs_one_row_of_a_parquet_file(tmp_path: Path, read_all, png, column: str) -> None:
    for n in range(200):
        (tmp_path / f"row {n}").write_bytes(png())
    pq.write_table(pa.table(COLUMNS[column](strings(200, 70))), tmp_path / "t.parquet")
    (file,) = (file for file in list_files(SourceSpec("s", str(tmp_path))) if file.name == "t.parquet")
    found, skipped = split(list(read(file)))
    assert skipped == [("t.parquet#71", "not UTF-8")]
    assert [d.origin for d in found] == [f"t.parquet#{n}" for n in range(1, 201) if n != 71]


def test_a_column_that_was_a_dictionary_loses_one_row_too(tmp_path: Path, read_all) -> None:
    names = pa.array([f"row {n:03}" for n in range(200)]).dictionary_encode()
    pq.write_table(pa.table({"text": names}), tmp_path / "t.parquet", compression="none")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole.replace(b"row 070", b"row \xff\xff\xff"))
    found, skipped = split(read_all())
    assert skipped == [("t.parquet#71", "not UTF-8")] and len(found) == 199


def test_a_broken_row_group_leaves_the_others(tmp_path: Path, read_all) -> None:
    texts = [os.urandom(60).hex() for _ in range(400)]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, use_dictionary=False, compression="zstd")
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[at + 200 : at + 1200] = bytes(1000)
    path.write_bytes(data)
    found, skipped = split(read_all())
    assert skipped == [("t.parquet#101-", "broken Parquet")]
    assert [d.origin for d in found] == [f"t.parquet#{n}" for n in (*range(1, 101), *range(201, 401))]


def test_a_date_that_python_cannot_hold_costs_one_row(tmp_path: Path, read_all) -> None:
    ids = pa.array([0, 2**61, 1], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["one", "two", "three"], "id": ids}), tmp_path / "t.parquet")
    found, skipped = split(read_all())
    assert [d.text for d in found] == ["one", "three"] and "row cannot be read" in skipped[0][1]


def test_a_row_of_a_parquet_file_is_as_long_as_a_line_may_be(tmp_path: Path, read_all, monkeypatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW", 1000)
    pq.write_table(pa.table({"text": ["one", "x" * 2000, *["three"] * 20]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["y" * 5000]}), tmp_path / "b.parquet")
    found, skipped = split(read_all())
    assert [d.text for d in found] == ["one", *["three"] * 20]
    assert skipped == [("a.parquet#2", rows.TOO_LONG), ("b.parquet#1-", rows.TOO_LONG)]


@pytest.mark.parametrize("group", [0, False, "g", 1.5])
def test_rows_of_one_group_stay_together_whatever_it_is_called(tmp_path: Path, read_all, group: object) -> None:
    write(tmp_path, {"text": "one", "group": group}, {"text": "two", "group": group}, {"text": "three"})
    assert [d.group for d in read_all()] == [f"s/{group}", f"s/{group}", "s/rows.jsonl#3"]


@pytest.mark.parametrize("nothing", [None, "", "  ", float("nan")])
def test_what_is_not_given_is_as_if_it_were_not_there(tmp_path: Path, read_all, nothing: object) -> None:
    names = ("content", "image", "question", "answer", "modality", "license", "id", "group")
    write(tmp_path, dict.fromkeys(names, nothing) | {"text": "one"}, dict.fromkeys(names, nothing) | {"caption": "two"})
    assert read_all(license="MIT") == read_all(license="MIT")
    found, skipped = split(read_all(license="MIT"))
    assert [(d.id, d.group, d.license, d.modality, d.text) for d in found] == [
        (f"s/rows.jsonl#{n}", f"s/rows.jsonl#{n}", "MIT", "text", text) for n, text in ((1, "one"), (2, "two"))
    ]
    assert not skipped


def test_a_row_is_called_by_its_id_also_when_that_is_0(tmp_path: Path, read_all) -> None:
    write(tmp_path, *({"text": f"row {n}", "id": n} for n in range(3)))
    assert [d.origin for d in read_all()] == ["rows.jsonl#0", "rows.jsonl#1", "rows.jsonl#2"]


@pytest.mark.parametrize(
    ("answer", "learned"), [(0, "0"), (False, "false"), (True, "true"), (0.0, "0.0"), ("no", "no")]
)
def test_an_answer_is_learned_as_it_is_written(tmp_path: Path, read_all, answer: object, learned: str) -> None:
    write(tmp_path, {"question": "how many?", "answer": answer}, {"question": ["how many?"], "answer": [answer]})
    assert [d.questions for d in read_all()] == [(("how many?", learned),)] * 2


def test_a_question_without_an_answer_is_counted_and_never_learned(tmp_path: Path, read_all, data_url: str) -> None:
    write(
        tmp_path,
        {"question": ["a?", "b?", None, "d?"], "answer": ["1", None, "3", ""]},
        {"question": "a?", "answer": None},
        {"question": "a?", "image": data_url},
        {"question": "a?", "text": "a text"},
    )
    found, skipped = split(read_all())
    assert [d.questions for d in found] == [(("a?", "1"),), (), ()] and "None" not in found[0].text
    assert [origin for origin, _ in skipped] == [f"rows.jsonl#{n}" for n in (1, 1, 1, 2, 3, 4)]
    assert {reason for _, reason in skipped} == {"question without an answer"}


def test_what_is_no_text_is_not_learned_as_python_shows_it(tmp_path: Path, read_all) -> None:
    write(tmp_path, {"question": "a?", "answer": {"text": "b"}}, {"question": ["a?"], "answer": [["b"]]})
    pq.write_table(pa.table({"question": ["a?"], "answer": [b"b"]}), tmp_path / "t.parquet")
    found, skipped = split(read_all())
    assert not found and {reason for _, reason in skipped} == {"answer is neither a string nor a number"}


def test_several_licences_are_one_text(tmp_path: Path, read_all) -> None:
    write(tmp_path, {"text": "one", "license": ["MIT", None, "CC0-1.0", " "]})
    assert read_all()[0].license == "MIT, CC0-1.0"


def test_a_parquet_file_without_rows_is_said_to_be_empty(tmp_path: Path, read_all) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pq.ParquetWriter(tmp_path / "u.parquet", pa.schema({"text": pa.string()})):
        pass
    assert split(read_all())[1] == [("t.parquet", "empty"), ("u.parquet", "empty")]


@pytest.mark.parametrize("name", ["text", "question", "answer", "license", "group", "image"])
def test_half_of_a_pair_costs_its_row_wherever_it_stands(tmp_path: Path, name: str) -> None:
    good = (
        {"text": PROSE} if name == "text" else {"question": "What lay still?", "answer": "The boats, all morning long."}
    )
    write(tmp_path, good | {name: "half \ud800 and more of it than a text must have"}, good)
    files = list_files(SourceSpec("s", str(tmp_path)))
    found = read_part(files, tmp_path / "part.arrow")
    assert len(list(documents(tmp_path / "part.arrow"))) == 1
    assert found.drops["read"].total() == 1


def test_half_of_a_pair_in_an_id_is_shown_escaped(tmp_path: Path, read_all) -> None:
    write(tmp_path, {"text": "fine", "id": "half \ud800"})
    assert read_all()[0].id == "s/rows.jsonl#half \\ud800"


def test_half_of_a_pair_in_a_docstring_reaches_no_document(tmp_path: Path, read_all) -> None:
    (tmp_path / "m.py").write_text('"""About \\ud800."""\n')
    (page,) = read_all(reader="docstrings")
    assert page.text.encode().startswith(b"m\n\nAbout")


def test_half_of_a_pair_in_what_a_source_is_called_is_refused() -> None:
    for fields in ({"name": "a\udcff"}, {"license": "\ud800"}, {"family": "\ud800"}):
        with pytest.raises(ConfigError, match="UTF-8"):
            SourceSpec(**({"name": "a", "uri": "b"} | fields))
    with pytest.raises(ConfigError, match="a name and a uri"):
        SourceSpec("a", "")


@pytest.mark.parametrize("image", ["a\0b.png", "x" * 300 + ".png", "loop/a.png", ".", "half \ud800.png"])
def test_an_image_path_that_leads_nowhere_costs_its_row(tmp_path: Path, read_all, image: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write(tmp_path, {"text": "one", "image": image}, {"text": "two"})
    found, skipped = split(read_all(exclude=("loop",)))
    assert [d.text for d in found] == ["two"]
    assert [origin for origin, _ in skipped] == ["rows.jsonl#1"] and "failed" not in skipped[0][1]


def test_what_no_parser_foresaw_costs_one_row(tmp_path: Path, read_all, monkeypatch) -> None:
    def fail(url: str) -> bytes:
        raise AssertionError(url)

    monkeypatch.setattr("shoal.data.sources.rows.media.from_data_url", fail)
    write(tmp_path, {"text": "one"}, {"image": "data:,"}, {"text": "three"})
    found, skipped = split(read_all())
    assert [d.text for d in found] == ["one", "three"]
    assert skipped == [("rows.jsonl#2", "reader failed: AssertionError")]


def test_deep_json_costs_one_row(tmp_path: Path, read_all) -> None:
    lines = ["[" * 10**6, '{"a":' * 10**5, '{"text": "fine"}', '{"text": "x", "id": ' + "9" * 5000 + "}"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found, skipped = split(read_all())
    assert [d.text for d in found] == ["fine"] and {reason for _, reason in skipped} == {"broken JSON"}


def test_a_part_knows_what_its_rows_name(tmp_path: Path, png) -> None:
    """So that an edited image is noticed though no listing has it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    write(tmp_path, {"image": "images/a.png"}, {"image": "images/gone.png"})
    files = list_files(SourceSpec("s", str(tmp_path), exclude=("images",)))
    found = read_part(files, tmp_path / ".part.arrow")
    assert found.holds(files)
    (tmp_path / "images" / "a.png").write_bytes(png("blue", (25, 24)))
    assert not found.holds(files)
    found = read_part(files, tmp_path / ".part.arrow")
    assert found.holds(files)
    (tmp_path / "images" / "gone.png").write_bytes(png())  # it was missing
    assert not found.holds(files)
