"""Chat messages to token ids, through the model's own ``chat_template.jinja``.

Notable: our template sees a placeholder for every piece of content, never the content itself, so neither a user's text
nor an image can spell a control token. An open model's template may compute with the content, so it sees it, with other
characters for those of control tokens (`stand_ins`); what lies between the control tokens of the whole is encoded as one, as
transformers does it (`_rendered_whole`). One that knows tools (`Tokenizer.calls`) sees them, calls and results as values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import ModelConfig
from shoal.errors import RequestError
from shoal.inputs import media
from shoal.inputs.stand_ins import StandIns
from shoal.inputs.templates import EndlessTemplateError, rendered
from shoal.inputs.tokenizer import END_ID, Tokenizer
from shoal.inputs.tools import parsed

ROLES = ("system", "user", "assistant")
TOOL = "tool"  # a fourth, of what calls gave, where the chat template knows tools
DEFAULT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")

_PLACE = re.compile("\ue000([0-9]+)\ue001")  # private-use marks around a content's number


@dataclass(frozen=True)
class Encoded:
    """What a model reads: `ids`, the `images` whose patches stand at the ids' patch tokens in order, and `answer`,
    true where an id was written by the assistant (the only places fine-tuning takes a loss)."""

    ids: list[int]
    images: list[media.Patches] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)

    @property
    def patches(self) -> np.ndarray | None:
        """uint8 [N, V] for all images in order, or None."""
        return np.concatenate([image.values for image in self.images]) if self.images else None

    def cut(self, start: int, length: int) -> Encoded:
        """`length` of the ids from `start` on, of what has no images."""
        return Encoded(self.ids[start : start + length], [], self.answer[start : start + length])


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    add_generation_prompt: bool = True,
    settings: Mapping[str, Any] | None = None,
    continue_final: bool = False,
    answers: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Encoded:
    """Messages ``{"role", "content"}`` (content: text, or OpenAI parts of type text and image_url) as one prompt.

    With `add_generation_prompt` the assistant's turn is opened at the end; with `continue_final` the last message is left open
    instead. `tools` (as `call_formats.offered` has them), messages of role tool and ``tool_calls`` are for a tokenizer with
    `calls` alone. `settings` are more that the template may read (`variables`); no text in them may spell a control token.
    Without `answers` it may not be said which ids the assistant wrote, for which an open model's template is run again for
    each. Raises RequestError (param ``messages``) for an unknown role, an unknown part, a broken image, or a template that
    fails.
    """
    if getattr(tokenizer, "controls", None) is not None:
        opened = add_generation_prompt and not continue_final
        more = {**(settings or {}), **({"tools": list(tools)} if tools else {})}
        whole = _rendered_whole(messages, tokenizer, template, opened, more, continue_final)
        marked = answers and not opened and not continue_final
        return Encoded(whole, [], _answers(whole, messages, tokenizer, template, more) if marked else [])
    contents = [_content(message, index, tokenizer, config) for index, message in enumerate(messages)]
    shown = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    opened = add_generation_prompt and not continue_final
    text = rendered(template, {"messages": shown, "add_generation_prompt": opened, **(settings or {})})
    ids: list[int] = []
    answer: list[bool] = []
    images: list[media.Patches] = []
    answered = False  # does the next <|end|> close an answer?
    pieces = _PLACE.split(text)
    if continue_final:
        if len(pieces) < 3 or int(pieces[-2]) != len(messages) - 1:
            raise RequestError("chat template", param="messages", do="it does not end with the last message")
        pieces.pop()  # what closes it
    for index, piece in enumerate(pieces):
        if index % 2:  # the pieces alternate: template, content number, template, ...
            part = contents[int(piece)]
            answered = is_learned(messages[int(piece)])
            ids += part.ids
            images += part.images
            answer += [answered] * len(part.ids)
        else:
            for token in tokenizer.template_ids(piece):
                ids.append(token)
                answer.append(answered and token == END_ID)
                answered = False
    return Encoded(ids, images, answer)


def _rendered_whole(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str,
    add_generation_prompt: bool,
    settings: Mapping[str, Any],
    continue_final: bool,
) -> list[int]:
    """Ids of the chat as an open model's template writes it, with the content in its place: those that transformers gives,
    but that a control token which a user spells stays text."""
    assert tokenizer.controls is not None
    shown = [_shown(message, index, tokenizer) for index, message in enumerate(messages)]
    try:
        shown = shown if tokenizer.calls is None else tokenizer.calls.for_template(shown)
        stand_ins = StandIns(tokenizer, template, [*shown, settings])
        shown = [stand_ins.message(message) for message in shown]
        settings = stand_ins.put(settings)
    except RecursionError:
        raise RequestError(
            "messages", param="messages", got="values in values, too deep", do="leave some out"
        ) from None
    given = {"tools": None, "documents": None, **settings, **tokenizer.controls.names}
    text = rendered(template, {"messages": shown, "add_generation_prompt": add_generation_prompt, **given})
    if continue_final:
        last = shown[-1]["content"].strip()
        if last not in text:
            raise RequestError("chat template", param="messages", do="it does not end with the last message")
        text = text[: text.rindex(last) + len(last)]
    return tokenizer.template_ids(text, stand_ins.back)


def _shown(message: Mapping[str, Any], index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A message to an open model's template: its text, and the calls that it makes or the call that it answers."""
    calls = message.get("tool_calls") if tokenizer.calls is not None else None
    said = {**message, "content": ""} if calls and message.get("content") is None else message
    shown = {"role": message.get("role"), "content": _text(said, index, tokenizer)}
    if calls:
        functions = [(call, call["function"]) for call in calls]
        shown["tool_calls"] = [
            {**call, "function": {"name": its["name"], "arguments": parsed(its.get("arguments"))}}
            for call, its in functions
        ]
    if message.get("role") == TOOL:
        shown["tool_call_id"] = message.get("tool_call_id")
    return shown


