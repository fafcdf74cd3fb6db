"""Documents as fine-tuning chats: rows of ``{"messages", "task", "source", "license", "group", "synthetic"}``; ``group`` is the
document's, so that what is asked and what a router is fitted to can be kept apart (`evaluate.halves`).

    code              a function's signature and docstring -> its code
    summarisation     a function's code -> the first sentence of its docstring
    image question    an image with a question -> the answer; training rows ask several questions in turn
    question          the same without an image
    customer service  templates (`customer_service`), marked synthetic

Notable: a held-out row comes from a held-out document, and asks one thing, so that its answer can be scored.
"""

from __future__ import annotations

import base64
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shoal.config import ModelConfig
from shoal.data import tables
from shoal.data.chats.rows import HELDOUT
from shoal.data.documents import Document
from shoal.data.sources import pysource
from shoal.errors import RequestError
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import aside

MOST = {"train": 20_000, "heldout": 1_000}  # rows of one task; of more, some drawn by their hash
FILES = {"train": "sft-train.jsonl", "heldout": HELDOUT}
CHATS, ASKED = ".chats", ".asked"  # suffixes of a part's tables
OPENED = 64  # of them at once

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """One row of a fine-tuning file."""

    messages: Messages
    task: str
    source: str
    license: str
    group: str
    synthetic: bool = False

    @property
    def json(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=False)


def chats_of(document: Document, split: str) -> Iterator[Chat]:
    """The chats that the recipes make of one document; none for most."""
    if document.questions:
        yield from _questions(document, together=split == "train")
    elif document.modality == "code" and document.origin.endswith(".py"):
        yield from _functions(document)


def fits(chat: Chat, tokenizer: Tokenizer, config: ModelConfig) -> bool:
    """Whether a chat can be read, is no longer than a training row, and answers in at most half of one."""
    try:
        row = encode_chat(chat.messages, tokenizer, config, add_generation_prompt=False)
    except RequestError:
        return False
    return len(row.ids) <= config.train_length and sum(row.answer) <= config.train_length // 2


def turns(*texts: Any) -> Messages:
    """Messages of a user and an assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _questions(document: Document, *, together: bool) -> Iterator[Chat]:
    task = "image question" if document.image else "question"
    rows = [document.questions] if together else [(pair,) for pair in document.questions]
    for pairs in rows:
        texts: list[Any] = [text for pair in pairs for text in pair]
        if document.image:
            url = f"data:{_mime(document.image)};base64,{base64.b64encode(document.image).decode()}"
            texts[0] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": texts[0]}]
        yield Chat(turns(*texts), task, document.source, document.license, document.group)


def _mime(image: bytes) -> str:
    starts = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
    return next((kind for start, kind in starts.items() if image.startswith(start)), "image/webp")


def _functions(document: Document) -> Iterator[Chat]:
    for function in pysource.functions(document.text):
        sentence = function.summary.split(". ")[0].rstrip(".") + "."
        yield Chat(
            turns(f"Write this function: {sentence}\n{function.signature}", function.code),
            "code",
            document.source,
            document.license,
            document.group,
        )
        yield Chat(
            turns(f"Summarise this function:\n{function.code}", sentence),
            "summarisation",
            document.source,
            document.license,
            document.group,
        )


@dataclass
class ChatFiles:
    """The chats of one part that may come into the fine-tuning files of its corpus: at most `MOST` of a task, drawn by hash.
    Equal ones are kept once: functions are copied between files."""

    seed: int
    _drawn: dict[str, set[int]] = field(default_factory=lambda: {split: set() for split in FILES})
    # (split, task) -> heap, last drawn first
    _kept: dict[tuple[str, str], list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, split: str, chats: Iterable[Chat]) -> None:
        for chat in chats:
            draw = xxhash.xxh3_64_intdigest(json.dumps(chat.messages).encode(), seed=self.seed)
            if draw in self._drawn[split]:
                continue
            self._drawn[split].add(draw)
            heap = self._kept.setdefault((split, chat.task), [])
            (heapq.heappush if len(heap) < MOST[split] else heapq.heappushpop)(heap, (-draw, chat.json))

    def save(self, path: Path) -> list[Path]:
        """Write what was drawn beside `path`, and the draws of all that training may be asked; the files."""
        rows = sorted((*of, -draw, row) for of, heap in self._kept.items() for draw, row in heap)
        split, task, draw, row = zip(*rows, strict=True) if rows else ((),) * 4
        strings = {"split": split, "task": task, "row": row}
        columns = {name: pa.array(values, pa.large_string()) for name, values in strings.items()}
        columns["draw"] = pa.array(draw, pa.uint64())
        tables.write_batch(path.with_suffix(CHATS), pa.record_batch(columns))
        tables.write(path.with_suffix(ASKED), {"draw": np.array(sorted(self._drawn["train"]), dtype=np.uint64)})
        return [path.with_suffix(suffix) for suffix in (CHATS, ASKED)]


def write_chats(paths: Sequence[Path], directory: Path) -> dict[str, dict[str, int]]:
    """Write the fine-tuning files of the splits that have rows, and remove older ones of the others; split -> task -> rows.
    `paths`: what chats were saved beside, part after part.

    At most `MOST` rows of a task, drawn by hash, in an order drawn likewise; equal chats are kept once, the first of them, and
    never on both sides. One part is open at a time, and what is held is a few numbers for each row that stays.
    """
    kept: dict[tuple[str, str], np.ndarray] = {}  # (split, task) -> draw, part, place; in the order of the draws
    for part, path in enumerate(paths):
        for of, found in _saved(path, part).items():
            both = np.concatenate([kept[of], found]) if of in kept else found
            kept[of] = both[np.unique(both[:, 0], return_index=True)[1]][: MOST[of[0]]]
    for of in [of for of in kept if of[0] == "heldout"]:
        for path in paths:
            asked = tables.read(path.with_suffix(ASKED))["draw"]
            kept[of] = kept[of][~np.isin(kept[of][:, 0], asked)]
    opened = lru_cache(OPENED)(lambda part: tables.read_batch(paths[part].with_suffix(CHATS)).column("row"))
    counts: dict[str, dict[str, int]] = {}
    for split, name in FILES.items():
        some = {task: found for (of, task), found in sorted(kept.items()) if of == split and len(found)}
        if not some:
            (directory / name).unlink(missing_ok=True)
            continue
        rows = np.concatenate(list(some.values()))
        with aside(directory / name) as beside, beside.open("w", encoding="utf-8") as file:
            for _, part, place in rows[np.argsort(rows[:, 0], kind="stable")].tolist():
                file.write(opened(part)[place].as_py() + "\n")
        counts[split] = {task: len(found) for task, found in some.items()}
    return counts


def _saved(path: Path, part: int) -> dict[tuple[str, str], np.ndarray]:
    """Of each split and task the draw, part and place of the chats that were saved beside `path`; uint64 [rows, 3]."""
    batch = tables.read_batch(path.with_suffix(CHATS))
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    columns = (batch.column(name).to_pylist() for name in ("split", "task", "draw"))
    for place, (split, task, draw) in enumerate(zip(*columns, strict=True)):
        found.setdefault((split, task), []).append((draw, part, place))
    return {of: np.array(rows, dtype=np.uint64) for of, rows in found.items()}
