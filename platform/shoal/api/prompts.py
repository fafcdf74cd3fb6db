"""What the model reads: chats, texts and token ids of a body as prompts that fit its context.

Notable: a text that no tokenisation could fit is refused before time is spent on encoding it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from shoal.api.bodies import DetokenizeRequest, Message, TokenizeRequest
from shoal.api.limits import Limits, at_most
from shoal.api.served import ServedModel
from shoal.api.tools import as_plain
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID

_MOST = "this model's maximum context length is"  # OpenAI's words, by which litellm and others know this error


def encode_messages(
    messages: Sequence[Message],
    served: ServedModel,
    limits: Limits,
    *,
    add_generation_prompt: bool = True,
    system: str = "",
    bounded: bool = False,
) -> Encoded:
    """The chat as the model reads it, with `system` added to its system text. Raises RequestError with param ``messages`` for
    too many parts, a bad image, or more text than `limits` let be tokenized; with `bounded` ContextLengthError, before it is
    encoded, for text that cannot fit."""
    at_most("messages", len(messages), limits.messages)
    plain = as_plain(messages, system)
    parts = [part for m in plain if isinstance(m["content"], list) for part in m["content"]]
    at_most("messages", sum(part["type"] == "image_url" for part in parts), limits.images, "images")
    texts = [m["content"] for m in plain if isinstance(m["content"], str)] + [p.get("text", "") for p in parts]
    characters = sum(map(len, texts))
    if bounded:
        _may_fit(characters, served, "messages")
    else:
        at_most("messages", characters, limits.tokenized, "characters")
    return encode_chat(
        plain,
        served.tokenizer,
        served.config,
        template=served.chat_template,
        add_generation_prompt=add_generation_prompt,
    )


def tokenize(body: TokenizeRequest, served: ServedModel, limits: Limits) -> list[int]:
    """Token ids of a text or of a chat; a text that is a control token's name, and no more, is that token. Raises RequestError
    unless exactly one of them is given."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt and messages", param="prompt", do="give one of them")
    if body.messages is not None:
        return encode_messages(body.messages, served, limits, add_generation_prompt=body.add_generation_prompt).ids
    text = body.prompt or ""
    if text in served.tokenizer.specials:  # so does lm-eval look up the id of the eos_token that /tokenizer_info names
        return [served.tokenizer.special(text)]
    at_most("prompt", len(text), limits.tokenized, "characters")
    return served.tokenizer.encode(text)


def detokenize(body: DetokenizeRequest, served: ServedModel, limits: Limits) -> str:
    """The text of token ids. Raises RequestError for an id outside the vocabulary, and for too many."""
    at_most("tokens", len(body.tokens), limits.tokenized)
    check_ids(body.tokens, served, "tokens")
    return served.tokenizer.decode(body.tokens)


def prompts_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    one = isinstance(given, str) or isinstance(given[0], int)
    return cast("list[str | list[int]]", [given] if one else given)


def prompt_ids(prompt: str | list[int], served: ServedModel, param: str) -> list[int]:
    """The token ids of one prompt. Raises RequestError naming `param` for none, or for ids that are no text's;
    ContextLengthError."""
    if isinstance(prompt, str):
        _may_fit(len(prompt), served, param)
    ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise RequestError(param, param=param, got="", allowed="at least one token")
    check_ids(ids, served, param)
    image = next((i for i in ids if i in (IMG_ID, IMG_END_ID, ROW_ID, PATCH_ID)), None)
    if image is not None and served.config.image_size:
        raise RequestError(f"{param}: token id of an image", param=param, got=image, do="send images through chat")
    return ids


def fit(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """How many tokens may be generated: `max_tokens`, or all that the context has left. Raises ContextLengthError."""
    left = context - prompt_tokens
    if left < 1 or (max_tokens is not None and max_tokens > left):
        asked = "an answer" if max_tokens is None else f"max_tokens = {max_tokens}"
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens and {asked} do not fit the context, and {_MOST} {context} tokens",
            param="messages" if max_tokens is None else "max_tokens",
            do="shorten the prompt or ask for less",
        )
    return left if max_tokens is None else max_tokens


def check_ids(ids: Sequence[int], served: ServedModel, param: str) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    wrong = next((i for i in ids if not 0 <= i < served.config.vocab), None)
    if wrong is not None:
        raise RequestError(f"{param}: token id", param=param, got=wrong, allowed=f"0 to {served.config.vocab - 1}")


def _may_fit(characters: int, served: ServedModel, param: str) -> None:
    """Raises ContextLengthError for a text that no tokenisation could fit, before time is spent on encoding it."""
    most = served.config.context * served.longest_token
    if characters > most:
        raise ContextLengthError(
            f"{characters} characters do not fit the context, and {_MOST} {served.config.context} tokens",
            param=param,
            do=f"send at most {most} characters",
        )
