"""What a run reads: this rank's micro-batches of any step, and the held-out rows it is measured on.

Two kinds of data, told apart by the path: a folder of shards (packed rows, mixed by modality) and a ``.jsonl`` of chats (groups
of similar length, loss on the answers only), with updates from shards in between when the plan has a replay. Either way a
batch is a pure function of seed and step, so a run resumes from one integer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.data.batches import NO_TARGET, Batch, ChatBatches, PretrainBatches, heldout_batches
from shoal.data.chats.heldout import questions
from shoal.data.documents import MODALITIES
from shoal.data.pack import PADDING
from shoal.data.shards import TOKENIZER
from shoal.errors import DataError
from shoal.inputs.tokenizer import Tokenizer
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan

EVAL_ROWS = 8  # rows of one held-out micro-batch
EVAL_TOKENS = 4096  # a held-out micro-batch of chats, padding included


@dataclass(frozen=True)
class Replay:
    """Chats, and every `every`-th update packed rows: without them, what pretraining taught is forgotten."""

    chats: ChatBatches
    rows: PretrainBatches
    every: int

    @property
    def steps_in_epoch(self) -> int:
        """Updates that read all chats once."""
        return -(-self.chats.steps_in_epoch * self.every // (self.every - 1))

    def at(self, step: int) -> list[Batch]:
        rounds, place = divmod(step, self.every)
        return self.rows.at(rounds) if place == self.every - 1 else self.chats.at(step - rounds)


@dataclass(frozen=True)
class Feed:
    """The data of one run, as one rank sees it."""

    batches: PretrainBatches | ChatBatches | Replay
    batch_samples: int  # samples of a global batch: rows of shards, groups of chats
    # modality -> this rank's micro-batches, as many on every rank
    heldout: Mapping[str, list[Batch]] = field(default_factory=dict)
    # wanted share of each modality by token; empty for chats alone
    mix: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps_in_epoch(self) -> int:
        """Updates that read as much as there is."""
        return self.batches.steps_in_epoch

    @property
    def chats(self) -> dict[str, Any] | None:
        """Rows, refusals and padding of the chats, see `ChatBatches.report`; None where there are none."""
        batches = self.batches.chats if isinstance(self.batches, Replay) else self.batches
        return batches.report if isinstance(batches, ChatBatches) else None

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of update number `step`, as many on every rank."""
        return self.batches.at(step)

    def cursor(self, step: int) -> int:
        """The first sample, in the global order, that the updates before `step` leave unread."""
        return step * self.batch_samples


def open_feed(plan: FitPlan, tokenizer: Tokenizer, template: str, ranks: Ranks) -> Feed:
    """The plan's data for this rank. Raises DataError when it cannot be used with this model and `tokenizer`, ConfigError
    when the global batch does not divide over the ranks."""
    heldout = _heldout_chats(plan, tokenizer, template, ranks)
    if Path(plan.data).is_dir():
        rows = _shards(plan, plan.data, tokenizer, ranks)
        return dataclasses.replace(rows, heldout={**heldout, **rows.heldout})
    chats = _chats(plan, tokenizer, template, ranks)
    if not plan.replay:
        return dataclasses.replace(chats, heldout=heldout)
    rows = _shards(plan, plan.replay, tokenizer, ranks)
    assert isinstance(chats.batches, ChatBatches) and isinstance(rows.batches, PretrainBatches)
    return Feed(
        Replay(chats.batches, rows.batches, plan.replay_every), chats.batch_samples, {**heldout, **rows.heldout}
    )


def shard_tokenizer(data: str | Path) -> Tokenizer:
    """The tokenizer that made the shards in `data`."""
    path = Path(data) / TOKENIZER
    if not path.is_file():
        raise DataError(f"no tokenizer in {data}", do="train a fresh model on a folder made by `shoal prepare`")
    return Tokenizer.load(path)


def _shards(plan: FitPlan, data: str, tokenizer: Tokenizer, ranks: Ranks) -> Feed:
    batches = PretrainBatches(
        data,
        mix=plan.mix,
        seed=plan.train.seed,
        batch_rows=plan.batch_rows,
        rank=ranks.rank,
        world=ranks.world,
        micro_rows=plan.micro_rows(ranks.world),
        length=plan.model.train_length,
    )
    index = batches.index
    if index.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(f"{data} was made with another tokenizer than the model's", do="prepare it with the model's")
    for what in ("patch", "image_size"):
        if getattr(index, what) != getattr(plan.model, what):
            raise DataError(f"{data}: {what}", got=getattr(index, what), allowed=getattr(plan.model, what))
    at_once = max(1, min(EVAL_ROWS, plan.eval_rows // ranks.world))  # so that many ranks share what there is
    heldout: dict[str, list[Batch]] = {
        modality: _dealt(heldout_batches(data, modality, at_once, limit=plan.eval_rows), ranks)
        for modality in MODALITIES
        if index.total("rows", "heldout", modality)
    }
    return Feed(batches, plan.batch_rows, heldout, dict(plan.mix if plan.mix is not None else index.mix))


def _chats(plan: FitPlan, tokenizer: Tokenizer, template: str, ranks: Ranks) -> Feed:
    parts = plan.parts_at(ranks.world)
    batches = ChatBatches(
        plan.data,
        tokenizer,
        plan.model,
        batch_tokens=plan.train.batch_tokens,
        parts=parts,
        seed=plan.train.seed,
        rank=ranks.rank,
        world=ranks.world,
        template=template,
        max_length=plan.row_length,
        whole=plan.adapts,
        pairs=plan.train.dpo > 0,
    )
    return Feed(batches, parts)


def _heldout_chats(plan: FitPlan, tokenizer: Tokenizer, template: str, ranks: Ranks) -> dict[str, list[Batch]]:
    """Batches of the plan's held-out chats, if it has any. They are asked as questions once the model is made; a row that
    cannot be is refused now, with its line, and not after hours of training."""
    if not plan.heldout:
        return {}
    questions(plan.heldout, tokenizer, plan.model, template)
    chats = ChatBatches(
        plan.heldout, tokenizer, plan.model, batch_tokens=EVAL_TOKENS, parts=1, template=template, heldout=True
    )
    groups = range(min(chats.steps_in_epoch, -(-plan.eval_rows // EVAL_ROWS)))
    return {"chat": _dealt((batch for group in groups for batch in chats.at(group)), ranks)}


def _dealt(batches: Iterable[Batch], ranks: Ranks) -> list[Batch]:
    """Every W-th of `batches`; blanks fill up the last round, since a rank that runs one batch less would hang the others."""
    every = list(batches)
    missing = -len(every) % ranks.world
    return (every + [_blank(every[-1])] * missing if every else every)[ranks.rank :: ranks.world]


def _blank(batch: Batch) -> Batch:
    """`batch` with nothing left to predict."""
    return dataclasses.replace(
        batch,
        targets=torch.full_like(batch.targets, NO_TARGET),
        docs=torch.full_like(batch.docs, PADDING),
        row_bytes=torch.zeros_like(batch.row_bytes),
    )
