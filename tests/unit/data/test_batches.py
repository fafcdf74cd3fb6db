"""Batches from a corpus of three modalities on disk: the same at any world size, and targets that mean what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from shoal.config import ModelConfig
from shoal.data import identities, order, parts
from shoal.data.batches import (
    Batch,
    ChatBatches,
    PretrainBatches,
    _batch,
    _filled,
    heldout_batches,
    heldout_groups,
    spaced,
    text_of,
)
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.data.order import permutation
from shoal.data.shards import TOKENIZER, Index, Rows, open_index, write_index
from shoal.data.sources.files import list_files
from shoal.data.tables import Parts
from shoal.errors import ConfigError, DataError
from shoal.inputs.tokenizer import END_ID, PAD_ID, PATCH_ID, Tokenizer

MIX = {"text": 0.6, "image": 0.2, "code": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, png, config: ModelConfig) -> Path:
    """A corpus of all three modalities, made by the plain functions alone."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (raw / f"{number}.txt").write_text(
            f"Story {number}: the sea was calm and the boats lay still, {number * 7}.\n" * 3
        )
        body = f"def f{number}(a):\n    return a * {number} + {number * 3}\n\n\nprint(f{number}({number}))\n"
        (raw / f"{number}.py").write_text(body)
        (raw / f"p{number}.png").write_bytes(png((number, 4 * number, 9)))
    files = list_files(SourceSpec("raw", str(raw)))
    work = Parts(tmp_path_factory.mktemp("work"), 1)
    parts.read_part(files, work[0])
    (splits,), _ = identities.choose(work, Operators(near_dedup=False))
    Tokenizer.bytes_only().save(out / TOKENIZER)
    packed = parts.pack_part(work[0], splits, out, config, 0)
    write_index(out, Index(
        length=config.train_length, vocab=265, patch=config.patch, image_size=config.image_size, tokenizer_sha256="",
        seed=0, mix=MIX, request={}, documents={}, drops={}, shards=tuple(packed.shards),
    ))  # fmt: skip
    return out


def make(corpus: Path, **options: int) -> PretrainBatches:
    return PretrainBatches(corpus, seed=1, batch_rows=12, **options)


