"""A request body as engine requests: names checked, text and images encoded, lengths fitted to the context.

Everything here is a pure function that may take milliseconds (tokenising, decoding images): routes run it in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from shoal.api.served import ServedModel
from shoal.api.wire import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    ModelNotFoundError,
    TokenizeRequest,
)
from shoal.engine.events import Request, Sampling
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID

EFFORT_DEPTH = {"low": "shallow", "medium": "auto", "high": "full"}


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may ask for."""

    body_bytes: int = 16 * 2**20  # counted as they arrive, before anything is parsed
    messages: int = 1024
    images: int = 16
    choices: int = 64  # prompts times n
    stops: int = 16
    seconds: float = 600.0  # then the request ends with 408


@dataclass(frozen=True)
class Work:
    """One HTTP request as engine requests: `requests[i]` makes choice i, and every `n` in a row share a prompt."""

    requests: list[Request]
    n: int
    echo: list[str]  # put before the text of each choice; empty strings without echo


def chat_work(body: ChatRequest, served: ServedModel, limits: Limits) -> Work:
    """Raises RequestError naming the field that cannot be served; ModelNotFoundError; ContextLengthError."""
    check_model(body.model, served)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs", param="top_logprobs", do="set logprobs to true as well")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens", param="max_tokens", do="give one of them")
    if body.reasoning_effort and body.depth is not None:
        raise RequestError("reasoning_effort and depth", param="depth", do="give one of them")
    encoded = encode_messages(body.messages, served, limits)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    sampling = _sampling(body, served, limits, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)
    depth = EFFORT_DEPTH[body.reasoning_effort] if body.reasoning_effort else body.depth
    return _work(body, [encoded], sampling, max_tokens, depth, served, limits)


def completion_work(body: CompletionRequest, served: ServedModel, limits: Limits) -> Work:
    """As `chat_work`, for one prompt or several, each text or token ids."""
    check_model(body.model, served)
    if body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs", param="logprobs", do="logprobs of the prompt are not supported yet")
    one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    prompts = cast("list[str | list[int]]", [body.prompt] if one else body.prompt)
    _at_most("prompt", len(prompts) * max(body.n, 1), limits.choices, "prompts times n")
    ids = [_prompt_ids(prompt, served) for prompt in prompts]
    sampling = _sampling(body, served, limits, body.max_tokens, body.logprobs)
    work = _work(body, [Encoded(p) for p in ids], sampling, body.max_tokens, body.depth, served, limits)
    if not body.echo:
        return work
    texts = [p if isinstance(p, str) else served.tokenizer.decode(p) for p in prompts]
    return replace(work, echo=[text for text in texts for _ in range(body.n)])


def tokenize(body: TokenizeRequest, served: ServedModel, limits: Limits) -> list[int]:
    """Token ids of a text or of a chat. Raises RequestError unless exactly one of them is given."""
    check_model(body.model, served)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt and messages", param="prompt", do="give one of them")
    if body.messages is None:
        return served.tokenizer.encode(body.prompt or "")
    return encode_messages(body.messages, served, limits, add_generation_prompt=body.add_generation_prompt).ids


def encode_messages(
    messages: Sequence[Message], served: ServedModel, limits: Limits, *, add_generation_prompt: bool = True
) -> Encoded:
    """The chat as the model reads it. Raises RequestError with param ``messages`` for too many parts or a bad image."""
    _at_most("messages", len(messages), limits.messages)
    plain = [message.model_dump() for message in messages]
    for message in plain:
        message["role"] = "system" if message["role"] == "developer" else message["role"]
    images = sum(part["type"] == "image_url" for m in plain if isinstance(m["content"], list) for part in m["content"])
    _at_most("messages", images, limits.images, "images")
    return encode_chat(
        plain,
        served.tokenizer,
        served.config,
        template=served.chat_template,
        add_generation_prompt=add_generation_prompt,
    )


