"""The routes, in three groups: OpenAI's, the tokenizer's, and those about the service itself."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from shoal import __version__
from shoal.api import prompts
from shoal.api import requests as plan
from shoal.api.answers import Answer, ChatAnswer, TextAnswer
from shoal.api.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationRequest,
    TokenizeRequest,
)
from shoal.api.client import EngineClient
from shoal.api.document import answered, body_of, refused
from shoal.api.limits import Limits
from shoal.api.metrics import labels
from shoal.api.requests import Work
from shoal.api.served import ServedModel
from shoal.api.service import Hosted, Service, read_body
from shoal.api.shapes import (
    ChatChunk,
    ChatCompletion,
    Detokenized,
    EmbeddingList,
    ModelCard,
    ModelList,
    Status,
    TextCompletion,
    Tokenized,
    TokenizerInfo,
    Version,
)
from shoal.api.wire import NotFoundError, dumps
from shoal.errors import EngineDeadError

T = TypeVar("T")
B = TypeVar("B", bound=GenerationRequest)

log = logging.getLogger("shoal.api")

PROBE_SECONDS = 5.0  # for an engine to answer /ready, /health and /metrics
POSTED = (400, 401, 404, 408, 413, 415, 429, 500, 503)  # what a request with a body may be refused with
ASKED = (401, 404, 429)  # and one without


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    async def generated(
        request: Request,
        body: B,
        to_work: Callable[[B, ServedModel, Limits], Work],
        kind: type[Answer],
        *,
        logprobs: bool,
    ) -> Response:
        hosted = service.hosted(request, body.model)
        work = await run_in_threadpool(to_work, body, hosted.served, service.limits)
        answer = kind(work, hosted.served, logprobs=logprobs, include_usage=body.with_usage)
        return await service.answer(request, hosted.client, work, answer, stream=body.stream)

    @router.post(
        "/chat/completions",
        openapi_extra=body_of(ChatRequest),
        responses=answered(ChatCompletion, *POSTED, chunk=ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message; with `stream`, server-sent events that end with ``[DONE]``."""
        body = await read_body(request, ChatRequest)
        return await generated(request, body, plan.chat_work, ChatAnswer, logprobs=body.logprobs)

    @router.post(
        "/completions",
        openapi_extra=body_of(CompletionRequest),
        responses=answered(TextCompletion, *POSTED, chunk=TextCompletion),
    )
    async def completions(request: Request) -> Response:
        """What follows each prompt; with `stream`, server-sent events that end with ``[DONE]``."""
        body = await read_body(request, CompletionRequest)
        return await generated(request, body, plan.completion_work, TextAnswer, logprobs=body.logprobs is not None)

    @router.post("/embeddings", openapi_extra=body_of(EmbeddingRequest), responses=answered(EmbeddingList, *POSTED))
    async def embeddings(request: Request) -> Response:
        """One vector of length 1 for each input: the mean over its tokens of the hidden states at `depth`."""
        body = await read_body(request, EmbeddingRequest)
        hosted = service.hosted(request, body.model)
        ids = await run_in_threadpool(plan.embedding_work, body, hosted.served, service.limits)
        vectors = await service.embed(request, hosted.client, ids, body.depth)
        tokens = sum(map(len, ids))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": hosted.served.name, "usage": usage}
        return Response(dumps(whole), media_type="application/json")

    @router.get("/models", responses=refused(*ASKED))
    async def list_models() -> ModelList:
        """Every name that a request may give as `model`; aliases name their model as `root`."""
        told = await _quantizations(service.models)
        computed = {hosted.served.name: what for hosted, what in zip(service.models, told, strict=True)}
        cards = [_card(h.served, name, computed[h.served.name]) for name, h in service.names.items()]
        return {"object": "list", "data": cards}

    @router.get("/models/{name:path}", responses=refused(*ASKED))
    async def get_model(request: Request, name: str) -> ModelCard:
        hosted = service.hosted(request, name)
        (quantization,) = await _quantizations([hosted])
        return _card(hosted.served, name, quantization)

    return router


