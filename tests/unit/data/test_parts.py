"""A corpus in parts: files shared out, documents read, sampled and packed, counts that add up."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.data import identities, parts
from shoal.data.chats.recipes import chats_of
from shoal.data.documents import SourceSpec
from shoal.data.operators import near
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.parts import BATCH, BATCH_SIZE, batched, split_files
from shoal.data.shards import TOKENIZER
from shoal.data.sources.files import File, Local, list_files
from shoal.data.tables import Parts
from shoal.errors import DataError
from shoal.inputs.tokenizer import Tokenizer


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


def test_parts_hold_every_file_in_order_and_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("word " * (1 + number))
    files = list_files(SourceSpec("s", str(tmp_path)))
    some = split_files(files)
    assert [file for part in some for file in part] == files
    assert 12 <= len(some) <= 20
    assert split_files([]) == []
    # each as many as there is room for: the next file would not fit
    most = sum(file.size for file in files) // 12 + 1
    sizes = [[file.size for file in part] for part in some]
    assert all(sum(part) <= most for part in sizes)
    assert all(sum(part) + following[0] > most for part, following in pairwise(sizes))


def test_a_part_has_no_more_files_than_a_task_may_take_on_however_small_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "PART_FILES", 4)
    spec = SourceSpec("s", "raw")
    files = [File(f"{n}.txt", f"{n}.txt", 0, "", spec, Local()) for n in range(10)]
    assert [len(part) for part in split_files(files)] == [4, 4, 2]


def test_what_was_found_holds_while_the_files_that_rows_name_are_the_same() -> None:
    stamps = {"a.png": "1", "b.png": "2"}

    class Stamped(Local):
        def stamp(self, path: str) -> str:
            return stamps[path]

    spec = SourceSpec("s", "raw")
    files = [File(f"{n}.jsonl", f"{n}.jsonl", 9, "", spec, Stamped()) for n in range(2)]
    found = parts.Found(named={1: {"a.png": "1", "b.png": "2"}})
    assert found.holds(files) and parts.Found().holds(files)
    stamps["b.png"] = "3"
    assert not found.holds(files)


def test_counts_of_parts_add_up() -> None:
    """Of drops and changes by operator and reason, of documents, packing and lengths each."""
    whole = parts.Packed()
    for times in (1, 2):
        some = parts.Packed(
            shards=[f"shard {times}"], drops={"a": Counter(x=times)}, documents=Counter({("train", "text", "s", "MIT"): times}),
            packing=Counter(tokens=times), lengths=Counter({("text", 3): times}),
        )  # fmt: skip
        whole.add(some)
    whole.dropped({"a": Counter(y=5), "b": Counter(x=1)})
    whole.changed({"a": Counter(y=5)})
    whole.changed({"a": Counter(y=1, x=1)})
    assert whole.shards == ["shard 1", "shard 2"] and whole.packing == Counter(tokens=3)
    assert whole.drops == {"a": Counter(x=3, y=5), "b": Counter(x=1)} and whole.changes == {"a": Counter(y=6, x=1)}
    assert whole.documents == Counter({("train", "text", "s", "MIT"): 3}) and whole.lengths == Counter({("text", 3): 3})


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


def test_near_copies_are_looked_for_among_what_is_kept_and_only_where_they_are_asked_for(
    raw: Path, tmp_path: Path
) -> None:
    """By the row of a document in its part: what could not be read, which lies between, has none."""
    files, some = list_files(SourceSpec("s", str(raw))), Parts(tmp_path, 2)
    for path, asked in zip(some, (True, False), strict=True):
        parts.read_part(files, path, near_copies=asked)
    by_hand = near.Signatures()
    for row, document in enumerate(parts.documents(some[0])):
        by_hand.add(row, document)
    by_hand.write(tmp_path / "by hand")
    there, not_there = (path.with_suffix(near.SIGNATURES) for path in some)
    assert there.read_bytes() == (tmp_path / "by hand").read_bytes() and len(by_hand._rows) > 5
    assert not not_there.exists()


def test_a_part_is_cleaned_chosen_and_packed_with_counts_that_add_up(
    raw: Path, tmp_path: Path, config: ModelConfig
) -> None:
    files, some = list_files(SourceSpec("s", str(raw), "MIT")), Parts(tmp_path, 1)
    read = parts.read_part(files, some[0])
    assert read.documents == 8 and set(read.text_bytes) == {"text", "image"}
    assert read.drops == {"read": Counter({"not UTF-8": 1}), "image": Counter({"image cannot be decoded": 1})}
    assert [d.origin for d in parts.documents(some[0])][:2] == ["0.txt", "1.txt"]
    (splits,), drops = identities.choose(some, Operators(near_dedup=False))
    assert drops == {"dedup": Counter({"equal to an earlier one": 1})}
    texts = parts.sample(some, [splits])
    heldout = [d.text for d, s in zip(parts.documents(some[0]), splits, strict=True) if s == "heldout"]
    assert texts and heldout and not set(texts) & set(heldout)
    Tokenizer.bytes_only().save(tmp_path / TOKENIZER)
    packed = parts.pack_part(some[0], splits, tmp_path, config, 7)
    assert packed.drops == {}
    assert sum(packed.documents.values()) == read.documents - 1
    assert sum(shard.tokens for shard in packed.shards) == packed.packing["tokens"] - packed.packing["cut"]
    assert {shard.file[-16:] for shard in packed.shards} == {"-00007-000.arrow"}


def test_lengths_and_what_is_left_out_are_counted_by_hand(tmp_path: Path, config: ModelConfig) -> None:
    """A byte is a token here, and an end follows each document; of two functions the long one fills a row. What a
    pipeline changed in a part that failed is none of this one's."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, times in enumerate((1, 2, 7, 20)):
        tale = " ".join(f"Net {n} is heavy, and crew {number} of {7 * n + number} gulls sings." for n in range(times))
        (folder / f"{number}.txt").write_text(f"{tale}\n")
    for name, lines in (("short", 1), ("long", 40)):
        body = "".join(f"    {name} += {n}\n" for n in range(lines))
        (folder / f"{name}.py").write_text(f'def {name}({name}):\n    """Add up."""\n{body}    return {name}\n')
    files, some = list_files(SourceSpec("s", str(folder), "MIT")), Parts(tmp_path, 1)
    pipeline = Pipeline(Operators(near_dedup=False))
    pipeline.changes = {"broken": Counter(part=1)}
    read = parts.read_part(files, some[0], pipeline)
    assert (read.documents, read.drops, read.named) == (6, {}, {}) and "broken" not in read.changes
    Tokenizer.bytes_only().save(tmp_path / TOKENIZER)
    packed = parts.pack_part(some[0], ["train"] * 6, tmp_path, dataclasses.replace(config, train_length=256), 0)
    written = list(parts.documents(some[0]))
    chats = Counter(d.origin for d in written for _ in chats_of(d, "train"))
    assert set(chats) == {"long.py", "short.py"} and packed.drops == {"recipe": Counter({"too long": chats["long.py"]})}
    bits = ((d.modality, (len(d.text.encode()) + 1).bit_length()) for d in written)
    assert packed.lengths == Counter(bits)
    assert packed.packing["tokens"] == sum(len(d.text.encode()) + 1 for d in written)
    assert packed.documents == Counter({("train", "text", "s", "MIT"): 4, ("train", "code", "s", "MIT"): 2})


