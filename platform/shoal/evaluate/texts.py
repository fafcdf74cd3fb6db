"""What held-out rows are read from: the shards of a corpus, or a JSONL of texts and chats. A model that was imported has a
tokenizer that no shards are made with, so a file is what it is measured on; of chats the answers are.

Letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shoal.data.batches import Batch, spaced
from shoal.data.chats.rows import Chat, Refused, chats, unusable
from shoal.data.shards import open_index, token_bytes
from shoal.errors import DataError
from shoal.evaluate.measures import HeldoutRows
from shoal.model.model import Model

LONGEST = 1024  # tokens of a row; more are cut
TOKENS = 65_536  # that are read of a file, at most, in evenly spaced rows
Rows = Iterable[tuple[Batch, np.ndarray]]  # batches, and the group of each place, int64 [B, T]


def modalities(data: Path) -> list[str]:
    """What rows a corpus holds out; of a file, text."""
    if data.is_file():
        return ["text"]
    index = open_index(data)
    return [modality for modality in ("text", "code", "image") if index.total("rows", "heldout", modality)]


def rows_of(data: Path, modality: str, model: Model, most: int, part: slice = slice(None)) -> Rows:
    """The held-out rows of a corpus, of `most` of them a `part`, or those of a file as `model` reads them."""
    return TextRows(data, model) if data.is_file() else HeldoutRows(data, modality, most, part=part)


@dataclass(frozen=True)
class TextRows:
    """The rows of a JSONL of texts and chats, one a batch. Raises DataError, naming the line, for one that cannot be read or
    has images."""

    path: Path
    model: Model

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        pieces = [piece for chat in self._chats() for piece in self._pieces(chat)]
        if not pieces:
            raise DataError(f"{self.path} holds no row to measure on", allowed="texts, or chats with an answer")
        count = max(1, len(pieces) * TOKENS // max(TOKENS, sum(len(ids) for ids, _, _ in pieces)))
        lengths = token_bytes(self.model.tokenizer)
        none = torch.zeros(0, self.model.config.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
        for place in spaced(len(pieces), count):
            ids, answer, group = pieces[place]
            tokens, targets = ids[None, :-1], torch.where(answer[1:], ids[1:], -1)[None]
            size = torch.tensor([int(lengths[ids[1:][answer[1:]].numpy()].sum())])
            batch = Batch(tokens, targets, torch.zeros_like(tokens), *none, size, ("text",))
            yield batch, np.full(tokens.shape, group)

    def _chats(self) -> Iterator[Chat]:
        m, refused = self.model, Refused()
        yield from chats(self.path, m.tokenizer, m.config, m.chat_template, refused, heldout=True)
        for reason, line in refused.first.items():
            raise unusable(self.path, line, reason)

    def _pieces(self, chat: Chat) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """ids [T + 1], whether each was written by who is learned from, and the group of a row, piece after piece."""
        if chat.row.images:
            raise unusable(self.path, chat.line, "images, which are measured from shards alone")
        ids, answer = torch.tensor(chat.row.ids), torch.tensor(chat.row.answer)
        longest = min(LONGEST, self.model.config.context)
        for start in range(0, len(ids) - 1, longest):
            part = slice(start, start + longest + 1)
            if answer[part][1:].any():
                yield ids[part], answer[part], chat.group
