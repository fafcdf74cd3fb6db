"""What each rank reads: together the global batch, whatever their number; and what is refused before anything starts."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.data.batches import Batch
from shoal.errors import ConfigError, DataError, UsageError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.needs import disk_needed, memory_needed
from shoal.train.parallel import Ranks
from shoal.train.plan import REPLAY_EVERY, FitPlan, pretrain_plan, progress
from shoal.train.refusal import check
from tests.corpus import write_chats, write_corpus

CPU = torch.device("cpu")


def plan(data: Path, **more: object) -> FitPlan:
    return pretrain_plan("test", str(data), "unused", **{"steps": 4, **more})


def rows(batches: list[Batch]) -> list[tuple[int, ...]]:
    """The rows of some batches as plain tokens, sorted, padding left out."""
    return sorted(tuple(t[d >= 0].tolist()) for b in batches for t, d in zip(b.tokens, b.docs, strict=True))


@pytest.mark.parametrize("kind", ["shards", "chats"])
def test_two_ranks_read_what_one_reads(shards: Path, chats: Path, kind: str) -> None:
    """2 ranks x 2 micro-batches = 1 rank x 4, at every step; and held-out rows are dealt out whole."""
    data, tokenizer = {"shards": shards, "chats": chats}[kind], shard_tokenizer(shards)
    train = replace(presets.get("test").train, batch_tokens=768)
    heldout = str(chats) if kind == "chats" else ""
    one, two = (replace(plan(data, heldout=heldout), train=replace(train, accumulate=parts)) for parts in (4, 2))
    alone = open_feed(one, tokenizer, DEFAULT_TEMPLATE, Ranks(0, 1, CPU))
    pair = [open_feed(two, tokenizer, DEFAULT_TEMPLATE, Ranks(rank, 2, CPU)) for rank in (0, 1)]
    for step in range(5):
        shares = [feed.at(step) for feed in pair]
        assert [len(share) for share in shares] == [2, 2]
        assert rows([*shares[0], *shares[1]]) == rows(alone.at(step))
    assert pair[0].cursor(3) == alone.cursor(3)
    assert set(alone.heldout) == ({"text", "code", "image"} if kind == "shards" else {"chat"})
    for name, batches in alone.heldout.items():
        dealt = [feed.heldout[name] for feed in pair]
        assert len(dealt[0]) == len(dealt[1])
        assert sum(b.n_bytes for share in dealt for b in share) == sum(b.n_bytes for b in batches) > 0
        assert sum(int((b.targets >= 0).sum()) for share in dealt for b in share) == sum(
            int((b.targets >= 0).sum()) for b in batches
        )


def test_held_out_rows_are_shared_by_as_many_ranks_as_there_are_rows(shards: Path) -> None:
    """Eight at a time would leave most of many ranks with nothing but blanks."""
    tokenizer = shard_tokenizer(shards)
    feeds = [
        open_feed(plan(shards, eval_rows=8, accumulate=1).at_world(8, 8), tokenizer, "", Ranks(r, 8, CPU))
        for r in range(8)
    ]
    for modality, batches in open_feed(plan(shards, eval_rows=8), tokenizer, "", Ranks(0, 1, CPU)).heldout.items():
        dealt = [feed.heldout[modality] for feed in feeds]
        busy = sum(any((b.docs >= 0).any() for b in each) for each in dealt)
        assert busy == min(8, sum(len(b.tokens) for b in batches))
        assert sum(b.n_bytes for each in dealt for b in each) == sum(b.n_bytes for b in batches)


def test_a_step_reads_the_same_whenever_it_is_asked(shards: Path) -> None:
    """So that a resumed run repeats and loses nothing."""
    tokenizer = shard_tokenizer(shards)
    feed, other = (open_feed(plan(shards), tokenizer, "", Ranks(0, 1, CPU)) for _ in range(2))
    later = rows(other.at(7))
    assert [rows(feed.at(step)) for step in range(8)][7] == later
    assert feed.cursor(0) == 0 and feed.cursor(3) == 3 * 8


def test_chats_take_a_loss_on_answers_only(shards: Path, chats: Path) -> None:
    tokenizer = shard_tokenizer(shards)
    feed = open_feed(plan(chats, accumulate=1), tokenizer, DEFAULT_TEMPLATE, Ranks(0, 1, CPU))
    for batch in feed.at(0):
        for row, targets in zip(batch.tokens, batch.targets, strict=True):
            learned = tokenizer.decode(targets[targets >= 0].tolist())
            assert learned.startswith("It ") and "What" in tokenizer.decode(row.tolist())


def test_another_tokenizer_is_refused(shards: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        open_feed(plan(shards), Tokenizer.bytes_only(), "", Ranks(0, 1, CPU))


def test_other_images_are_refused(shards: Path) -> None:
    fine = plan(shards)
    other = replace(fine, model=replace(fine.model, patch=6))
    with pytest.raises(DataError, match=r"patch: got 4; allowed: 6"):
        open_feed(other, shard_tokenizer(shards), "", Ranks(0, 1, CPU))


def test_a_fresh_model_needs_shards(chats: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        shard_tokenizer(chats)


@pytest.mark.parametrize(
    ("more", "workers", "kind", "message"),
    [
        ({"accumulate": 3}, 1, ConfigError, r"8 rows do not divide over 1 worker\(s\) x 3"),
        ({}, 3, ConfigError, r"8 rows do not divide over 3 worker\(s\)"),
        ({"batch_tokens": 96 * 2048}, 1, DataError, "too short for one update"),
        ({"mix": {"text": 1.0, "audio": 1.0}}, 1, DataError, "no rows of audio"),
    ],
)
def test_plans_on_shards_that_are_refused(
    shards: Path, more: dict[str, object], workers: int, kind: type[Exception], message: str
) -> None:
    check(plan(shards), 2)
    with pytest.raises(kind, match=message):
        check(plan(shards, **more), workers)


def test_shards_of_another_preset_are_refused(tmp_path: Path) -> None:
    other = replace(presets.get("test"), model=replace(presets.get("test").model, train_length=48))
    with pytest.raises(DataError, match="row length: got 48; allowed: 96"):
        check(plan(write_corpus(tmp_path / "data", other, documents=4, heldout=2)), 1)


def test_chats_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        check(plan(tmp_path / "missing.jsonl"), 1)
    few = write_chats(tmp_path / "few.jsonl", rows=3)
    check(plan(few, accumulate=3), 1)
    with pytest.raises(DataError, match=r"got '3 rows'; allowed: 4 or more"):
        check(plan(few, accumulate=2), 2)
    few.write_text('{"text": "a"}\n\n{"foo": 1}\n')
    with pytest.raises(DataError, match=r"few.jsonl line 3: got 'no known form'; allowed: messages"):
        check(plan(few, accumulate=4), 1)
    with pytest.raises(DataError, match=r"few.jsonl line 1: got 'no preference pair'; allowed: chosen and rejected"):
        made = plan(few, accumulate=4)
        check(replace(made, init="parent", train=replace(made.train, dpo=0.1)), 1)
    few.write_text('{"foo": 1}\n' * 8)  # many enough, and none to learn from: before a run begins, and leaves a folder
    with pytest.raises(DataError, match=r"few.jsonl line 1: got 'no known form'; allowed: messages"):
        check(plan(few, accumulate=4), 1)
    few.write_text('{"foo": 1}\n' * 8 + '{"text": "a"}\n')
    check(plan(few, accumulate=4), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": None}, "how long to train"),
        ({"steps": 0, "tokens": 5}, "length of the run"),
        ({"minutes": -1.0}, "length of the run"),
        ({"minutes": math.nan}, "length of the run"),  # it would never end
        ({"epochs": math.inf}, "length of the run"),
        ({"keep": 0}, "keep: got 0; allowed: 1 or more"),  # all were kept
        ({"replicas": 0}, "replicas: got 0; allowed: 1 or more"),
        ({"eval_every": -1}, "eval_every: got -1"),
        ({"eval_rows": -1}, "eval_rows: got -1"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes: got nan"),  # none would be written
        ({"exit_weights": (1.0,)}, "train.exit_weights"),
        ({"exit_weights": (1.0, 1.0, 0.0)}, "train.exit_weights"),
    ],
)
def test_plans_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(Path("unused"), **values)


def test_progress_is_that_of_the_first_limit() -> None:
    several = plan(Path("unused"), steps=10, tokens=768 * 20, minutes=1.0, epochs=2.0)
    assert progress(several, step=5, seconds=6, steps_in_epoch=50) == pytest.approx(0.5)
    assert progress(several, step=5, seconds=45, steps_in_epoch=50) == pytest.approx(0.75)
    assert progress(several, step=5, seconds=6, steps_in_epoch=3) == pytest.approx(5 / 6)
    assert progress(several, step=99, seconds=6, steps_in_epoch=50) == 1.0


def test_memory_falls_with_workers_and_disk_grows_with_checkpoints() -> None:
    mini = pretrain_plan("mini", "unused", "unused", steps=1, accumulate=1)
    assert memory_needed(mini, 4) < memory_needed(mini, 1)
    longer = replace(mini, keep=mini.keep + 1)
    assert disk_needed(longer) > disk_needed(mini) > 3 * 3 * 4 * 4.5e6


def test_replay_puts_packed_rows_between_the_chats(shards: Path, chats: Path) -> None:
    tokenizer, ranks = shard_tokenizer(shards), Ranks(0, 1, CPU)
    mixed = plan(chats, replay=str(shards))
    feed = open_feed(mixed, tokenizer, DEFAULT_TEMPLATE, ranks)
    only_chats = open_feed(plan(chats), tokenizer, DEFAULT_TEMPLATE, ranks)
    only_rows = open_feed(plan(shards), tokenizer, DEFAULT_TEMPLATE, ranks)
    read = [rows(feed.at(step)) for step in range(2 * REPLAY_EVERY)]
    chat, packed = (iter([rows(other.at(step)) for step in range(8)]) for other in (only_chats, only_rows))
    assert read == [next(packed if step % REPLAY_EVERY == REPLAY_EVERY - 1 else chat) for step in range(len(read))]
    oftener = open_feed(plan(chats, replay=str(shards), replay_every=2), tokenizer, DEFAULT_TEMPLATE, ranks)
    alone = [[rows(other.at(step)) for step in range(2)] for other in (only_chats, only_rows)]
    assert [rows(oftener.at(step)) for step in range(4)] == [alone[0][0], alone[1][0], alone[0][1], alone[1][1]]
    assert oftener.steps_in_epoch == 2 * only_chats.steps_in_epoch
    assert plan(chats, replay=str(shards), replay_every=2).identity() != mixed.identity()
    with pytest.raises(ConfigError, match="replay_every"):
        plan(chats, replay=str(shards), replay_every=1)
    assert {"text", "code", "image"} <= set(feed.heldout)
    assert only_rows.chats is None and feed.chats == only_chats.chats
    assert feed.chats is not None and feed.chats["padding"] < feed.chats["naive_padding"]
    assert feed.steps_in_epoch > only_chats.steps_in_epoch
    check(mixed, 1)
    assert mixed.identity() != plan(chats).identity()
    with pytest.raises(ConfigError, match="replay"):
        check(plan(shards, replay=str(shards)), 1)
