"""What the model reads: chats, texts and token ids of a body as prompts that fit its context.

Notable: a text that no tokenisation could fit is refused before time is spent on encoding it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from shoal.api.bodies import DetokenizeRequest, Message, TokenizeRequest
from shoal.api.limits import Limits, at_most
from shoal.api.served import ServedModel
from shoal.api.tools import as_native, as_plain
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.stand_ins import texts_in
from shoal.inputs.templates import GIVEN, variables
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID

SETTINGS_CHARACTERS = 4096  # of a chat template's own, in all

_MOST = "this model's maximum context length is"  # OpenAI's words, by which litellm and others know this error


def encode_messages(
    messages: Sequence[Message],
    served: ServedModel,
    limits: Limits,
    *,
    add_generation_prompt: bool = True,
    system: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    bounded: bool = False,
    settings: Mapping[str, Any] | None = None,
    continue_final: bool = False,
) -> Encoded:
    """The chat as the model reads it, with `system` added to its system text, and `tools` as its own chat template shows them
    where it knows any. Raises RequestError with param ``messages`` for
    too many parts, a bad image, or more text than `limits` let be tokenized; with `bounded` ContextLengthError, before it is
    encoded, for text that cannot fit."""
    at_most("messages", len(messages), limits.messages)
    plain = (as_plain if getattr(served.tokenizer, "calls", None) is None else as_native)(messages, system)
    parts = [part for m in plain if isinstance(m["content"], list) for part in m["content"]]
    at_most("messages", sum(part["type"] == "image_url" for part in parts), limits.images, "images")
    texts = [m["content"] for m in plain if isinstance(m["content"], str)] + [p.get("text", "") for p in parts]
    texts += texts_in([tools or [], *(m.get("tool_calls", []) for m in plain)])
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
        settings=settings,
        continue_final=continue_final,
        answers=False,
        tools=tools,
    )


def template_settings(given: Mapping[str, Any], served: ServedModel) -> tuple[dict[str, Any], list[str]]:
    """Of `given` what the model's chat template reads, and the names of the rest. Raises RequestError (param
    ``chat_template_kwargs``) for what is given to it otherwise, and for a text that could spell a control token."""
    param = "chat_template_kwargs"
    own = GIVEN if getattr(served.tokenizer, "calls", None) is None else (*GIVEN, "tools")
    ours = next((name for name in given if name in own), None)
    if ours is not None:
        raise RequestError(f"{param}.{ours}"[:80], param=param, do="give it in the body itself")
    used = {name: value for name, value in given.items() if name in variables(served.chat_template)}
    texts = list(texts_in(used))
    if any(mark in text for text in texts for mark in "<|>\ue000\ue001"):
        raise RequestError(param, param=param, allowed="texts without < | and >")
    at_most(param, sum(map(len, texts)), SETTINGS_CHARACTERS, "characters")
    return used, [name for name in given if name not in used]


def truncated(prompt: Encoded, most: int | None, max_tokens: int | None, served: ServedModel) -> Encoded:
    """The last `most` tokens of `prompt`; with -1 as many as leave room for the answer. Raises RequestError."""
    param = "truncate_prompt_tokens"
    if most is None:
        return prompt
    if most != -1 and not 1 <= most <= served.config.context:
        raise RequestError(param, param=param, got=most, allowed=f"-1, or 1 to {served.config.context}")
    keep = served.config.context - (max_tokens or 1) if most == -1 else most
    if keep < 1 or len(prompt.ids) <= keep:
        return prompt
    if prompt.images:
        raise RequestError(f"{param} with images", param=param, do="leave it out, or the images")
    return Encoded(prompt.ids[-keep:])


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


def prompt_ids(
    prompt: str | list[int], served: ServedModel, param: str, *, unbounded: Limits | None = None
) -> list[int]:
    """The token ids of one prompt; with `unbounded` it may be longer than the context, within those limits. Raises RequestError
    naming `param` for none, or for ids that are no text's; ContextLengthError."""
    if unbounded is not None:
        at_most(param, len(prompt), unbounded.tokenized)
    elif isinstance(prompt, str):
        _may_fit(len(prompt), served, param)
    ids = served.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
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