def tokenizer_routes(service: Service) -> APIRouter:
    """Token ids from and to text; lm-eval's ``local-completions`` needs all three. Without `model` the first is meant."""
    router = APIRouter(tags=["tokenizer"])

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answered(Tokenized, *POSTED))
    async def tokenize(request: Request) -> Tokenized:
        """Token ids of a text, or of a chat as the model reads it."""
        body = await read_body(request, TokenizeRequest)
        served = service.hosted(request, body.model).served
        ids = await run_in_threadpool(prompts.tokenize, body, served, service.limits)
        return {"count": len(ids), "max_model_len": served.config.context, "tokens": ids}

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answered(Detokenized, *POSTED))
    async def detokenize(request: Request) -> Detokenized:
        """Text of token ids, without control tokens."""
        body = await read_body(request, DetokenizeRequest)
        served = service.hosted(request, body.model).served
        return {"prompt": await run_in_threadpool(prompts.detokenize, body, served, service.limits)}

    @router.get("/tokenizer_info", responses=refused(*ASKED))
    async def tokenizer_info(request: Request, model: str | None = None) -> TokenizerInfo:
        served = service.hosted(request, model).served
        return {
            "eos_token": served.tokenizer.end,
            "bos_token": None,
            "pad_token": served.tokenizer.pad,
            "chat_template": served.chat_template,
        }

    return router


def status_routes(service: Service, *, metrics: bool) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.head("/health", include_in_schema=False)  # as monitors ask; the server leaves the body out
    @router.get("/health", responses=refused(503))
    async def health() -> Status:
        """200 while this process lives and no engine is known to be dead; 503 then: restart it."""
        for error in await _each(service.models, lambda client: client.check_health()):
            if isinstance(error, EngineDeadError):
                raise error
            if error is not None:  # unreachable is not dead: /ready says so
                log.warning("health check: %s", error or type(error).__name__)
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=refused(503))
    async def ready() -> Status:
        """200 when a request would be served now; 503 otherwise: send it elsewhere."""
        for error in await _each(service.models, lambda client: client.check_health()):
            if isinstance(error, Exception):
                got = str(error)[:200] or type(error).__name__
                raise EngineDeadError("the engine is not ready", got=got, do="try again") from error
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> Version:
        return {"version": __version__, "model": service.models[0].served.name}

    @router.get("/metrics", response_class=PlainTextResponse, responses=refused(404))
    async def scrape() -> Response:
        """Prometheus' text format."""
        if not metrics:
            raise NotFoundError("metrics are switched off")
        stats = {}
        for hosted, found in zip(
            service.models, await _each(service.models, lambda client: client.stats()), strict=True
        ):
            if isinstance(found, dict):
                stats[hosted.served.name] = {"num_replicas": 1.0, **found}  # an engine of this process is one
            else:  # a scrape must still show what this side saw
                log.warning("no engine stats: %s", found or type(found).__name__)
        return Response(service.metrics.text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _each(models: Sequence[Hosted], ask: Callable[[EngineClient], Awaitable[T]]) -> list[T | BaseException]:
    """What `ask` gives for the engine of each model, or the error it raises; TimeoutError after `PROBE_SECONDS`."""
    asked = [asyncio.wait_for(ask(hosted.client), PROBE_SECONDS) for hosted in models]
    return await asyncio.gather(*asked, return_exceptions=True)


async def _quantizations(models: Sequence[Hosted]) -> list[str]:
    """What each model's engines compute with, commas between them where they differ; what is stored, of one that is silent."""
    found = await _each(models, lambda client: client.stats())
    told = [labels(stats, "model_info") if isinstance(stats, dict) else [] for stats in found]
    return [",".join(names) or hosted.served.config.quantization for hosted, names in zip(models, told, strict=True)]


def _card(served: ServedModel, name: str, quantization: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoal",
        "root": served.name,
        "max_model_len": served.config.context,
        "depths": served.config.exit_names,
        "quantization": quantization,
    }


def _encoded(vector: Sequence[float], encoding: str) -> list[float] | str:
    """A vector as OpenAI's `encoding_format` asks: numbers, or base64 of little-endian float32."""
    if encoding == "float":
        return list(vector)
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