@pytest.mark.parametrize("world", [5, 7, 11, 12])
def test_ranks_with_fewer_rows_are_filled_up_with_blanks(corpus: Path, world: int) -> None:
    """All rows once, as many micro-batches on every rank, and nothing to learn in those that are blank."""
    for micro_rows in (1, 2):
        ranks = [make(corpus, rank=r, world=world, micro_rows=micro_rows).at(3) for r in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = sorted(tuple(row.tolist()) for each in ranks for b in each for row in b.tokens if (b.docs >= 0).any())
        assert rows == sorted(tuple(row.tolist()) for row in make(corpus).at(3)[0].tokens)
        blanks = [b for each in ranks for b in each if not (b.docs >= 0).any()]
        assert len(blanks) == sum(map(len, ranks)) - sum(
            -(-len(range(r, 12, world)) // micro_rows) for r in range(world)
        )
        assert all((b.targets < 0).all() and not len(b.patches) and not b.n_bytes for b in blanks)
        assert all(len(b.tokens) == len(b.modalities) == len(b.row_bytes) for each in ranks for b in each)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_global_batch_is_the_same_at_any_world_size(corpus: Path, world: int) -> None:
    for step in (0, 5, 31):
        whole = make(corpus).at(step)[0].tokens
        ranks = [
            torch.cat([b.tokens for b in make(corpus, rank=r, world=world, micro_rows=1).at(step)])
            for r in range(world)
        ]
        merged = torch.stack(ranks, dim=1).flatten(0, 1)  # rank r holds positions r, r + W, ...
        assert torch.equal(merged, whole)


def test_the_mix_is_kept_by_token_however_full_the_rows_are(corpus: Path) -> None:
    tokens: Counter[str] = Counter()
    for step in range(84):  # some 1,000 rows
        batch = make(corpus).at(step)[0]
        for name, docs in zip(batch.modalities, batch.docs, strict=True):
            tokens[name] += int((docs >= 0).sum())
    assert {name: tokens[name] / tokens.total() for name in MIX} == pytest.approx(MIX, abs=0.01)


def test_an_epoch_is_as_many_rows_as_there_are(corpus: Path) -> None:
    count = sum(shard.rows for shard in open_index(corpus).shards if shard.split == "train")
    for rows in (1, 12, 4 * count):
        assert PretrainBatches(corpus, batch_rows=rows).steps_in_epoch == max(1, round(count / rows))


def test_every_row_is_seen_before_one_repeats(corpus: Path) -> None:
    batches = make(corpus)
    seen = Counter(row for step in range(100) for row in batches.rows(step))
    by = {name: [n for (of, _), n in seen.items() if of == name] for name in MIX}
    assert all(max(counts) - min(counts) <= 1 for counts in by.values())


def test_200_steps_read_the_same_rows_at_world_sizes_1_2_and_4(corpus: Path) -> None:
    def ids(world: int) -> list[list[tuple[str, int]]]:
        ranks = [make(corpus, rank=rank, world=world, micro_rows=1) for rank in range(world)]
        return [
            [row for some in zip(*(r.mine(step) for r in ranks), strict=True) for row in some] for step in range(200)
        ]

    whole = ids(1)
    assert whole == ids(2) == ids(4) and len({row for step in whole for row in step}) > 50


def read_on(corpus: Path, log: Path) -> None:
    """From where `log` says that reading was ended, in whatever way."""
    done = log.read_text().count("\n")  # the cursor: what was read for good
    with log.open("r+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith("\n")))  # a torn line was not
    batches = make(corpus)
    with log.open("a") as file:
        for step in range(done, 400):
            print(step, digest(batches, step), file=file, flush=True)


def digest(batches: PretrainBatches, step: int) -> str:
    (batch,) = batches.at(step)
    return hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()


READER = f"import sys; from pathlib import Path; from {__name__} import read_on; read_on(*map(Path, sys.argv[1:]))"


@pytest.mark.drill
def test_reading_that_is_killed_loses_and_repeats_nothing(corpus: Path, tmp_path: Path) -> None:
    """Begun in one process, and gone on with in another."""
    log = tmp_path / "log"
    log.touch()
    told = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", READER, str(corpus), str(log)], env=told) as reader:
        while log.read_text().count("\n") < 20:
            assert reader.poll() is None
            time.sleep(0.001)
        reader.kill()  # -9
    assert 20 <= log.read_text().count("\n") < 400
    read_on(corpus, log)
    whole = make(corpus)
    assert log.read_text().splitlines() == [f"{n} {digest(whole, n)}" for n in range(400)]


def test_a_start_at_any_cursor_opens_only_the_shards_that_it_reads(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work is counted, not time: of 3,000 shards a batch of 12 rows maps 12 at most, and orders each modality once."""
    small, shards = open_index(corpus), []
    for name in MIX:
        (first, *_) = small.of("train", name)
        for number in range(1000):
            file = f"train-{name}-{number:05}-000.arrow"
            os.link(corpus / first.file, tmp_path / file)
            shards.append(dataclasses.replace(first, file=file))
    os.link(corpus / TOKENIZER, tmp_path / TOKENIZER)
    write_index(tmp_path, dataclasses.replace(small, shards=tuple(shards)))
    opened: list[str] = []
    real = pa.memory_map
    monkeypatch.setattr(pa, "memory_map", lambda path: opened.append(path) or real(path))
    batches = make(tmp_path)
    assert not opened
    permutation.cache_clear()
    (batch,) = batches.at(10**9)
    assert len(batch.tokens) == 12 and 3 <= len(opened) <= 12
    assert permutation.cache_info().misses == len(MIX)


@pytest.mark.parametrize("remote", [True, False])
def test_rows_that_stay_in_s3_are_asked_for_a_step_ahead_and_others_when_they_are_read(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    asked, real = list[tuple[str, int]](), PretrainBatches._row
    monkeypatch.setattr(Rows, "remote", property(lambda self: remote))
    monkeypatch.setattr(PretrainBatches, "_row", lambda self, row: asked.append(row) or real(self, row))
    batches = make(corpus, rank=1, world=2)
    (batch,) = batches.at(3)
    if batches._askers is not None:
        batches._askers.shutdown(wait=True)
    assert Counter(asked) == Counter(batches.mine(3) + (batches.mine(4) if remote else []))
    assert torch.equal(batch.tokens, make(corpus).at(3)[0].tokens[1::2])


def test_a_target_is_the_next_token_of_the_same_document_and_never_a_patch(corpus: Path) -> None:
    for batch in make(corpus, micro_rows=4).at(3):
        tokens, targets, docs = batch.tokens, batch.targets, batch.docs
        inside = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0) & (tokens[:, 1:] != PATCH_ID)
        assert torch.equal(targets[:, :-1] >= 0, inside) and (targets[:, -1] == -1).all()
        assert torch.equal(targets[:, :-1][inside], tokens[:, 1:][inside])
        assert len(batch.patches) == (tokens == PATCH_ID).sum() == len(batch.grid)
        # one byte a token here; nine control tokens
        assert torch.equal(batch.row_bytes, (targets >= 9).sum(1)) and batch.n_bytes == (targets >= 9).sum()


def test_a_batch_of_fewer_rows_than_workers_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="12 rows a batch: allowed: 13 or more"):
        make(corpus, world=13)


def test_a_modality_without_rows_is_refused_by_name(corpus: Path) -> None:
    with pytest.raises(DataError, match="no train rows of smell"):
        PretrainBatches(corpus, mix={"smell": 1.0}, batch_rows=4)


def test_heldout_rows_are_others_and_are_read_in_full(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / TOKENIZER)
    held = text_of(corpus, "text", "heldout", tokenizer).decode()
    train = text_of(corpus, "text", "train", tokenizer).decode()
    numbers = [{line.split()[1] for line in text.split("\n") if line.startswith("Story")} for text in (held, train)]
    assert numbers[0] and not numbers[0] & numbers[1]
    batches = list(heldout_batches(corpus, "text", batch_rows=2))
    ends = sum(int((batch.tokens == END_ID).sum()) for batch in batches)
    assert ends == len(numbers[0]) and all(batch.modalities[0] == "text" for batch in batches)


def test_text_of_some_rows_is_what_those_rows_predict(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / TOKENIZER)
    rows = [b.tokens for b in heldout_batches(corpus, "code", batch_rows=1, limit=2)]
    text = b"".join(tokenizer.token_bytes(t) for row in rows for t in row.flatten().tolist())
    assert text_of(corpus, "code", "heldout", tokenizer, limit_rows=2) == text


def test_of_a_text_that_is_too_long_rows_from_all_over_it_are_read_and_cut(corpus: Path) -> None:
    """As many as hold so many bytes in the mean; of rows of some numbers, of these."""
    tokenizer = Tokenizer.load(corpus / TOKENIZER)
    rows = [b.tokens[0].tolist() for b in heldout_batches(corpus, "text", batch_rows=1, split="train")]
    texts = [b"".join(map(tokenizer.token_bytes, row)) for row in rows]
    assert len(texts) > 12
    for only in (None, range(1, len(texts), 2)):
        some = texts if only is None else texts[1::2]
        limit = 4 * sum(map(len, texts)) // len(texts) + 1
        wanted = b"".join(some[place * len(some) // 4] for place in range(4))[:limit]
        assert text_of(corpus, "text", "train", tokenizer, limit_bytes=limit, only=only) == wanted
        assert text_of(corpus, "text", "train", tokenizer, only=only) == b"".join(some)
        assert text_of(corpus, "text", "train", tokenizer, limit_bytes=1, only=only) == some[0][:1] != b""


def test_documents_of_held_out_rows_are_told_by_their_groups(corpus: Path) -> None:
    """One for each document of a row; of fewer rows, those of the same rows."""
    some = [list(heldout_groups(corpus, "text", split="train", limit=limit)) for limit in (None, 5)]
    docs = [b.docs[0] for b in heldout_batches(corpus, "text", batch_rows=1, split="train")]
    assert [len(groups) for groups in some[0]] == [int(row.max()) + 1 for row in docs]
    assert some[1] == [some[0][place * len(docs) // 5] for place in range(5)]


def chats(path: Path, count: int = 40) -> Path:
    rows = []
    for n in range(count):
        messages = [{"role": "user", "content": "q" * (1 + n % 23)}, {"role": "assistant", "content": f"a{n}"}]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("world", [1, 2, 4])
def test_chat_batches_are_the_same_at_world_sizes_that_divide_their_parts(
    tmp_path: Path, config: ModelConfig, world: int
) -> None:
    def build(**options: int) -> ChatBatches:
        return ChatBatches(path, Tokenizer.bytes_only(), config, batch_tokens=240, parts=4, **options)

    path = chats(tmp_path / "c.jsonl")
    for step in (0, 3, 9):
        whole = build().at(step)
        ranks = [build(rank=rank, world=world).at(step) for rank in range(world)]
        merged = [batch for group in zip(*ranks, strict=True) for batch in group]
        assert len(merged) == len(whole) == 4
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(merged, whole, strict=True))


def test_only_answers_are_learned(tmp_path: Path, config: ModelConfig) -> None:
    batches = ChatBatches(chats(tmp_path / "c.jsonl"), Tokenizer.bytes_only(), config, batch_tokens=400, parts=1)
    for batch in batches.at(0):
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            learned = targets[targets >= 0].tolist()
            assert learned[-1] == END_ID and tokens[1] != learned[0]
            assert chr(Tokenizer.bytes_only().token_bytes(learned[0])[0]) == "a"
    assert batches.report["padding"] <= batches.report["naive_padding"]


def padding_of_an_epoch(batches: ChatBatches) -> None:
    """What is reported is what the batches of the first epoch have."""
    built = [b for step in range(batches.steps_in_epoch) for b in batches.at(step)]
    first = built[: len(batches._groups(0))]
    assert 0 <= len(built) - len(first) < batches.parts
    assert all(len(b.tokens) == batches._each or b.tokens.numel() <= batches._budget * batches._each for b in first)
    report, real = batches.report, sum(int((b.docs >= 0).sum()) for b in first)
    assert (report["rows"], report["tokens"]) == (sum(len(b.tokens) for b in first), real)
    assert report["padding"] == pytest.approx(1 - real / sum(b.tokens.numel() for b in first))
    assert report["padding"] < report["naive_padding"] < 1


def test_every_row_of_chats_is_read_once_an_epoch_in_groups_within_their_budget(
    tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch goes on with the next one, which may have more groups, or fewer."""
    monkeypatch.setattr(order, "WINDOW", 5)  # rows that are sorted together
    path = chats(tmp_path / "c.jsonl")
    batches = ChatBatches(path, Tokenizer.bytes_only(), config, batch_tokens=240, parts=4)
    assert len({len(batches._groups(epoch)) for epoch in range(3)}) > 1
    groups = [group for step in range(3 * batches.steps_in_epoch) for group in batches.rows(step)]
    seen, epoch = list[int](), 0
    for group in groups:
        seen += group
        if len(seen) == 40:
            assert sorted(seen) == list(range(40))
            seen, epoch = [], epoch + 1
    assert epoch >= 2
    padding_of_an_epoch(batches)


def test_a_pair_stays_together_the_preferred_row_first(tmp_path: Path, config: ModelConfig) -> None:
    """In one group, whose budget it counts for with its longer row, twice; a blank group is a pair."""
    path, sizes = tmp_path / "p.jsonl", [(1 + 7 * n % 40, 1 + 11 * n % 37) for n in range(30)]
    rows = [{"prompt": f"{n:02}", "chosen": "c" * good, "rejected": "r" * bad} for n, (good, bad) in enumerate(sizes)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, ranks = Tokenizer.bytes_only(), list[ChatBatches]()
    for rank in range(2):
        ranks.append(ChatBatches(path, tokenizer, config, batch_tokens=600, parts=3, rank=rank, world=2, pairs=True))
    batches = [b for step in range(ranks[0].steps_in_epoch) for r in ranks for b in r.at(step)]
    assert len(batches) == 2 * 2 * ranks[0].steps_in_epoch, "three groups of a step, and a blank one"
    said = list[str]()
    for batch in batches:
        assert len(batch.tokens) % 2 == 0 and (len(batch.tokens) == 2 or batch.tokens.numel() <= 200)
        texts = [tokenizer.decode(row[row >= 9].tolist()) for row in batch.tokens]
        assert len(texts) == 2 or not all(text == "" for text in texts)
        learned = [tokenizer.decode(row[row >= 9].tolist()) for row in batch.targets]
        for text, other, good, bad in zip(texts[::2], texts[1::2], learned[::2], learned[1::2], strict=True):
            assert text[:2] == other[:2] and (text[2:], other[2:]) == (good, bad)
            assert set(good) <= {"c"} and set(bad) <= {"r"}
            said += [text[:2]] if text else []
    assert set(said) == {f"{n:02}" for n in range(30)}
    alone = ChatBatches(path, tokenizer, config, batch_tokens=600, parts=3, pairs=True)
    padding_of_an_epoch(alone)
    short = ChatBatches(path, tokenizer, config, batch_tokens=600, parts=1, pairs=True, max_length=20)
    assert 0 < len(short.chats) < 60 and short.chats.lengths.max() <= 20


IDS = np.array([[20, 21, PATCH_ID, 22, 23, PAD_ID], [30, 31, 32, 33, 34, 35]])
DOCS = np.array([[0, 0, 0, 0, 1, -1], [0, 0, 0, 1, 1, 1]])
BYTES = np.arange(40) ** 2  # of each token, another number for each


def by_hand(patches: int, wanted: np.ndarray | None = None) -> Batch:
    return _batch(IDS, DOCS, np.full((patches, 3), 7, dtype=np.uint8), ("code", "text"), BYTES, wanted)


def test_targets_and_their_bytes_are_what_they_are_by_hand() -> None:
    """The next token of the same document, no padding, of what is wanted; a patch only where it is a word, as it is in an open
    model's vocabulary, whose batches have no pictures."""
    wanted = np.ones((2, 6), dtype=bool)
    wanted[0, 1] = wanted[1, 0] = wanted[1, 5] = False
    rows = {
        "words": ([21, PATCH_ID, 22, -1, -1, -1], [31, 32, -1, 34, 35, -1], by_hand(0)),
        "picture": ([21, -1, 22, -1, -1, -1], [31, 32, -1, 34, 35, -1], by_hand(1)),
        "wanted": ([-1, PATCH_ID, 22, -1, -1, -1], [31, 32, -1, 34, -1, -1], by_hand(0, wanted)),
        "both": ([-1, -1, 22, -1, -1, -1], [31, 32, -1, 34, -1, -1], by_hand(1, wanted)),
    }
    for name, (first, second, batch) in rows.items():
        assert batch.targets.tolist() == [first, second], name
        assert batch.row_bytes.tolist() == [sum(t * t for t in row if t >= 0) for row in (first, second)], name
        assert batch.n_bytes == int(batch.row_bytes.sum()) and batch.modalities == ("code", "text")
        assert batch.tokens.tolist() == IDS.tolist() and batch.docs.tolist() == DOCS.tolist()
        assert len(batch.patches) == len(batch.grid) == (name in ("picture", "both"))


def test_a_blank_batch_has_nothing_to_learn_and_fits_beside_the_others() -> None:
    """Two rows of at most eight places; of pictures none, but as wide."""
    first = by_hand(1)
    same, blank, again = _filled([first], 3)
    assert same is first and blank is again
    assert (
        blank.tokens.tolist() == [[PAD_ID] * 6] * 2 and blank.docs.tolist() == blank.targets.tolist() == [[-1] * 6] * 2
    )
    assert blank.patches.shape == (0, 3) and blank.grid.shape == (0, 2) and blank.modalities == ("code", "code")
    assert blank.row_bytes.tolist() == [0, 0] and blank.n_bytes == 0
    long = dataclasses.replace(first, tokens=torch.zeros(1, 20, dtype=torch.int64))
    assert _filled([long], 2)[1].tokens.shape == (2, 8) and _filled([long], 1) == [long]
    for name in ("tokens", "docs", "targets", "patches", "grid", "row_bytes"):
        assert getattr(blank, name).dtype == getattr(first, name).dtype, name


def test_a_batch_is_moved_with_all_of_its_tensors() -> None:
    batch = by_hand(1)
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        was, now = getattr(batch, field.name), getattr(moved, field.name)
        if field.name == "modalities":
            assert now == was
        else:
            assert (now.device.type, now.shape, was.device.type) == ("meta", was.shape, "cpu")


def test_whole_rows_are_learned_from_their_first_token_on_and_cut_where_they_are_long(
    tmp_path: Path, config: ModelConfig
) -> None:
    """Chats as the template writes them, and texts: every token but the first of a piece is a target."""
    path, tokenizer = tmp_path / "w.jsonl", Tokenizer.bytes_only()
    path.write_text(json.dumps({"text": "abcdefghijklmnop" * 3}) + "\n" + chats(tmp_path / "c.jsonl", 3).read_text())
    options: dict[str, Any] = {"batch_tokens": 64, "parts": 2, "whole": True}
    for longest in (None, 20):
        batches = ChatBatches(path, tokenizer, config, max_length=longest, **options)
        most = longest or config.train_length
        assert batches.chats.lengths.max() == min(most, 49) and batches.report["tokens"] > 49
        told = list[str]()
        for batch in batches.at(0) + batches.at(1):
            there = batch.docs >= 0
            assert torch.equal(batch.targets[:, :-1] >= 0, there[:, 1:]) and not (batch.targets[:, -1] >= 0).any()
            assert torch.equal(batch.targets[:, :-1][there[:, 1:]], batch.tokens[:, 1:][there[:, 1:]])
            told += [tokenizer.decode(row[row >= 9].tolist()) for row in batch.tokens]
        assert any("abcdefgh" in text for text in told) and any("qq" in text for text in told)


def test_places_are_evenly_spaced_and_all_where_there_are_no_more() -> None:
    assert spaced(10, 4) == [0, 2, 5, 7] and spaced(10, 1) == [0]
    assert spaced(3, None) == spaced(3, 3) == spaced(3, 5) == [0, 1, 2] and spaced(0, 4) == []