def _answers(
    ids: list[int],
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str,
    settings: Mapping[str, Any],
) -> list[bool]:
    """Which of the `ids` of a chat the assistant wrote, the token that ends an answer included: what a message adds to the chat
    before it with the assistant's turn opened. An answer that the template shows otherwise later on, as one whose thoughts it
    leaves out, is none: it was not written like that."""
    answer = [False] * len(ids)
    messages = messages if tokenizer.calls is None else tokenizer.calls.turns(messages)
    for place, message in enumerate(messages):
        if not is_learned(message):
            continue
        try:
            before, after = (
                _rendered_whole(messages[: place + more], tokenizer, template, not more, settings, False)
                for more in (0, 1)
            )
        except EndlessTemplateError:  # again for each message
            raise
        except RequestError:  # of a template that wants a user's message first
            continue
        start = len(before)
        end = next((at + 1 for at in range(start, len(after)) if after[at] in tokenizer.ends), len(after))
        if after[:start] == before and ids[:end] == after[:end]:
            answer[start:end] = [True] * (end - start)
    return answer


def is_learned(message: Mapping[str, Any]) -> bool:
    """Is a loss taken on a message? OpenAI's ``weight`` of 0 is for answers that are only read."""
    return message.get("role") == "assistant" and message.get("weight") != 0


def _text(message: Mapping[str, Any], index: int, tokenizer: Tokenizer) -> str:
    """The content of a message to a model that reads text alone."""
    parts = _parts(message, index, ROLES if tokenizer.calls is None else (*ROLES, TOOL))
    odd = next((part.get("type") for part in parts if part.get("type") != "text"), None)
    if odd is not None or not all(isinstance(part.get("text"), str) for part in parts):
        where = f"messages[{index}].content part"
        raise RequestError(where, param="messages", got=odd or "no text", allowed="text: this model reads no images")
    return "".join(part["text"] for part in parts)


def _parts(message: Mapping[str, Any], index: int, roles: Sequence[str] = ROLES) -> Sequence[Mapping[str, Any]]:
    where = f"messages[{index}]"
    role, content = message.get("role"), message.get("content")
    if role not in roles:
        raise RequestError(f"{where}.role", param="messages", got=role, allowed=roles)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise RequestError(
            f"{where}.content", param="messages", got=type(content).__name__, allowed="text or a list of parts"
        )
    return parts


def _content(message: Mapping[str, Any], index: int, tokenizer: Tokenizer, config: ModelConfig) -> Encoded:
    parts, where, role = _parts(message, index), f"messages[{index}]", message.get("role")
    ids: list[int] = []
    images: list[media.Patches] = []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            ids += tokenizer.encode(part["text"])
        elif kind == "image_url" and role == "user":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str):
                raise RequestError(
                    f"{where}.image_url", param="messages", got=url, allowed='{"url": "data:image/png;base64,..."}'
                )
            if not config.image_size:
                raise RequestError(
                    f"{where}.image_url", param="messages", do="leave it out: this model reads text alone"
                )
            try:
                image = media.patches_of(media.from_data_url(url), config)
            except RequestError as error:
                raise RequestError(f"{where}: {error.message}", param="messages") from error
            ids += image.tokens()
            images.append(image)
        else:
            raise RequestError(
                f"{where}.content part", param="messages", got=kind, allowed="text; image_url in a user message"
            )
    return Encoded(ids, images)
