"""Rows to batches of tensors: packed rows for pretraining, chats for fine-tuning, held-out rows for evaluation.

Notable: a batch is a pure function of (seed, step, rank, world). The global batch of a step is the same at any world size,
rank r takes its positions r, r + W, ... (one less than others where they do not divide), and a run resumes from its step.
Letters: B rows, T tokens, N patches of the batch, V numbers in a patch, W world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.data import order
from shoal.data.chats.rows import read_chats, read_pairs
from shoal.data.chats.whole import read_whole
from shoal.data.pack import PADDING
from shoal.data.shards import TOKENIZER, Rows, open_index, token_bytes
from shoal.errors import ConfigError, DataError
from shoal.inputs import media
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import PAD_ID, PATCH_ID, Tokenizer

NO_TARGET = -1  # target where no loss is taken
BLANK = 8  # places of a row that only keeps a rank in step with the others
ASKED = 16  # rows that are asked for at once of a corpus in S3


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Patches stand in the order of their tokens, row after row."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T]: the next token of the same document, or -1 (also where that is a patch)
    docs: Tensor  # int64 [B, T]: a number for each document of a row, -1 padding
    patches: Tensor  # uint8 [N, V]
    grid: Tensor  # int64 [N, 2]: row and column of each patch in its image
    row_bytes: Tensor  # int64 [B]: UTF-8 bytes that each row's targets stand for
    modalities: tuple[str, ...]  # of each row; "chat" in fine-tuning

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes that the targets stand for: what bits per byte divides by."""
        return int(self.row_bytes.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "modalities"
        }
        return replace(self, **moved)


