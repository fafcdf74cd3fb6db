"""A request body as engine requests: names checked, prompts encoded (`prompts`), lengths fitted to the context.

Everything here is a pure function that may take milliseconds (tokenising, decoding images): routes run it in a thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from shoal.api.bodies import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    ResponseFormat,
    StructuredOutputs,
)
from shoal.api.calls import CLOSE, Plain, Reader
from shoal.api.limits import Limits, at_most
from shoal.api.prompts import check_ids, encode_messages, fit, prompt_ids, prompts_of
from shoal.api.served import ServedModel
from shoal.api.tools import Offer
from shoal.engine.events import Guide, Request, Sampling
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded

EFFORT_DEPTH = {
    "none": "shallow",
    "minimal": "shallow",
    "low": "shallow",
    "medium": "auto",
    "high": "full",
    "xhigh": "full",
    "max": "full",
}


@dataclass(frozen=True)
class Work:
    """One HTTP request as engine requests: `requests[i]` makes choice i, and every `n` in a row share a prompt."""

    requests: list[Request]
    n: int
    echo: list[str]  # put before the text of each choice; empty strings without echo
    silent: bool = False  # max_tokens 0: the one token that the engine needs to make is not shown
    guided_by: str = "guided"  # field that the grammar comes from
    reader: Callable[[], Reader] = Plain

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one that n choices share counts once."""
        return sum(len(cast(Encoded, request.prompt).ids) for request in self.requests[:: self.n])


def chat_work(body: ChatRequest, served: ServedModel, limits: Limits) -> Work:
    """Raises RequestError naming the field that cannot be served; ContextLengthError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs", param="top_logprobs", do="set logprobs to true as well")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens", param="max_tokens", do="give one of them")
    if body.reasoning_effort and body.depth is not None:
        raise RequestError("reasoning_effort and depth", param="depth", do="give one of them")
    at_most("tools", len(body.tools), limits.tools)
    _check_choices(1, body.n, limits)
    offer = Offer(body)
    guide, guided_by = _chat_guide(body, offer)
    told = "\n\n".join(text for text in (offer.system(), _format_told(body.response_format)) if text)
    encoded = encode_messages(body.messages, served, limits, system=told, bounded=True)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    sampling = replace(_sampling(body, served, limits, max_tokens, top), guided=guide)
    if offer.single and not offer.forced:
        sampling = replace(sampling, stop=(*sampling.stop, CLOSE))
    depth = EFFORT_DEPTH[body.reasoning_effort] if body.reasoning_effort else body.depth
    work = _work(body, [encoded], sampling, max_tokens, depth, served, limits)
    return replace(work, guided_by=guided_by, reader=offer.reader)


def completion_work(body: CompletionRequest, served: ServedModel, limits: Limits) -> Work:
    """As `chat_work`, for one prompt or several, each text or token ids."""
    silent = body.echo and body.max_tokens == 0
    if body.echo and body.logprobs is not None and body.stream:
        raise RequestError("stream with echo and logprobs", param="stream", do="ask for the whole answer")
    if body.best_of not in (None, body.n):
        raise RequestError("best_of", param="best_of", got=body.best_of, do="use n, and choose by logprobs")
    prompts = prompts_of(body.prompt)
    _check_choices(len(prompts), body.n, limits)
    ids = [prompt_ids(prompt, served, "prompt") for prompt in prompts]
    max_tokens = 1 if silent else body.max_tokens
    guide = _guide(body.structured_outputs)
    sampling = replace(_sampling(body, served, limits, max_tokens, body.logprobs), guided=guide)
    if body.echo:
        sampling = replace(sampling, prompt_logprobs=body.logprobs)
    work = _work(body, [Encoded(p) for p in ids], sampling, max_tokens, body.depth, served, limits)
    work = replace(work, silent=silent, guided_by="structured_outputs")
    if not body.echo:
        return work
    texts = [p if isinstance(p, str) else served.tokenizer.decode(p) for p in prompts]
    return replace(work, echo=[text for text in texts for _ in range(body.n)])


def embedding_work(body: EmbeddingRequest, served: ServedModel, limits: Limits) -> list[list[int]]:
    """The token ids of each input. Raises as `chat_work`."""
    _check_depth(body.depth, served)
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


def _work(
    body: GenerationRequest,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    max_tokens: int | None,
    depth: str | int | None,
    served: ServedModel,
    limits: Limits,
) -> Work:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", param="stream_options", do="set stream to true as well")
    depth = "auto" if depth is None else depth
    _check_depth(None if depth == "auto" else depth, served, "auto")
    if depth != "auto" and body.quality_tolerance is not None:
        raise RequestError("quality_tolerance and depth", param="quality_tolerance", do="give one of them")
    requests = []
    for prompt in prompts:
        fitted = replace(sampling, max_tokens=fit(len(prompt.ids), max_tokens, served.config.context))
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
    at_most("stop", len(stop), limits.stops)
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
        speculative=body.speculative,
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


def _chat_guide(body: ChatRequest, offer: Offer) -> tuple[Guide | None, str]:
    """What the answer must be, and the field that says so. Raises RequestError when several do."""
    asked = {
        "tools": offer.guide,
        "response_format": _format(body.response_format),
        "structured_outputs": _guide(body.structured_outputs),
    }
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
    at_most("prompt" if prompts > 1 else "n", prompts * n, limits.choices, "prompts times n")


def _check_depth(depth: str | int | None, served: ServedModel, *more: str) -> None:
    exits = served.config.exit_names
    if depth is not None and depth not in (*exits, *exits.values()):
        raise RequestError("depth", param="depth", got=depth, allowed=[*more, *exits, *exits.values()])
