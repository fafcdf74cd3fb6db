"""Chat messages to token ids, through the model's own ``chat_template.jinja``.

Notable: the template sees a placeholder for every piece of content, never the content itself, so neither a user's text
nor an image can spell a control token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.config import ModelConfig
from shoal.errors import RequestError
from shoal.inputs import media
from shoal.inputs.tokenizer import END_ID, Tokenizer

ROLES = ("system", "user", "assistant")
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


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    add_generation_prompt: bool = True,
) -> Encoded:
    """Messages ``{"role", "content"}`` (content: text, or OpenAI parts of type text and image_url) as one prompt.

    With `add_generation_prompt` the assistant's turn is opened at the end. Raises RequestError (param ``messages``) for
    an unknown role, an unknown part, a broken image, or a template that fails.
    """
    contents = [_content(message, index, tokenizer, config) for index, message in enumerate(messages)]
    shown = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    try:
        text = _compiled(template).render(messages=shown, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # of the template's own making, 1/0 included
        got = f"{type(error).__name__}: {error}"[:160]
        raise RequestError("chat template failed", param="messages", got=got) from error
    ids: list[int] = []
    answer: list[bool] = []
    images: list[media.Patches] = []
    answered = False  # does the next <|end|> close an answer?
    for index, piece in enumerate(_PLACE.split(text)):
        if index % 2:  # the pieces alternate: template, content number, template, ...
            part = contents[int(piece)]
            answered = messages[int(piece)]["role"] == "assistant"
            ids += part.ids
            images += part.images
            answer += [answered] * len(part.ids)
        else:
            for token in tokenizer.template_ids(piece):
                ids.append(token)
                answer.append(answered and token == END_ID)
                answered = False
    return Encoded(ids, images, answer)


def _content(message: Mapping[str, Any], index: int, tokenizer: Tokenizer, config: ModelConfig) -> Encoded:
    where = f"messages[{index}]"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}.role", param="messages", got=role, allowed=ROLES)
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise RequestError(
            f"{where}.content", param="messages", got=type(content).__name__, allowed="text or a list of parts"
        )
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


@lru_cache(maxsize=8)  # compiling takes longer than encoding a short chat
def _compiled(template: str) -> Template:
    return _environment.from_string(template)


_environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