def test_a_picture_that_fills_a_row_is_left_out_and_counted(tmp_path: Path, png, config: ModelConfig) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "picture.png").write_bytes(png())
    some = Parts(tmp_path, 1)
    parts.read_part(list_files(SourceSpec("s", str(tmp_path / "raw"))), some[0])
    Tokenizer.bytes_only().save(tmp_path / TOKENIZER)
    packed = parts.pack_part(some[0], ["train"], tmp_path, dataclasses.replace(config, train_length=14), 0)
    reason = "image does not fit a row"
    first = {"image": {reason: "s/picture.png"}}
    assert packed == parts.Packed(drops={"image": Counter({reason: 1})}, first=first)


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


def test_the_tokenizers_sample_is_bounded_in_bytes_and_cuts_no_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chinese has three bytes a letter: cut by letters, the first part would have given what all may."""
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 400)
    paths, written = [], []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        written.append("".join(chr(0x4E00 + 97 * number + n * n % 5000) for n in range(300)))
        (folder / "a.txt").write_text(written[-1])
        paths.append(tmp_path / f"part{number}")
        parts.read_part(list_files(SourceSpec("s", str(folder))), paths[-1])
    texts = parts.sample(paths, [["train"]] * 3)
    # up to each part 133, 266 and 400 bytes, of which three hold 44, 88 and 133 letters
    assert texts == [text[:letters] for text, letters in zip(written, (44, 44, 45), strict=True)]
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 5)  # a part has room for no letter, then for one
    assert parts.sample(paths, [["train"]] * 3) == [written[1][0]]


def test_the_sample_of_a_large_corpus_is_drawn_by_document_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of each modality, cut where one document is long; none of what is held out; the same in any parts."""
    monkeypatch.setattr(parts, "SAMPLE_TEXT", 90)
    for number in range(400):
        (tmp_path / f"{number:03}.txt").write_text(f"Tale {number}: the net was heavy, said {number * 7} gulls. " * 3)
    files, drawn = list_files(SourceSpec("s", str(tmp_path))), []
    for count in (1, 5):
        work, texts = Parts(tmp_path / f".{count}", count), []
        work.folder.mkdir()
        for number, path in enumerate(work):
            some = files[400 * number // count : 400 * (number + 1) // count]
            splits = ["heldout" if file.name == "007.txt" else "train" for file in some]
            parts.read_part(some, path)
            size = parts.draw_sample(path, splits, {"text": 0.5}, 3, path.with_suffix(".sample"))
            texts += parts.sampled([path.with_suffix(".sample")])
            assert size.total() == sum(map(len, parts.sampled([path.with_suffix(".sample")])))
        drawn.append(texts)
    assert drawn[0] == drawn[1] and 150 < len(drawn[0]) < 250
    assert {len(text) for text in drawn[0]} == {90} and not any(text.startswith("Tale 7:") for text in drawn[0])
    everything = parts.draw_sample(work[0], ["train"] * 80, {"text": 1.0}, 3, tmp_path / ".all")
    assert everything == Counter(text=80 * 90)
    assert not parts.draw_sample(work[0], ["train"] * 80, {"code": 1.0}, 3, tmp_path / ".none")


def test_a_drawn_sample_has_as_many_bytes_in_any_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter of Chinese has three: counted as one it made the sample, and what fitting to it takes, three times as large."""
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 30_000)
    draws = random.Random(3)
    for script, first in (("latin", "a"), ("chinese", "\u4e00")):
        raw, letters = tmp_path / script, [chr(ord(first) + place) for place in range(26)]
        raw.mkdir()
        for number in range(400):
            words = ("".join(draws.choices(letters, k=5)) for _ in range(60 // len(first.encode())))
            (raw / f"{number:03}.txt").write_text(" ".join(words) + "\n", "utf-8")
        path = tmp_path / f".{script}"
        found = parts.read_part(list_files(SourceSpec("s", str(raw))), path, near_copies=False)
        train = ["train"] * found.documents
        drawn = parts.draw_sample(path, train, parts.shares(found.text_bytes, 1), 3, tmp_path / ".drawn")
        texts = list(parts.sampled([tmp_path / ".drawn"]))
        assert drawn["text"] == sum(len(text.encode()) for text in texts)
        assert found.documents > 300 and 24_000 < drawn["text"] < 36_000, (script, found.text_bytes)
    monkeypatch.setattr(parts, "SAMPLE_TEXT", 100)
    parts.draw_sample(path, train, {"text": 1.0}, 3, tmp_path / ".drawn")
    assert max(len(text.encode()) for text in parts.sampled([tmp_path / ".drawn"])) in (98, 99, 100)


def test_a_sample_of_long_texts_is_as_large_as_one_of_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their share was that of all of their bytes, and taken of each were the first: of books a hundredth of what was meant."""
    monkeypatch.setattr(parts, "SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(parts, "SAMPLE_TEXT", 100)
    draws, raw = random.Random(3), tmp_path / "raw"
    raw.mkdir()
    for number in range(400):
        (raw / f"{number:03}.txt").write_text(" ".join(f"word{draws.randrange(10**6)}" for _ in range(300)))
    path = tmp_path / ".books"
    found = parts.read_part(list_files(SourceSpec("s", str(raw))), path, near_copies=False)
    shares = parts.shares(found.text_bytes, 0)
    drawn = parts.draw_sample(path, ["train"] * found.documents, shares, 3, tmp_path / ".drawn")
    assert found.documents == 400 and 8_000 < drawn["text"] < 12_000, (found.text_bytes, shares)


def test_a_source_that_this_machine_does_not_see_is_one_line_and_no_smaller_corpus(tmp_path: Path) -> None:
    """On a cluster whose machines share no folder all that the others read was counted as gone, and the corpus was finished."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("a.txt", "b.txt"):
        (raw / name).write_text("The nets were mended by lamplight while the wind turned. " * 3)
    files = list_files(SourceSpec("tales", str(raw)))
    (raw / "b.txt").unlink()
    assert parts.read_part(files, tmp_path / ".part").drops == {"read": Counter(["not a regular file"])}
    raw.rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"source tales: .*raw does not exist on .*: put it where every machine sees it"
    ):
        parts.read_part(files, tmp_path / ".other")
    assert not (tmp_path / ".other").exists()


def test_a_large_corpus_has_parts_of_more_bytes_and_not_more_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a task that reads a span of keys out of every part would read crumbs."""
    monkeypatch.setattr(parts, "MOST_PARTS", 10)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    spec = SourceSpec("s", "raw")
    files = [File(f"{n}.txt", f"{n}.txt", 40, "", spec, Local()) for n in range(1000)]
    some = split_files(files)
    assert [file for part in some for file in part] == files and 10 <= len(some) <= 11
    assert len(split_files(files[:3])) == 3, "and a small one has as many as before"
