"""Bad input, all of `tests/data/bad`: each file is a counted, named skip, and no good document is lost beside it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from shoal.config import ModelConfig
from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.encode import encode
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.sources.files import list_files
from shoal.data.sources.read import read
from shoal.inputs.tokenizer import Tokenizer
from tests.data.bad.make import GOOD, LONG, make, odd_names

MEMORY = LONG // 2  # bytes, while files of a line of `LONG` are read


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "0-before.txt").write_text("before " + GOOD)
    (folder / "zz-after.txt").write_text("after " + GOOD)
    return folder, make(folder)


def test_each_bad_file_is_one_named_skip_and_good_documents_are_kept(
    bad: tuple[Path, dict[str, str]], config: ModelConfig
) -> None:
    folder, reasons = bad
    pipeline, skipped, kept = Pipeline(Operators()), {}, []
    tokenizer = Tokenizer.bytes_only()
    for file in list_files(SourceSpec("s", str(folder), exclude=("line.*",))):  # those are the next test's
        for item in read(file):
            found = pipeline(item) if isinstance(item, Document) else item
            if isinstance(found, Document) and found.image:
                found = next(r if isinstance(r, Skipped) else found for r in encode([found], tokenizer, config))
            if isinstance(found, Skipped):
                skipped.setdefault(found.origin.partition("#")[0], set()).add(found.reason)
            else:
                kept.append(found.origin)
    assert skipped == {name: {reason} for name, reason in reasons.items() if not name.startswith("line.")}
    assert {"0-before.txt", "zz-after.txt", "rows.jsonl#1", "torn.tar#a.txt"} <= set(kept)
    assert sum(name.startswith("cut.jsonl.zst") for name in kept) > 1000  # what came before the cut


@pytest.mark.drill
@pytest.mark.parametrize("name", ["line.txt", "line.jsonl"])
def test_a_line_of_256_mebibytes_is_never_held(bad: tuple[Path, dict[str, str]], name: str) -> None:
    (file,) = list_files(SourceSpec("s", str(bad[0] / name)))
    tracemalloc.start()
    found = list(read(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    skipped, kept = found
    assert isinstance(skipped, Skipped) and skipped.reason == bad[1][name]
    assert isinstance(kept, Document) and kept.text.startswith("after") and peak < MEMORY


def test_names_that_are_hard_to_say_are_read_and_shown_on_one_line(tmp_path: Path) -> None:
    shown = odd_names(tmp_path)
    found = [item for file in list_files(SourceSpec("s", str(tmp_path))) for item in read(file)]
    assert sorted(item.origin for item in found if isinstance(item, Document)) == sorted(shown)
    assert len({item.id for item in found}) == 3 and all("\n" not in item.id for item in found)


def test_a_reader_that_fails_unforeseen_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> str:
        raise AssertionError("unforeseen")

    monkeypatch.setattr("shoal.data.sources.read.html_text", fail)
    (tmp_path / "a.html").write_text("<p>" + GOOD)
    (tmp_path / "b.txt").write_text(GOOD)
    first, second = (item for file in list_files(SourceSpec("s", str(tmp_path))) for item in read(file))
    assert isinstance(first, Skipped) and first.reason == "reader failed: AssertionError"
    assert isinstance(second, Document)
