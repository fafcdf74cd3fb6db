"""What preparing takes, on paper, against what is made: files and tasks of a corpus to the one, memory within a fifth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import presets
from shoal.data import needs, parts, tables
from shoal.data.documents import SourceSpec
from shoal.data.needs import Work
from shoal.data.pack import Row
from shoal.data.parts import split_files
from shoal.data.shards import INDEX, Shard, ShardWriter, open_index
from shoal.data.sources.files import Entry, File, Local, list_files
from shoal.on_ray.corpus_tasks import TASKS_OF_BANDS
from shoal.on_ray.prepare import WORK, prepare

SPEC = SourceSpec("web", "s3://ocean/raw")


def files(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> list[File]:
    """The listing of a source of so many files of `size` bytes, as a store gives it."""

    class Bucket(Local):
        def entries(self, spec: SourceSpec) -> list[Entry]:
            return [
                Entry(f"ocean/raw/{number:014}.jsonl", f"{number:014}.jsonl", size, 10**18 + number)
                for number in range(count)
            ]

    monkeypatch.setattr("shoal.data.sources.files.store_of", lambda spec, s3: Bucket())
    return list_files(SPEC)


@pytest.mark.parametrize(
    ("size", "file"),
    [
        (size, file)
        for size in (10**7, 10**9, 10**12, 10**13)
        for file in (10**4, 10**5, 10**6, 2 * 10**7, 10**8, 3 * 10**8, 10**9, 10**11)
        if size / file <= 20_000  # files, of which more take seconds
    ],
)
def test_parts_are_as_many_as_files_are_split_into(size: int, file: int) -> None:
    count = max(1, round(size / file))
    some = [File(f"{n}.jsonl", f"{n}.jsonl", size // count, "", SPEC, Local()) for n in range(count)]
    plan, work = split_files(some), Work.of(size, file, 0)
    assert (work.files, work.pieces) == (count, sum(map(len, plan)))
    assert work.parts == pytest.approx(len(plan), rel=0.02)


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_corpus_is_made_by_as_many_tasks_and_files_as_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    """Of 60 texts, with spans of 25 documents; the tasks run one after the other here, without a Ray."""
    most = 2 if sampled else 64
    monkeypatch.setattr(parts, "SAMPLED_WHOLE", most)
    monkeypatch.setattr(needs, "SAMPLED_WHOLE", most)
    monkeypatch.setattr(tables, "SPAN_DOCUMENTS", 25)
    monkeypatch.setattr(needs, "SPAN_DOCUMENTS", 25)
    asked, there = list[str](), set[str]()

    def each(task: Any, jobs: Any, sizes: Any, what: str, on_progress: Any) -> Iterator[Any]:
        for job in jobs:
            asked.append(what)
            yield task(*job)
        there.update(path.name for path in (tmp_path / "out" / WORK).iterdir())

    monkeypatch.setattr("shoal.on_ray.prepare.each", each)
    draws = random.Random(5)
    (tmp_path / "raw").mkdir()
    for number in range(60):
        words = " ".join(f"word{draws.randrange(100, 999)}" for _ in range(400))
        (tmp_path / "raw" / f"{number:02}.txt").write_text(words)
    sources = [SourceSpec("raw", str(tmp_path / "raw"))]
    prepare(tmp_path / "out", sources=sources, mix={"text": 1.0}, preset=presets.get("test"), seed=0)
    work = Work.of(60 * 3199, 3199, 60)
    assert len(asked) == work.tasks(TASKS_OF_BANDS), Counter(asked)
    assert len(there - {"lock"}) == work.meanwhile(TASKS_OF_BANDS)
    index = open_index(tmp_path / "out")
    trained = [shard for shard in index.shards if shard.split == "train"]
    row = 6 * index.length
    assert len(trained) == work.parts, "and with what is held out of each, twice as many"
    assert work.shards(row * sum(shard.rows for shard in index.shards), row) == 2 * work.parts
    made = {path.name for path in (tmp_path / "out").iterdir()} - {shard.file for shard in index.shards}
    assert made <= {INDEX, "tokenizer.json", "report.json", "report.html", "named.json"}


@pytest.mark.parametrize("rows", [40, 500, 2000])
def test_rows_fill_files_as_is_said(tmp_path: Path, rows: int) -> None:
    """Rows of 64 tokens into files of about 20,000 bytes."""
    length, most = 64, 20_000
    work = Work(1, 1, 1, 1)
    for split, share in (("train", 0.95), ("heldout", 0.05)):
        writer = ShardWriter(tmp_path, split, "text", np.ones(300, np.int64), {"s": ""}, shard_bytes=most)
        for _ in range(round(rows * share)):
            tokens, docs = np.ones(length, np.int32), np.zeros(length, np.int16)
            writer.add(Row(tokens, docs, None, [1], {"s": length}))
        writer.close()
    assert work.shards(6 * length * rows, 6 * length, most) == len(list(tmp_path.glob("*.arrow")))


def shard(part: int, number: int) -> Shard:
    tokens = 44_000_000 + part
    name = f"train-text-{part:05}-{number:03}.arrow"
    return Shard(
        name, "train", "text", 2700 + part, tokens, 4 * tokens, 6 * tokens, f"{part:064x}", {"web": tokens}, ("MIT",)
    )
