"""Shards: what is written comes back, and a corpus that is not whole is refused in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shoal.data import shards
from shoal.data.pack import Row
from shoal.data.shards import INDEX, Index, Rows, ShardWriter, open_index, write_index
from shoal.errors import DataError
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import write_aside

T, V = 16, 48
LENGTHS = np.arange(300) % 5


def rows(count: int) -> list[Row]:
    draw = np.random.default_rng(3)
    made = []
    for number in range(count):
        tokens = draw.integers(0, 300, T, dtype=np.int32)
        patches = draw.integers(0, 256, (number % 3, V), dtype=np.uint8) if number % 3 else None
        made.append(Row(tokens, np.full(T, number % 4, dtype=np.int16), patches, [number] * 4, {"a": T - 4, "b": 4}))
    return made


def corpus(directory: Path, count: int = 40, shard_bytes: int = 1000) -> tuple[Index, list[Row]]:
    made = rows(count)
    licenses = {"a": "MIT", "b": "CC0"}
    writer = ShardWriter(directory, "train", "image", LENGTHS, licenses, part=2, shard_bytes=shard_bytes)
    for row in made:
        writer.add(row)
    writer.close()
    Tokenizer.bytes_only().save(directory / shards.TOKENIZER)
    index = Index(
        length=T, vocab=300, patch=4, image_size=8, tokenizer_sha256="", seed=0, mix={"image": 1.0}, request={"q": 1},
        documents={"train": {"image": 5}}, drops={}, shards=tuple(writer.shards),
    )  # fmt: skip
    write_index(directory, index)
    return index, made


def test_rows_come_back_as_they_were_across_files(tmp_path: Path) -> None:
    index, made = corpus(tmp_path)
    read = Rows(tmp_path, open_index(tmp_path, length=T), "train", "image")
    assert len(index.shards) > 3 and len(read) == len(made)
    for (tokens, docs, patches), row in zip(read, made, strict=True):
        assert (tokens == row.tokens).all() and (docs == row.docs).all()
        assert (patches == (row.patches if row.patches is not None else np.zeros((0, V)))).all()
    assert [read.groups(place) for place in range(len(made))] == [row.groups for row in made]
    with pytest.raises(IndexError):
        read[len(made)]


def test_the_index_says_what_the_files_hold(tmp_path: Path) -> None:
    index, made = corpus(tmp_path)
    assert open_index(tmp_path) == index
    assert index.total("tokens", "train", "image") == len(made) * T
    assert index.total("text_bytes", "train", "image") == sum(int(LENGTHS[row.tokens].sum()) for row in made)
    first = index.shards[0]
    assert first.file == "train-image-00002-000.arrow" and first.licenses == ("CC0", "MIT")
    assert first.sha256 == hashlib.sha256((tmp_path / first.file).read_bytes()).hexdigest()


def test_a_split_or_modality_that_is_not_there_is_empty(tmp_path: Path) -> None:
    index, _ = corpus(tmp_path)
    assert len(Rows(tmp_path, index, "heldout", "image")) == len(Rows(tmp_path, index, "train", "text")) == 0


def test_a_folder_without_an_index_is_not_a_corpus(tmp_path: Path) -> None:
    corpus(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match="no prepared corpus"):
        open_index(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "remove", "grow"])
def test_a_damaged_shard_is_found_on_opening(tmp_path: Path, damage: str) -> None:
    index, _ = corpus(tmp_path)
    path = tmp_path / index.shards[1].file
    if damage == "remove":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-9] if damage == "truncate" else data + b"x")
    with pytest.raises(DataError, match=path.name):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v | {"schema": 99}, "schema"),
        (lambda v: v | {"colour": "red"}, "not an index of ours"),
        (lambda v: {k: x for k, x in v.items() if k != "mix"}, "not an index of ours"),
        (lambda v: [v], "not an index of ours"),
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, change, said: str) -> None:
    corpus(tmp_path)
    path = tmp_path / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=said):
        open_index(tmp_path)


def test_a_corpus_of_another_row_length_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path)
    with pytest.raises(DataError, match="row length: got 16; allowed: 32"):
        open_index(tmp_path, length=32)


def test_clear_removes_our_leftovers_alone_and_no_finished_corpus(tmp_path: Path) -> None:
    index, _ = corpus(tmp_path)
    with pytest.raises(DataError, match="finished corpus"):
        shards.clear(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "mine.arrow").touch()
    (tmp_path / ".train-text-00000-000.arrow.tmp").touch()
    shards.clear(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.arrow", "tokenizer.json"]
    assert index.shards


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_aside(tmp_path / "x.json", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_several_batches_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer holds a batch, and a file is as long as it may be; few are open at once."""
    monkeypatch.setattr(shards, "BATCH_BYTES", 300)
    monkeypatch.setattr(shards, "OPENED", 1)
    index, made = corpus(tmp_path, shard_bytes=2000)
    assert 1 < len(index.shards) < 8
    files = [pa.ipc.open_file(str(tmp_path / shard.file)) for shard in index.shards]
    assert all(file.num_record_batches > 3 for file in files[:-1])
    read = Rows(tmp_path, index, "train", "image")
    for place in [*range(len(made)), *reversed(range(len(made)))]:
        tokens, docs, patches = read[place]
        assert (tokens == made[place].tokens).all() and (docs == made[place].docs).all()
        assert (patches == (made[place].patches if made[place].patches is not None else np.zeros((0, V)))).all()
        assert read.groups(place) == made[place].groups
    assert read._batches.cache_info().currsize == 1


def test_of_many_shards_one_that_is_damaged_is_found_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "STATED", 1)
    index, made = corpus(tmp_path)
    path = tmp_path / index.shards[-1].file
    path.write_bytes(path.read_bytes()[:-9])
    read = Rows(tmp_path, open_index(tmp_path), "train", "image")
    assert (read[0][0] == made[0].tokens).all()
    with pytest.raises(DataError, match=path.name):
        read[len(made) - 1]


def test_a_shard_that_says_that_a_row_goes_on_beyond_its_end_is_refused(tmp_path: Path) -> None:
    """What stands there was taken for the row's, or the process was killed by the system, which says nothing."""
    index, _ = corpus(tmp_path, count=3, shard_bytes=10**6)
    (shard,) = index.shards
    path = tmp_path / shard.file
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        patches = batch.column("patches")
        offsets = np.frombuffer(patches.buffers()[1], np.int64)[: len(batch) + 1].copy()
        assert offsets[1] < offsets[2]
        offsets[2] = 2**40
        wrong = pa.Array.from_buffers(patches.type, len(batch), [None, pa.py_buffer(offsets), patches.buffers()[2]])
        columns = {name: wrong if name == "patches" else batch.column(name) for name in batch.schema.names}
        made = pa.record_batch(columns, batch.schema)
        with pa.OSFile(str(tmp_path / "other"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(made)
    (tmp_path / "other").replace(path)
    write_index(tmp_path, dataclasses.replace(index, shards=(dataclasses.replace(shard, size=path.stat().st_size),)))
    with pytest.raises(DataError, match=f"shard .*{shard.file} cannot be read") as caught:
        Rows(tmp_path, open_index(tmp_path), "train", "image")[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"rows": 0}, {"rows": -3}, {"size": -1}, {"size": 2**62}])
def test_numbers_of_a_shard_that_none_can_have_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    index, _ = corpus(tmp_path)
    first, *others = index.shards
    write_index(tmp_path, dataclasses.replace(index, shards=(dataclasses.replace(first, **change), *others)))
    with pytest.raises(DataError, match=f"shard {first.file}: got '.* rows, .* bytes'"):
        open_index(tmp_path)
