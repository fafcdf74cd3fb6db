"""Documents as fine-tuning chats: rows of ``{"messages", "task", "source", "license", "group", "synthetic"}``; ``group`` is the
document's, so that what is asked and what a router is fitted to can be kept apart (`train.halves`).

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from shoal.config import ModelConfig
from shoal.data.chats.rows import HELDOUT
from shoal.data.documents import Document
from shoal.data.sources import pysource
from shoal.errors import RequestError
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import write_aside

MOST = {"train": 20_000, "heldout": 1_000}  # rows of one task; of more, some drawn by their hash
FILES = {"train": "sft-train.jsonl", "heldout": HELDOUT}

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
    """The fine-tuning files of a corpus: at most `MOST` rows of a task, drawn by hash, in an order drawn likewise.

    Equal chats are kept once, and never on both sides: functions are copied between files, and would be asked as seen.
    """

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

    def write(self, directory: Path) -> dict[str, dict[str, int]]:
        """Write the files of the splits that have rows, and remove older ones of the others; split -> task -> rows."""
        counts: dict[str, dict[str, int]] = {}
        for split, name in FILES.items():
            seen = self._drawn["train"] if split == "heldout" else set()
            kept = {
                task: [r for r in heap if -r[0] not in seen] for (of, task), heap in self._kept.items() if of == split
            }
            rows = sorted((row for some in kept.values() for row in some), reverse=True)
            if not rows:
                (directory / name).unlink(missing_ok=True)
            else:
                write_aside(directory / name, "\n".join(row for _, row in rows) + "\n")
                counts[split] = {task: len(some) for task, some in sorted(kept.items()) if some}
        return counts
