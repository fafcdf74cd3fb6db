"""When a corpus counts as made, and when a part does: the tasks run one after the other here, without a Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shoal import presets
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.errors import DataError
from shoal.on_ray.prepare import NAMED, WORK, prepare

PROSE = "Note {}: the crew mended net {} before the tide came in, and slept until the morning.\n"


@pytest.fixture(autouse=True)
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def each(task: Callable[..., Any], jobs: Any, sizes: Any, what: str, on_progress: Any) -> Iterator[Any]:
        for job in jobs:
            yield task(*job)
            on_progress(what, 1, 1)

    monkeypatch.setattr("shoal.on_ray.prepare.each", each)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "images").mkdir(parents=True)
    for n in range(6):
        (folder / f"{n}.md").write_text(PROSE.format(n, n))
    Image.new("RGB", (24, 24), "red").save(folder / "images" / "a.png")
    (folder / "rows.jsonl").write_text('{"image": "images/a.png", "text": "a square"}\n')
    return folder


def ask(raw: Path, **other: Any) -> dict[str, Any]:
    mix = {"text": 0.5, "image": 0.5}
    spec = SourceSpec("raw", str(raw), exclude=("images", "corpus-*"))
    return {"sources": [spec], "mix": mix, "preset": presets.get("test"), "seed": 0} | other


def later(path: Path, data: bytes) -> None:
    """Write a file as if a second had gone by."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_an_edited_corpus_is_another_one_though_files_and_bytes_are_as_many(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prepare(out, **ask(raw))
    assert prepare(out, **ask(raw)) == report and not (out / WORK).exists()
    later(raw / "3.md", PROSE.format(7, 7).encode())
    with pytest.raises(DataError, match="another request: got 'other files'"):
        prepare(out, **ask(raw))


def test_an_edited_image_that_a_row_names_makes_another_corpus(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out, **ask(raw))
    assert list(json.loads((out / NAMED).read_text())["raw"]) == [str(raw / "images" / "a.png")]
    Image.new("RGB", (24, 24), "blue").save(raw / "images" / "b.png")
    later(raw / "images" / "a.png", (raw / "images" / "b.png").read_bytes())
    with pytest.raises(DataError, match="another request: got 'other files that rows name'"):
        prepare(out, **ask(raw))


def test_an_edited_evaluation_set_makes_another_corpus(raw: Path, tmp_path: Path) -> None:
    exam, out = tmp_path / "exam.txt", tmp_path / "out"
    exam.write_text("What did the crew do with the sails of the ship that night?\n")
    operators = Operators(evaluation=(str(exam),))
    prepare(out, **ask(raw, operators=operators))
    later(exam, PROSE.format(3, 3).encode())
    with pytest.raises(DataError, match="another request: got 'other evaluation sets'"):
        prepare(out, **ask(raw, operators=operators))


def stop(what: str, done: int, total: int) -> None:
    if what == "encode and pack":
        raise KeyboardInterrupt


def test_a_run_that_goes_on_reads_an_image_again_that_was_edited(raw: Path, tmp_path: Path) -> None:
    """It is under no part's stamp: no listing has it. Its shard must be made again too."""
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", **ask(raw), on_progress=stop)
    Image.new("RGB", (24, 24), "blue").save(raw / "images" / "b.png")
    later(raw / "images" / "a.png", (raw / "images" / "b.png").read_bytes())
    prepare(tmp_path / "out", **ask(raw))
    prepare(tmp_path / "fresh", **ask(raw))
    for path in (tmp_path / "fresh").glob("*.arrow"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_corpus_inside_its_own_source_is_none_of_it(raw: Path) -> None:
    out = raw / "made"
    with pytest.raises(KeyboardInterrupt):
        prepare(out, **ask(raw), on_progress=stop)
    report = prepare(out, **ask(raw))
    assert prepare(out, **ask(raw)) == report
    assert sum(report["documents"][split]["text"] for split in ("train", "heldout")) == 6
    assert "read" not in report["drops"]