def check_model(name: str | None, served: ServedModel) -> None:
    """Raises ModelNotFoundError unless `name` is the served model's; None passes."""
    if name not in (None, served.name):
        raise ModelNotFoundError(f"model {name[:100]!r} does not exist", param="model", allowed=[served.name])


def check_ids(ids: Sequence[int], served: ServedModel, param: str) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    wrong = next((i for i in ids if not 0 <= i < served.config.vocab), None)
    if wrong is not None:
        raise RequestError(f"{param}: token id", param=param, got=wrong, allowed=f"0 to {served.config.vocab - 1}")


def derived_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of n choices: the request's own for the first, unrelated ones for the others."""
    if seed is None:
        return None
    if choice == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8]) >> 1


def _work(
    body: GenerationRequest,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    max_tokens: int | None,
    depth: str | int | None,
    served: ServedModel,
    limits: Limits,
) -> Work:
    if body.n < 1:
        raise RequestError("n", param="n", got=body.n, allowed="1 or more")
    _at_most("n", len(prompts) * body.n, limits.choices, "prompts times n")
    exits = served.config.exit_names
    depth = "auto" if depth is None else depth
    if depth not in ("auto", *exits, *exits.values()):
        raise RequestError("depth", param="depth", got=depth, allowed=["auto", *exits, *exits.values()])
    if depth != "auto" and body.quality_tolerance is not None:
        raise RequestError("quality_tolerance and depth", param="quality_tolerance", do="give one of them")
    requests = []
    for prompt in prompts:
        fitted = replace(sampling, max_tokens=_fit(len(prompt.ids), max_tokens, served.config.context))
        requests += [
            Request(
                prompt,
                replace(fitted, seed=derived_seed(body.seed, choice)),
                depth,
                body.quality_tolerance,
                deadline=limits.seconds,
            )
            for choice in range(body.n)
        ]
    return Work(requests, body.n, [""] * len(requests))


def _sampling(
    body: GenerationRequest, served: ServedModel, limits: Limits, max_tokens: int | None, logprobs: int | None
) -> Sampling:
    """Raises RequestError; `Sampling` itself checks the ranges that do not depend on the model."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    _at_most("stop", len(stop), limits.stops)
    check_ids(body.stop_token_ids, served, "stop_token_ids")
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        max_tokens=served.config.context if max_tokens is None else max_tokens,
        min_tokens=body.min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, served),
        logprobs=logprobs,
    )


def _logit_bias(given: dict[str, float], served: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not key.isdecimal() or not -100 <= value <= 100:
            raise RequestError(
                "logit_bias", param="logit_bias", got={key[:20]: value}, allowed="token id -> number from -100 to 100"
            )
        bias[int(key[:20])] = value
    check_ids(list(bias), served, "logit_bias")
    return bias


def _prompt_ids(prompt: str | list[int], served: ServedModel) -> list[int]:
    ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise RequestError("prompt", param="prompt", got="", allowed="at least one token")
    check_ids(ids, served, "prompt")
    image = next((i for i in ids if i in (IMG_ID, IMG_END_ID, ROW_ID, PATCH_ID)), None)
    if image is not None:
        raise RequestError("prompt: token id of an image", param="prompt", got=image, do="send images through chat")
    return ids


def _fit(prompt_tokens: int, max_tokens: int | None, context: int) -> int:
    """How many tokens may be generated: `max_tokens`, or all that the context has left."""
    left = context - prompt_tokens
    if left < 1 or (max_tokens is not None and max_tokens > left):
        asked = "an answer" if max_tokens is None else f"max_tokens = {max_tokens}"
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens and {asked} do not fit the context of {context} tokens",
            param="messages" if max_tokens is None else "max_tokens",
            do="shorten the prompt or ask for less",
        )
    return left if max_tokens is None else max_tokens


def _at_most(param: str, got: int, allowed: int, what: str | None = None) -> None:
    if got > allowed:
        raise RequestError(f"too many {what or param}", param=param, got=got, allowed=f"at most {allowed}")