class PretrainBatches:
    """Packed rows of a prepared corpus in the order of `order.RowOrder`, mixed by modality."""

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        mix: Mapping[str, float] | None = None,
        seed: int = 0,
        *,
        batch_rows: int,
        rank: int = 0,
        world: int = 1,
        micro_rows: int | None = None,
        length: int | None = None,
    ) -> None:
        """`mix`: share of each modality (default: what the corpus was prepared for); `batch_rows`: rows of a global batch;
        `micro_rows`: rows of one micro-batch of one rank (default: all of the rank's); `length`: row length required.

        Raises DataError when the corpus cannot be opened or lacks a modality of the mix, ConfigError when the batch cannot
        be divided.
        """
        self.index = open_index(directory, length=length)
        self.batch_rows, self.rank, self.world = batch_rows, rank, world
        self.micro_rows = micro_rows or max(1, batch_rows // world)
        if batch_rows < world:
            raise ConfigError(f"{batch_rows} rows a batch", allowed=f"{world} or more, one a worker")
        wanted = order.Mix(mix if mix is not None else self.index.mix).shares
        self._rows = {name: Rows(directory, self.index, split, name) for name in wanted}
        for name, rows in self._rows.items():
            if not len(rows):
                raise DataError(
                    f"{directory} holds no {split} rows of {name}",
                    got=f"mix {wanted}",
                    do="leave it out of the mix, or add a source that has some",
                )
        remote = any(rows.remote for rows in self._rows.values())
        self._askers = ThreadPoolExecutor(ASKED, thread_name_prefix="rows") if remote else None
        counts = {name: len(rows) for name, rows in self._rows.items()}
        # by token the shares are `wanted`
        self._order = order.RowOrder(self.index.row_mix(split, wanted), counts, seed)
        self._bytes = token_bytes(Tokenizer.load(Path(directory) / TOKENIZER))

    @property
    def steps_in_epoch(self) -> int:
        """Steps that read as many rows as there are."""
        return max(1, round(sum(map(len, self._rows.values())) / self.batch_rows))

    def rows(self, step: int) -> list[tuple[str, int]]:
        """(modality, row number) of every row of a global batch, in order; the same on every rank."""
        start = step * self.batch_rows
        return [self._order.at(position) for position in range(start, start + self.batch_rows)]

    def mine(self, step: int) -> list[tuple[str, int]]:
        """Those of `rows` that this rank reads, in order."""
        return self.rows(step)[self.rank :: self.world]

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, as many on every rank: blank ones fill up. Of a corpus that stays in S3 the rows
        are asked for at once, and those of the next step already, while this one is computed."""
        mine = self.mine(step)
        parts = (mine[i : i + self.micro_rows] for i in range(0, len(mine), self.micro_rows))
        batches = [self._batch(part) for part in parts]
        if self._askers is not None:
            for row in self.mine(step + 1):
                self._askers.submit(self._row, row)  # a fault is told when the row is read
        most = -(-self.batch_rows // self.world)  # rows that a rank has
        return _filled(batches, -(-most // self.micro_rows))

    def _row(self, row: tuple[str, int]) -> Packed:
        return self._rows[row[0]][row[1]]

    def _batch(self, rows: Sequence[tuple[str, int]]) -> Batch:
        read = list((self._askers.map if self._askers is not None else map)(self._row, rows))
        return _packed_batch(read, tuple(name for name, _ in rows), self._bytes)


class ChatBatches:
    """Fine-tuning rows in groups of similar length, padded only to the longest of the group; targets in answers only.

    A global batch is `parts` groups (micro-batches), of which each rank takes every W-th. All world sizes up to `parts` see the
    same global batches.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        config: ModelConfig,
        *,
        batch_tokens: int,
        parts: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        template: str = DEFAULT_TEMPLATE,
        max_length: int | None = None,
        heldout: bool = False,
        whole: bool = False,
        pairs: bool = False,
    ) -> None:
        """`batch_tokens`: tokens of a global batch, padding included; `max_length`: longest row kept (default: the training
        length); `heldout`: to measure on, so augmented rows are refused; `whole`: targets everywhere, and rows of texts
        too, longer ones cut (`read_whole`); `pairs`: of preferences, whose two rows stay together, the preferred one
        first. Raises DataError when no row can be used, ConfigError when `parts` are fewer than `world`."""
        if parts < world:
            raise ConfigError(f"{parts} micro-batches", allowed=f"{world} or more, one a worker")
        if pairs:
            self.chats = read_pairs(path, tokenizer, config, template=template, limit=max_length or 0)
        elif whole:
            self.chats = read_whole(path, tokenizer, config, template=template, limit=max_length or 0)
        else:
            self.chats = read_chats(path, tokenizer, config, template=template, limit=max_length or 0, heldout=heldout)
        self.seed, self.parts, self.rank, self.world = seed, parts, rank, world
        self._each = 2 if pairs else 1  # rows of what is dealt as one
        self._budget = max(1, batch_tokens // parts // self._each)
        self._lengths = self.chats.lengths.reshape(-1, self._each).max(axis=1)
        self._bytes = token_bytes(tokenizer)
        self._starts = [0]  # groups before each epoch that is known
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])  # the newest one made, and its groups

    @property
    def steps_in_epoch(self) -> int:
        """Steps that read every row; the last of them goes on with rows of the next epoch."""
        return -(-len(self._groups(0)) // self.parts)

    @property
    def report(self) -> dict[str, Any]:
        """Rows, tokens, refusals by reason; padding share of the first epoch beside that of batches not grouped by length."""
        shuffled = order.permutation(len(self._lengths), self.seed, 0, 0)
        naive = order.cut(shuffled, self._lengths, self._budget)
        return {
            "rows": len(self.chats),
            "tokens": int(self.chats.lengths.sum()),
            "refused": self.chats.refused,
            "refused_at": self.chats.refused_at,
            "padding": order.padding(list(map(self._rows_of, self._groups(0))), self.chats.lengths),
            "naive_padding": order.padding(list(map(self._rows_of, naive)), self.chats.lengths),
        }

    def rows(self, step: int) -> list[list[int]]:
        """Row numbers of every group of a global batch; the same on every rank."""
        start = step * self.parts
        return [self._rows_of(self._group(index)).tolist() for index in range(start, start + self.parts)]

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, as many on every rank: blank ones fill up."""
        mine = [self._batch(group) for group in self.rows(step)[self.rank :: self.world]]
        return _filled(mine, -(-self.parts // self.world))

    def _group(self, index: int) -> np.ndarray:
        """A group by its number in the endless sequence of epochs."""
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + len(self._groups(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._groups(epoch)[index - self._starts[epoch]]

    def _groups(self, epoch: int) -> list[np.ndarray]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, order.length_groups(self._lengths, self._budget, self.seed, epoch))
        return self._epoch[1]

    def _rows_of(self, group: np.ndarray) -> np.ndarray:
        """Row numbers of a group: of pairs both."""
        return (self._each * group[:, None] + np.arange(self._each)).ravel()

    def _batch(self, group: Sequence[int]) -> Batch:
        width = int(self.chats.lengths[group].max())
        tokens = np.full((len(group), width), PAD_ID, dtype=np.int64)
        docs = np.full((len(group), width), PADDING, dtype=np.int64)
        wanted = np.zeros((len(group), width), dtype=bool)
        patches = []
        for place, row in enumerate(group):
            ids, answer, images = self.chats.row(row)
            tokens[place, : len(ids)], docs[place, : len(ids)] = ids, 0
            wanted[place, : len(ids)] = answer
            patches.append(images)
        return _batch(tokens, docs, np.concatenate(patches), ("chat",) * len(group), self._bytes, wanted)


def heldout_batches(
    directory: str | Path,
    modality: str,
    batch_rows: int,
    *,
    split: str = "heldout",
    limit: int | None = None,
    part: slice = slice(None),
) -> Iterator[Batch]:
    """Held-out rows of one modality in the order of the shards; of more than `limit` rows, as many, evenly spaced; `part` of
    them."""
    index = open_index(directory)
    rows, lengths = Rows(directory, index, split, modality), token_bytes(Tokenizer.load(Path(directory) / TOKENIZER))
    chosen = spaced(len(rows), limit)[part]
    for start in range(0, len(chosen), batch_rows):
        some = [rows[row] for row in chosen[start : start + batch_rows]]
        yield _packed_batch(some, (modality,) * len(some), lengths)


def heldout_groups(
    directory: str | Path, modality: str, *, split: str = "heldout", limit: int | None = None, part: slice = slice(None)
) -> Iterator[list[int]]:
    """Of each row that `heldout_batches` reads, the group of each of its documents."""
    rows = Rows(directory, open_index(directory), split, modality)
    return (rows.groups(row) for row in spaced(len(rows), limit)[part])


def text_of(
    directory: str | Path,
    modality: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    limit_rows: int | None = None,
    limit_bytes: int | None = None,
    only: Sequence[int] | None = None,
) -> bytes:
    """The text of one split and modality as bytes; with `limit_rows`, of the same rows as `heldout_batches` reads; `only`: of
    rows of these numbers.

    With `limit_bytes`, about that much from evenly spaced rows. For baselines that know no tokens, such as gzip.
    """
    index = open_index(directory)
    rows = Rows(directory, index, split, modality)
    places = range(len(rows)) if only is None else only
    if limit_bytes is not None:
        whole = max(1, index.total("text_bytes", split, modality) * len(places) // max(1, len(rows)))
        limit_rows = max(1, len(places) * limit_bytes // whole)
    table = [tokenizer.token_bytes(token) for token in range(len(tokenizer))]
    chosen = (places[place] for place in spaced(len(places), limit_rows))
    text = b"".join(table[token] for row in chosen for token in rows[row][0].tolist())
    return text[:limit_bytes]


def spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the places 0 .. `count`-1, evenly spaced."""
    if limit is None or limit >= count:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def _filled(batches: list[Batch], count: int) -> list[Batch]:
    """`batches` and as many blank ones as make `count`, since a rank that runs one less would hang the others: two rows, as a
    pair has, of a few places of padding, in which nothing is predicted."""
    first = batches[0]
    padding = torch.full((2, min(BLANK, first.tokens.shape[1])), PADDING)
    blank = Batch(
        tokens=torch.full_like(padding, PAD_ID),
        targets=torch.full_like(padding, NO_TARGET),
        docs=padding,
        patches=first.patches[:0],
        grid=first.grid[:0],
        row_bytes=torch.zeros(2, dtype=torch.int64),
        modalities=first.modalities[:1] * 2,
    )
    return batches + [blank] * (count - len(batches))


Packed = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, docs, patches of a row, as `Rows` gives them


def _packed_batch(rows: Sequence[Packed], modalities: tuple[str, ...], lengths: np.ndarray) -> Batch:
    tokens, docs = (np.stack([row[part] for row in rows]).astype(np.int64) for part in (0, 1))
    return _batch(tokens, docs, np.concatenate([row[2] for row in rows]), modalities, lengths)


def _batch(
    tokens: np.ndarray,
    docs: np.ndarray,
    patches: np.ndarray,
    modalities: tuple[str, ...],
    lengths: np.ndarray,
    wanted: np.ndarray | None = None,
) -> Batch:
    """tokens, docs int64 [B, T]; `lengths` int64 [vocab]: bytes of each token; `wanted` bool [B, T]: tokens that are
    learned (default: all)."""
    following = tokens[:, 1:]
    learned = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] != PADDING)
    if len(patches):  # in an open model's vocabulary the ids of images are words
        learned &= following != PATCH_ID
    if wanted is not None:
        learned &= wanted[:, 1:]
    targets = np.full_like(tokens, NO_TARGET)
    targets[:, :-1] = np.where(learned, following, NO_TARGET)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        docs=torch.from_numpy(docs),
        patches=torch.from_numpy(patches),
        grid=torch.from_numpy(media.grid(tokens.ravel() if len(patches) else [])),
        row_bytes=torch.from_numpy(np.where(learned, lengths[following], 0).sum(axis=1)),
        modalities=modalities,
    )
