"""A request body as engine requests: names checked, prompts encoded (`prompts`), lengths fitted to the context.

Everything here is a pure function that may take milliseconds (tokenising, decoding images): routes run it in a thread.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from shoal.api.bodies import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    ResponseFormat,
    StructuredOutputs,
)
from shoal.api.calls import Plain, Reader
from shoal.api.limits import Limits, at_most
from shoal.api.noticed import depth_by_policy, is_json, notice_of, noticed, said_by_user, without_notices
from shoal.api.policy import WORKLOAD
from shoal.api.prompts import check_ids, encode_messages, fit, prompt_ids, prompts_of, template_settings, truncated
from shoal.api.served import ServedModel
from shoal.api.tools import Offer, with_allowed
from shoal.api.wire import Wire, parse
from shoal.config import AUTO, FULL
from shoal.engine.events import Guide, Request, Sampling
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.described import DRAWN

EFFORT_DEPTH = {
    "none": "shallow",
    "minimal": "shallow",
    "low": "shallow",
    "medium": AUTO,
    "high": FULL,
    "xhigh": FULL,
    "max": FULL,
}


@dataclass(frozen=True)
class EngineCall:
    """One HTTP request as engine requests: `requests[i]` makes choice i, and every `n` in a row share a prompt."""

    requests: list[Request]
    n: int
    echo: list[str]  # put before the text of each choice; empty strings without echo
    silent: bool = False  # max_tokens 0: the one token that the engine needs to make is not shown
    guided_by: str = "guided"  # field that the grammar comes from
    token_ids: bool = False  # the answer tells them
    prompt_logprobs: bool = False  # and these
    offered: tuple[str, ...] = ()  # names of the tools that may be called
    unused: tuple[str, ...] = ()  # fields of the body that change nothing for this model
    reader: Callable[[], Reader] = Plain
    readers: tuple[Callable[[], Reader], ...] = ()  # of each prompt, where they differ

    def salted(self, salt: str) -> EngineCall:
        """It, as it finds what requests of that cache `salt` left in the prefix cache."""
        return replace(self, requests=[replace(each, cache_salt=salt) for each in self.requests])

    def read_by(self, choice: int) -> Reader:
        """What reads the answer of a choice."""
        return self.readers[choice // self.n]() if self.readers else self.reader()

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one that n choices share counts once."""
        return sum(len(cast(Encoded, request.prompt).ids) for request in self.requests[:: self.n])


@contextmanager
def told_as(names: Mapping[str, str], messages: Sequence[str] = ()) -> Iterator[None]:
    """In this block an error names the fields as the client did: `names` has them by those that are at fault, `messages` where
    each message of the chat comes from."""
    try:
        yield
    except RequestError as error:
        theirs = names.get(error.param or "", error.param)
        if messages and (found := re.match(r"messages\[(\d+)\]", error.message)):
            at = messages[min(int(found[1]), len(messages) - 1)]
            error.message, error.param = at + error.message[found.end() :], at
        elif theirs is not None and theirs != error.param:
            error.message = re.sub(rf"\b{error.param}\b", theirs, error.message, count=1)
            error.param = theirs
        error.args = (error.message,)
        raise


