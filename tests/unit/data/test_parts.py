"""A corpus in parts: one decision over all of them, held-out groups that never meet the training side, counts that add up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.data import parts
from shoal.data.documents import SourceSpec
from shoal.data.parts import BATCH, BATCH_SIZE, HELDOUT, Identity, batched, choose, split_files
from shoal.data.shards import TOKENIZER
from shoal.data.sources.files import list_files
from shoal.inputs.tokenizer import Tokenizer

GROUPS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=60)  # content, group


def identities(pairs: list[tuple[int, int]], modality: str = "text", heldout: bool | None = None) -> list[Identity]:
    return [Identity(content.to_bytes(2), f"g{group}", modality, heldout) for content, group in pairs]


@given(st.lists(st.integers(0, 2 * BATCH_SIZE), max_size=40), st.integers(0, 3 * BATCH))
@settings(deadline=None)
def test_batches_hold_few_documents_and_little_of_them(sizes: list[int], empty: int) -> None:
    sizes = sizes + [0] * empty
    batches = list(batched(sizes, lambda size: size))
    assert [size for batch in batches for size in batch] == sizes
    for batch in batches:
        assert 0 < len(batch) <= BATCH
        assert sum(batch[:-1]) < BATCH_SIZE
    assert all(len(batch) == BATCH or sum(batch) >= BATCH_SIZE for batch in batches[:-1]), "nor are they shorter"


@given(st.lists(GROUPS, min_size=1, max_size=4), st.integers(0, 5))
@settings(deadline=None)
def test_equal_documents_are_kept_once_and_a_group_is_on_one_side(some: list[list[tuple[int, int]]], seed: int) -> None:
    found = [identities(pairs) for pairs in some]
    splits, drops = choose(found, seed)
    duplicates = sum(drops.get("dedup", Counter()).values())
    flat = [(i, s) for part, of in zip(found, splits, strict=True) for i, s in zip(part, of, strict=True)]
    kept = [(i, s) for i, s in flat if s]
    assert len({i.fingerprint for i, _ in kept}) == len(kept) == len(flat) - duplicates
    assert {i.fingerprint for i, _ in kept} == {i.fingerprint for i, _ in flat}
    sides: dict[str, set[str]] = {}
    for identity, split in kept:
        sides.setdefault(identity.group, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    if len(sides) > 1:
        assert {"heldout"} in sides.values()  # nothing can be evaluated without


def test_about_as_many_groups_are_held_out_as_said_and_the_seed_chooses_them() -> None:
    found = [identities([(n, n) for n in range(4000)])]
    chosen = [{i for i, split in enumerate(choose(found, seed)[0][0]) if split == "heldout"} for seed in (0, 1)]
    assert all(abs(len(some) / 4000 - HELDOUT) < 0.02 for some in chosen)
    assert chosen[0] != chosen[1]


def test_a_source_that_says_its_side_has_it() -> None:
    (train, test, drawn), _ = choose(
        [identities([(1, 1), (2, 2)], "image", False), identities([(3, 3)], "image", True), identities([(4, 4)])], 0
    )
    assert (train, test, drawn) == (["train", "train"], ["heldout"], ["train"])


@pytest.mark.parametrize("seed", range(8))
def test_where_nobody_is_held_out_one_group_is_but_none_whose_source_says_otherwise(seed: int) -> None:
    """And none more where a source says that one of its own is. None of these draws is below the share that is held out."""
    says, free = identities([(n, n) for n in range(1, 9)], "image", False), identities([(9, 9)], "image")
    assert choose([says, free], seed)[0] == [["train"] * 8, ["heldout"]]
    held, free = identities([(1, 1)], "image", True), identities([(n, n) for n in (20, 21, 22)], "image")
    assert choose([held, free], seed)[0] == [["heldout"], ["train"] * 3]
    assert choose([identities([(1, 1)], "image"), identities([(2, 2)], "text")], seed)[0] == [["train"], ["train"]]


def test_parts_hold_every_file_in_order_and_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("word " * (1 + number))
    files = list_files(SourceSpec("s", str(tmp_path)))
    some = split_files(files)
    assert [file for part in some for file in part] == files
    assert 12 <= len(some) <= 20
    assert split_files([]) == []


@pytest.fixture
def raw(tmp_path: Path, png) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(
            f"Tale {number}: the net was heavy, and the crew sang {number} songs.\n" * 2
        )
    (folder / "again.txt").write_text((folder / "0.txt").read_text())
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "picture.png").write_bytes(png())
    (folder / "picture.webp").write_bytes(b"not a picture")
    return folder


def test_a_part_is_cleaned_chosen_and_packed_with_counts_that_add_up(
    raw: Path, tmp_path: Path, config: ModelConfig
) -> None:
    files = list_files(SourceSpec("s", str(raw), "MIT"))
    read = parts.read_part(files, tmp_path / "part")
    found = read.identities
    assert len(found) == 8
    assert read.drops == {"read": Counter({"not UTF-8": 1}), "image": Counter({"image cannot be decoded": 1})}
    assert [d.origin for d in parts.documents(tmp_path / "part")][:2] == ["0.txt", "1.txt"]
    (splits,), drops = choose([found], 0)
    assert drops == {"dedup": Counter({"equal to an earlier one": 1})}
    texts = parts.sample([tmp_path / "part"], [splits])
    heldout = [d.text for d, s in zip(parts.documents(tmp_path / "part"), splits, strict=True) if s == "heldout"]
    assert texts and heldout and not set(texts) & set(heldout)
    Tokenizer.bytes_only().save(tmp_path / TOKENIZER)
    packed = parts.pack_part(tmp_path / "part", splits, tmp_path, config, 7)
    assert packed.drops == {}
    assert sum(packed.documents.values()) == len(found) - 1
    assert sum(shard.tokens for shard in packed.shards) == packed.packing["tokens"] - packed.packing["cut"]
    assert {shard.file[-16:] for shard in packed.shards} == {"-00007-000.arrow"}


def test_the_tokenizers_sample_is_bounded_and_spread_over_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 900)
    paths = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = " ".join(f"word{number}{n} and {n * n}" for n in range(200))
        (folder / "a.txt").write_text(text)
        paths.append(tmp_path / f"part{number}")
        parts.read_part(list_files(SourceSpec("s", str(folder))), paths[-1])
    texts = parts.sample(paths, [["train"]] * 3)
    assert [len(text) for text in texts] == [300, 300, 300]
