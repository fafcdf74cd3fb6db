"""Fine-tuning rows: a JSONL of ``{"messages": [...]}``, encoded once and kept as flat arrays.

Letters: R rows, L ids of all rows together, n patches of all rows together, V numbers in a patch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import ModelConfig
from shoal.errors import DataError, RequestError
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer

AUGMENTED = "augmented"  # field of a row that `data.augment` made: how it was changed
MADE = "augmented row among held-out ones"


@dataclass(frozen=True)
class ChatRows:
    """The rows that can be trained on; `refused` counts the others by reason."""

    ids: np.ndarray  # int32 [L]
    answer: np.ndarray  # bool [L]: written by the assistant
    ends: np.ndarray  # int64 [R]: where each row's ids end
    patches: np.ndarray  # uint8 [n, V]
    patch_ends: np.ndarray  # int64 [R]
    refused: dict[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], in tokens."""
        return np.diff(self.ends, prepend=0)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, answer, patches of one row: views."""
        tokens, images = (slice(ends[index - 1] if index else 0, ends[index]) for ends in (self.ends, self.patch_ends))
        return self.ids[tokens], self.answer[tokens], self.patches[images]


def read_chats(
    path: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    limit: int = 0,
    heldout: bool = False,
) -> ChatRows:
    """The rows of a JSONL file, at most `limit` tokens long (0: the training length). `heldout`: to measure on.

    Raises DataError when the file cannot be read, when none of its rows can be used, and for held-out rows that `data.augment`
    made: a measurement on them would mean nothing.
    """
    longest = limit or config.train_length
    refused: Counter[str] = Counter()
    kept: list[Encoded] = []
    for line in lines(Path(path)):
        try:
            messages = _messages(line, heldout=heldout)
            row = encode_chat(messages, tokenizer, config, template=template, add_generation_prompt=False)
            if not any(row.answer):
                raise DataError("no answer")
            if len(row.ids) > longest:
                raise DataError(f"longer than {longest} tokens")
            kept.append(row)
        except (DataError, RequestError) as error:
            refused[error.message.split(":")[0]] += 1
    if made := refused[MADE]:
        raise DataError(f"{path} holds {made} augmented row(s)", do="measure on the rows that were there before")
    if not kept:
        raise DataError(f"{path} holds no row to train on", got=dict(refused), allowed='{"messages": [...]} a line')
    images = [row.patches for row in kept if row.patches is not None]
    return ChatRows(
        ids=np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in kept]),
        answer=np.concatenate([np.asarray(row.answer, dtype=bool) for row in kept]),
        ends=np.cumsum([len(row.ids) for row in kept]),
        patches=np.concatenate(images) if images else np.zeros((0, config.patch_values), dtype=np.uint8),
        patch_ends=np.cumsum([sum(len(image.values) for image in row.images) for row in kept]),
        refused=dict(sorted(refused.items())),
    )


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file that hold something. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            yield from (line for line in stream if line.strip())
    except OSError as error:
        raise DataError(f"cannot read {path}", got=error.strerror, do="give a .jsonl of chats") from error


def _messages(line: bytes, *, heldout: bool) -> list[dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("broken JSON") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError("no messages")
    if heldout and AUGMENTED in row:
        raise DataError(MADE)
    return messages