def chat_call(body: ChatRequest, served: ServedModel, limits: Limits) -> EngineCall:
    """Raises RequestError naming the field that cannot be served, as the client gave it; ContextLengthError."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens", param="max_tokens", do="give one of them")
    names = {"logprobs": "top_logprobs"}
    names |= {} if body.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
    with told_as(names):
        return _chat_call(body, served, limits)


def _chat_call(body: ChatRequest, served: ServedModel, limits: Limits) -> EngineCall:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs", param="top_logprobs", do="set logprobs to true as well")
    if body.reasoning_effort and body.depth is not None:
        raise RequestError("reasoning_effort and depth", param="depth", do="give one of them")
    at_most("tools", len(body.tools), limits.tools)
    _check_choices(1, body.n, limits)
    said, body = said_by_user(body.messages), without_notices(with_allowed(body), served)
    offer = Offer(body, served.tokenizer)
    guide, guided_by = _chat_guide(body, offer)
    told = "\n\n".join(text for text in (offer.system(), _format_told(body.response_format)) if text)
    settings, unused = template_settings(body.chat_template_kwargs, served)
    if body.continue_final_message:
        _check_final(body)
    encoded = encode_messages(
        body.messages,
        served,
        limits,
        system=told,
        tools=offer.shown,
        bounded=body.truncate_prompt_tokens is None,
        settings=settings,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final=body.continue_final_message,
    )
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    encoded = truncated(encoded, body.truncate_prompt_tokens, max_tokens, served)
    top = (body.top_logprobs or 0) if body.logprobs else None
    sampling = replace(_sampling(body, served, limits, max_tokens, top), guided=guide)
    formatted = guided_by == "response_format"
    if not formatted:
        sampling = replace(sampling, frame=offer.frame)
    depth = EFFORT_DEPTH[body.reasoning_effort] if body.reasoning_effort else body.depth
    depth = depth_by_policy(depth, body, served, body.metadata.get(WORKLOAD))
    call = _call(body, [encoded], sampling, max_tokens, depth, served, limits)
    call = replace(call, unused=tuple(f"chat_template_kwargs.{name}"[:80] for name in unused if name.isidentifier()))
    offered = tuple(offer.tools) if offer.told else ()
    whole = not offer.forced and (formatted or is_json(guide))
    reader = noticed(partial(offer.reader, formatted=formatted), notice_of(served, said), whole=whole)
    return replace(call, guided_by=guided_by, offered=offered, reader=reader)


def completion_call(body: CompletionRequest, served: ServedModel, limits: Limits) -> EngineCall:
    """As `chat_call`, for one prompt or several, each text or token ids."""
    silent = body.echo and body.max_tokens == 0
    if body.best_of not in (None, body.n):
        raise RequestError("best_of", param="best_of", got=body.best_of, do="use n, and choose by logprobs")
    prompts = prompts_of(body.prompt)
    _check_choices(len(prompts), body.n, limits)
    most = body.truncate_prompt_tokens
    long = None if most is None else limits
    whole = [Encoded(prompt_ids(prompt, served, "prompt", unbounded=long)) for prompt in prompts]
    max_tokens = 1 if silent else body.max_tokens
    read = [truncated(prompt, most, max_tokens, served) for prompt in whole]
    guides = {"structured_outputs": _guide(body.structured_outputs), "response_format": _format(body.response_format)}
    given = [name for name, guide in guides.items() if guide is not None]
    if len(given) > 1:
        raise RequestError(" and ".join(given), param=given[1], do="give one of them")
    guided_by = given[0] if given else "guided"
    sampling = replace(_sampling(body, served, limits, max_tokens, body.logprobs), guided=guides.get(guided_by))
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs with echo and logprobs", param="prompt_logprobs", do="give one of them")
        sampling = replace(sampling, prompt_logprobs=body.logprobs)
    depth = depth_by_policy(body.depth, body, served, None)
    call = _call(body, read, sampling, max_tokens, depth, served, limits)
    call = replace(call, silent=silent, guided_by=guided_by)
    if served.policy is not None and served.policy.notice and not silent:
        asked = [p if isinstance(p, str) else served.tokenizer.decode(p) for p in prompts]
        guided = is_json(sampling.guided)
        readers = tuple(noticed(Plain, notice_of(served, [text]), whole=guided) for text in asked)
        call = replace(call, readers=readers)
    if not body.echo:
        return call
    texts = [
        text if isinstance(text, str) and kept is all_ else served.tokenizer.decode(kept.ids)
        for text, all_, kept in zip(prompts, whole, read, strict=True)
    ]
    return replace(call, echo=[text for text in texts for _ in range(body.n)])


def embedding_ids(body: EmbeddingRequest, served: ServedModel, limits: Limits) -> list[list[int]]:
    """The token ids of each input. Raises as `chat_call`."""
    served.config.asked(body.pooled_at, auto=False)
    if body.dimensions not in (None, served.config.width):
        raise RequestError(
            "dimensions", param="dimensions", got=body.dimensions, allowed=f"{served.config.width}, or none"
        )
    inputs = prompts_of(body.input)
    at_most("input", len(inputs), limits.inputs)
    ids = [prompt_ids(given, served, "input") for given in inputs]
    longest = max(map(len, ids))
    if longest > served.config.context:
        allowed = f"at most {served.config.context} tokens each"
        raise ContextLengthError("input", param="input", got=longest, allowed=allowed)
    return ids


def derived_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of n choices: the request's own for the first, unrelated ones for the others."""
    if seed is None:
        return None
    if choice == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8]) >> 1


