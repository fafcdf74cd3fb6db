"""The routes, in three groups: OpenAI's, the tokenizer's, and those about the service itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from shoal import __version__
from shoal.api import requests as plan
from shoal.api.answers import ChatAnswer, TextAnswer, encoded_vector
from shoal.api.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from shoal.api.served import ServedModel
from shoal.api.service import Service, read_body
from shoal.api.shapes import ChatCompletion, EmbeddingList, ModelCard, ModelList, TextCompletion
from shoal.api.wire import NotFoundError, Wire, dumps
from shoal.errors import EngineDeadError
from shoal.inputs.tokenizer import END, PAD

log = logging.getLogger("shoal.api")

PROBE_SECONDS = 5.0  # for the engine to answer /ready, /health and /metrics
REFERENCE = "#/components/schemas/{model}"
BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)


def body_of(kind: type[Wire]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the route reads itself."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    served = service.served

    @router.post("/chat/completions", openapi_extra=body_of(ChatRequest), responses={200: {"model": ChatCompletion}})
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        work = await run_in_threadpool(plan.chat_work, body, served, service.limits)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = ChatAnswer(work, served, logprobs=body.logprobs, include_usage=usage)
        return await service.answer(request, work, answer, stream=body.stream)

    @router.post("/completions", openapi_extra=body_of(CompletionRequest), responses={200: {"model": TextCompletion}})
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        work = await run_in_threadpool(plan.completion_work, body, served, service.limits)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = TextAnswer(work, served, logprobs=body.logprobs is not None, include_usage=usage)
        return await service.answer(request, work, answer, stream=body.stream)

    @router.post("/embeddings", openapi_extra=body_of(EmbeddingRequest), responses={200: {"model": EmbeddingList}})
    async def embeddings(request: Request) -> Response:
        """One vector of length 1 for each input: the mean over its tokens of the hidden states at `depth`."""
        body = await read_body(request, EmbeddingRequest)
        ids = await run_in_threadpool(plan.embedding_work, body, served, service.limits)
        vectors = await service.embed(request, ids, body.depth)
        tokens = sum(map(len, ids))
        data = [
            {"object": "embedding", "index": index, "embedding": encoded_vector(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": served.name, "usage": usage}
        return Response(dumps(whole), media_type="application/json")

    @router.get("/models")
    async def list_models() -> ModelList:
        return {"object": "list", "data": [_card(served, name) for name in served.names]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        plan.check_model(name, served)
        return _card(served, name)

    return router


def tokenizer_routes(service: Service) -> APIRouter:
    """Token ids from and to text; lm-eval's ``local-completions`` needs all three."""
    router = APIRouter(tags=["tokenizer"])
    served = service.served

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeRequest)
        ids = await run_in_threadpool(plan.tokenize, body, served, service.limits)
        return {"count": len(ids), "max_model_len": served.config.context, "tokens": ids}

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, DetokenizeRequest)
        plan.check_model(body.model, served)
        plan.check_ids(body.tokens, served, "tokens")
        return {"prompt": served.tokenizer.decode(body.tokens)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {"eos_token": END, "bos_token": None, "pad_token": PAD, "chat_template": served.chat_template}

    return router


def status_routes(service: Service, *, metrics: bool) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while this process lives and its engine is not known to be dead; 503 then: restart it."""
        try:
            await asyncio.wait_for(service.client.check_health(), PROBE_SECONDS)
        except EngineDeadError:
            raise
        except Exception as error:  # unreachable is not dead: /ready says so
            log.warning("health check: %s", error or type(error).__name__)
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """200 when a request would be served now; 503 otherwise: send it elsewhere."""
        try:
            await asyncio.wait_for(service.client.check_health(), PROBE_SECONDS)
        except Exception as error:
            got = str(error)[:200] or type(error).__name__
            raise EngineDeadError("the engine is not ready", got=got, do="try again") from error
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, "model": service.served.name}

    @router.get("/metrics")
    async def scrape() -> Response:
        if not metrics:
            raise NotFoundError("metrics are switched off")
        try:
            stats = await asyncio.wait_for(service.client.stats(), PROBE_SECONDS)
        except Exception as error:  # a scrape must still show what this side saw
            log.warning("no engine stats: %s", error or type(error).__name__)
            stats = {}
        return Response(service.metrics.text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _card(served: ServedModel, name: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoal",
        "root": served.name,
        "max_model_len": served.config.context,
        "depths": served.config.exit_names,
        "quantization": served.config.quantization,
    }
