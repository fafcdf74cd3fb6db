"""What preparing takes, on paper, against what is made: files and tasks of a corpus to the one, memory within a fifth."""

from __future__ import annotations

import pickle
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import presets
from shoal.data import needs, order, parts, tables
from shoal.data.documents import SourceSpec
from shoal.data.kept import digest_of_list
from shoal.data.needs import Work
from shoal.data.order import RowOrder
from shoal.data.pack import Row
from shoal.data.parts import Packed, split_files
from shoal.data.shards import INDEX, Index, Shard, ShardWriter, open_index, read_index, write_index
from shoal.data.sources.files import Entry, File, Local, list_files
from shoal.on_ray.corpus_tasks import TASKS_OF_BANDS
from shoal.on_ray.prepare import WORK, _stamps, prepare

FIFTH = 0.2
SPEC = SourceSpec("web", "s3://ocean/raw")


def taken(make: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that what is made holds, the most that there were meanwhile, and it."""
    tracemalloc.start()
    try:
        made = make()
        return *tracemalloc.get_traced_memory(), made
    finally:
        tracemalloc.stop()


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


def test_10_tb_are_few_parts_of_much_and_not_many_of_32_mib() -> None:
    assert [Work.of(10**13, file, 2 * 10**9).parts for file in (10**9, 32 * 10**6, 10**6)] == [10_000, 8224, 8197]


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


def test_what_is_said_of_source_files_takes_no_memory_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was 1,800 bytes of each, 18 GB of ten million, before the index was written."""

    def most(count: int) -> int:
        some = files(count, 10**7, monkeypatch)
        return taken(lambda: digest_of_list(_stamps(some)))[1]

    assert most(8192) < 1.1 * most(2048) < 4e6


def shard(part: int, number: int) -> Shard:
    tokens = 44_000_000 + part
    name = f"train-text-{part:05}-{number:03}.arrow"
    return Shard(
        name, "train", "text", 2700 + part, tokens, 4 * tokens, 6 * tokens, f"{part:064x}", {"web": tokens}, ("MIT",)
    )


def test_memory_of_shards_and_of_writing_their_index_is_as_is_said(tmp_path: Path) -> None:
    """Of 100 parts of 8 shards, as they come from tasks."""
    made = [pickle.dumps(Packed(shards=[shard(part, number) for number in range(8)])) for part in range(100)]
    packed = Packed()

    def gather() -> None:
        for part in made:
            packed.add(pickle.loads(part))

    held, _, _ = taken(gather)
    assert held / 800 == pytest.approx(needs.SHARD, rel=FIFTH)
    index = Index(16384, 65536, 16, 256, "0" * 64, 0, {"text": 1.0}, {}, {}, {}, tuple(packed.shards))
    _, most, _ = taken(lambda: write_index(tmp_path, index))
    assert most / 800 == pytest.approx(needs.WRITTEN, rel=FIFTH)


@pytest.mark.drill
def test_memory_of_a_rank_is_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of 800 shards, and the order of two million rows, of which nine spans are drawn one after the other. Python
    does not count that numpy's sort has room for half of a span's numbers besides."""
    monkeypatch.setattr(order, "SPAN", 2**17)
    shards_ = tuple(shard(part, number) for part in range(100) for number in range(8))
    write_index(tmp_path, Index(16384, 65536, 16, 256, "0" * 64, 0, {"text": 1.0}, {}, {}, {}, shards_))
    held, most, _ = taken(lambda: read_index(tmp_path / INDEX))
    said = needs.of_a_rank(2**21, 800)
    assert most == pytest.approx(said["index"], rel=FIFTH) and held == pytest.approx(2 / 3 * said["index"], rel=FIFTH)
    rows = RowOrder({"text": 1.0}, {"text": 2**21}, seed=5)
    _, most, _ = taken(lambda: [rows.at(position) for position in range(2**16, 9 * 2**17, 2**17)])
    assert most + 4 * 2**17 == pytest.approx(said["order"], rel=FIFTH)