def _call(
    body: GenerationRequest,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    max_tokens: int | None,
    depth: str | int | None,
    served: ServedModel,
    limits: Limits,
) -> EngineCall:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", param="stream_options", do="set stream to true as well")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs in a stream", param="prompt_logprobs", do="ask for the whole answer")
    depth = AUTO if depth is None else depth
    served.config.asked(depth, tolerance=body.quality_tolerance)
    requests = []
    beside = uuid.uuid4().hex if body.n * len(prompts) > 1 else ""
    for prompt in prompts:
        fitted = replace(sampling, max_tokens=fit(len(prompt.ids), max_tokens, served.config.context))
        requests += [
            Request(
                prompt,
                replace(fitted, seed=derived_seed(body.seed, choice)),
                depth,
                body.quality_tolerance,
                deadline=limits.seconds,
                beside=beside,
            )
            for choice in range(body.n)
        ]
    return EngineCall(
        requests,
        body.n,
        [""] * len(requests),
        token_ids=body.return_token_ids,
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def said(body: Wire, *names: str) -> dict[str, Any]:
    """Those of the fields `names` that a client gave; the others have a default, which is not the client's wish."""
    return {name: getattr(body, name) for name in names if name in body.model_fields_set}


def _sampling(
    body: GenerationRequest, served: ServedModel, limits: Limits, max_tokens: int | None, logprobs: int | None
) -> Sampling:
    """Raises RequestError; `Sampling` itself checks the ranges that do not depend on the model."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    at_most("stop", len(stop), limits.stops)
    at_most("stop", max(map(len, stop), default=0), limits.stop_characters, "characters")
    at_most("stop_token_ids", len(body.stop_token_ids), limits.stop_ids)
    check_ids(body.stop_token_ids, served, "stop_token_ids")

    drawn = {name: getattr(body, name) for name in DRAWN} | dict(served.sampling) | said(body, *DRAWN)
    return Sampling(
        temperature=drawn["temperature"],
        top_p=drawn["top_p"],
        top_k=0 if drawn["top_k"] == -1 else drawn["top_k"],  # vLLM's "all"
        min_p=drawn["min_p"],
        max_tokens=served.config.context if max_tokens is None else max_tokens,
        min_tokens=body.min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=drawn["repetition_penalty"],
        logit_bias=_logit_bias(body.logit_bias, served),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        include_stop=body.include_stop_str_in_output,
        banned=_banned(body.bad_words, served, limits),
        speculative=body.speculative,
    )


def _banned(words: Sequence[str], served: ServedModel, limits: Limits) -> list[list[int]]:
    """The runs of tokens that `words` are, at the start of a text and after a space."""
    at_most("bad_words", len(words), limits.bad_words)
    at_most("bad_words", max(map(len, words), default=0), limits.stop_characters, "characters")
    runs = {tuple(served.tokenizer.encode(before + word)): None for word in words for before in ("", " ")}
    return [list(run) for run in runs]


def _check_final(body: ChatRequest) -> None:
    """Raises RequestError unless the last message is one that an answer can go on with."""
    last = body.messages[-1]
    if body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt", param="continue_final_message", do="give one of them"
        )
    if last.role != "assistant" or last.tool_calls or not last.content:
        raise RequestError(
            "continue_final_message",
            param="continue_final_message",
            allowed="a last message of the assistant with text",
        )


def _logit_bias(given: dict[str, float], served: ServedModel) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not key.isdecimal() or len(key) > 20 or not -100 <= value <= 100:
            raise RequestError(
                "logit_bias", param="logit_bias", got={key[:20]: value}, allowed="token id -> number from -100 to 100"
            )
        bias[int(key)] = value
    check_ids(list(bias), served, "logit_bias")
    return bias


def guide_of(
    messages: Sequence[Mapping[str, Any]],
    given: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    response_format: Mapping[str, Any] | None = None,
) -> Guide | None:
    """What a service guides the next answer of a chat by: `messages`, tools and format as OpenAI has them. Raises RequestError
    for what it would refuse."""
    asked = [{key: value for key, value in one.items() if key != "weight"} for one in messages]
    told = {"model": "", "messages": asked, "tools": [*given], "response_format": response_format}
    body = parse(ChatRequest, json.dumps(told).encode())
    return _chat_guide(body, Offer(body, tokenizer))[0]


def _chat_guide(body: ChatRequest, offer: Offer) -> tuple[Guide | None, str]:
    """What the answer must be, and the field that says so. Raises RequestError when several do."""
    asked = {
        "tools": offer.guide,
        "response_format": _format(body.response_format),
        "structured_outputs": _guide(body.structured_outputs),
    }
    format_ = asked["response_format"]
    if format_ is not None and offer.told and asked["structured_outputs"] is None:
        return (offer.guide, "tools") if offer.forced else (offer.or_answer(format_), "response_format")
    given = [name for name, guide in asked.items() if guide is not None]
    other = next((name for name in given if name != "tools"), None)
    if other is not None and offer.told:
        raise RequestError(f"{other} with tools", param=other, do='set tool_choice to "none", or leave it out')
    if len(given) > 1:
        raise RequestError(" and ".join(given), param=given[1], do="give one of them")
    name = given[0] if given else "guided"
    return asked.get(name), name


def _format(given: ResponseFormat | None) -> Guide | None:
    if given is None:
        return None
    if (given.json_schema is not None) != (given.type == "json_schema"):
        do = "give it with type json_schema, and only there"
        raise RequestError("response_format.json_schema", param="response_format", do=do)
    if given.json_schema is not None:
        return Guide("json_schema", json.dumps(given.json_schema.schema_))
    return Guide("json_object") if given.type == "json_object" else None


def _format_told(given: ResponseFormat | None) -> str:
    """What the model is told of the format that it must follow."""
    schema = given.json_schema if given is not None else None
    return f"The answer is JSON, {schema.name}: {schema.description}" if schema and schema.description else ""


def _guide(given: StructuredOutputs | None) -> Guide | None:
    if given is None:
        return None
    kinds = {
        "json": None if given.json_ is None else Guide("json_schema", json.dumps(given.json_)),
        "regex": None if given.regex is None else Guide("regex", given.regex),
        "choice": None if given.choice is None else Guide("choice", given.choice),
        "json_object": None if given.json_object is None else Guide("json_object"),
    }
    guides = [guide for guide in kinds.values() if guide is not None]
    if len(guides) != 1:
        raise RequestError("structured_outputs", param="structured_outputs", allowed=f"one of {', '.join(kinds)}")
    return guides[0]


def _check_choices(prompts: int, n: int, limits: Limits) -> None:
    if not 1 <= n <= limits.choices:
        raise RequestError("n", param="n", got=n, allowed=f"1 to {limits.choices}")
    at_most("prompt", prompts * n, limits.choices, "prompts times n")
