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
from shoal.inputs.chat import Encoded, encode_chat, is_learned
from shoal.inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A held-out chat row: the prompt up to the assistant's turn, the whole row, and the reference answer."""

    prompt: Encoded
    row: Encoded
    reference: str
    task: str
    group: int  # rows of one document are of one group
    sent: Mapping[str, Any] | None = None  # `forms.as_sent`, where there are tools or a format


def questions(
    path: str | Path, tokenizer: Tokenizer, config: ModelConfig, template: str, *, limit: int | None = None
) -> dict[str, list[Question]]:
    """The rows of a held-out JSONL by task, at most `limit` a task, in file order; each asks for its last answer, of those that
    are learned: one of weight 0 is no answer to be measured by. Raises DataError with the line number of a row that has none or
    cannot be read."""

    def refuse(line: int, reason: str) -> None:
        raise unusable(path, line, reason)

    found: dict[str, list[Question]] = {}
    for chat in chats(path, tokenizer, config, template, refuse, heldout=True):
        if not chat.messages:
            refuse(chat.line, "a text, which asks nothing")
        if limit is not None and len(found.get(chat.task, ())) >= limit:
            continue
        asked, whole = _asked(chat.messages, tokenizer)
        try:
            prompt = encode_chat(asked, tokenizer, config, template=template, tools=chat.tools)
            row = encode_chat(
                whole, tokenizer, config, template=template, add_generation_prompt=False, tools=chat.tools
            )
        except RequestError as error:
            raise unusable(path, chat.line, error.message) from error
        if whole[-1].get("tool_calls"):  # as the template has the model write them
            places = range(len(prompt.ids), len(row.ids))
            reference = tokenizer.decode(row.ids[place] for place in places if row.answer[place])
            if not reference:
                refuse(chat.line, "a call that the chat template shows otherwise than it was asked for")
        else:
            reference = _text(whole[-1]["content"])
        sent = chat.sent and {**chat.sent, "messages": chat.sent["messages"][: _last(chat.sent["messages"])]}
        found.setdefault(chat.task, []).append(Question(prompt, row, reference, chat.task, chat.group, sent))
    return found


def _asked(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]:
    """What is asked of `messages`, and this with the answer to it. Of several calls that are messages of their own the first is
    the answer: no more than that follows before its result."""
    last = _last(messages)
    asked, answer = messages[:last], messages[last]
    if tokenizer.calls is not None:
        answer = tokenizer.calls.turns([answer])[0]
    return asked, [*asked, answer]


def _last(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where the answer stands that is asked for."""
    return max(place for place, message in enumerate(messages) if is_learned(message))


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """An answer, which may be given in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
