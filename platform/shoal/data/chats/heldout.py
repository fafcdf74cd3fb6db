"""Held-out chats as questions: what a model is asked when it is measured, read and refused by one reader for training, for the
router's fit and for the evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.data.chats.rows import chats, unusable
from shoal.errors import RequestError
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A held-out chat row: the prompt up to the assistant's turn, the whole row, and the reference answer."""

    prompt: Encoded
    row: Encoded
    reference: str
    task: str
    group: int  # rows of one document are of one group


def questions(
    path: str | Path, tokenizer: Tokenizer, config: ModelConfig, template: str, *, limit: int | None = None
) -> dict[str, list[Question]]:
    """The rows of a held-out JSONL by task, at most `limit` a task, in file order; each asks for its last answer. Raises
    DataError with the line number of a row that has none or cannot be read."""

    def refuse(line: int, reason: str) -> None:
        raise unusable(path, line, reason)

    found: dict[str, list[Question]] = {}
    for chat in chats(path, tokenizer, config, template, refuse, heldout=True):
        if not chat.messages:
            refuse(chat.line, "a text, which asks nothing")
        if limit is not None and len(found.get(chat.task, ())) >= limit:
            continue
        last = max(place for place, message in enumerate(chat.messages) if message["role"] == "assistant")
        asked, whole = chat.messages[:last], chat.messages[: last + 1]
        try:
            prompt = encode_chat(asked, tokenizer, config, template=template, tools=chat.tools)
            row = encode_chat(
                whole, tokenizer, config, template=template, add_generation_prompt=False, tools=chat.tools
            )
        except RequestError as error:
            raise unusable(path, chat.line, error.message) from error
        if whole[-1].get("tool_calls"):  # as the template has the model write them
            reference = tokenizer.decode(
                [
                    token
                    for token, said in zip(row.ids[len(prompt.ids) :], row.answer[len(prompt.ids) :], strict=True)
                    if said
                ]
            )
        else:
            reference = _text(whole[-1]["content"])
        found.setdefault(chat.task, []).append(Question(prompt, row, reference, chat.task, chat.group))
    return found


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """An answer, which may be given in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
