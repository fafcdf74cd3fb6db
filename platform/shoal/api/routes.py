"""The routes, in three groups: OpenAI's, the tokenizer's, and those about the service itself."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import cast

import numpy as np
import pydantic_core
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from shoal import __version__
from shoal.api import prompts, requests
from shoal.api.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from shoal.api.chunks import ChatAnswer, TextAnswer
from shoal.api.document import ASKED, POSTED, answered, body_of, refused
from shoal.api.metrics import text
from shoal.api.sent import in_json
from shoal.api.served import ServedModel
from shoal.api.service import Hosted, Service
from shoal.api.shapes import (
    Adapted,
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
from shoal.api.wire import NotFoundError
from shoal.engine.metrics import Samples, infos, sample
from shoal.errors import EngineDeadError

log = logging.getLogger("shoal.api")

Gateways = Callable[[], Awaitable[Mapping[str, Samples]]]

# of an engine in this process, which is one
ALONE = {sample("num_replicas"): 1.0, sample("weights_update_refused"): 0.0, sample("weights_loading"): 0.0}


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post(
        "/chat/completions",
        openapi_extra=body_of(ChatRequest),
        responses=answered(ChatCompletion, *POSTED, chunk=ChatChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """The assistant's next message; with `stream`, server-sent events that end with ``[DONE]``."""
        body = await service.read_body(request, ChatRequest)
        answer = partial(ChatAnswer, logprobs=body.logprobs, options=body.streams)
        return await service.generated(request, body, requests.chat_call, answer)

    @router.post(
        "/completions",
        openapi_extra=body_of(CompletionRequest),
        responses=answered(TextCompletion, *POSTED, chunk=TextCompletion),
    )
    async def completions(request: Request) -> Response:
        """What follows each prompt; with `stream`, server-sent events that end with ``[DONE]``."""
        body = await service.read_body(request, CompletionRequest)
        answer = partial(TextAnswer, logprobs=body.logprobs is not None, options=body.streams)
        return await service.generated(request, body, requests.completion_call, answer)

    @router.post("/embeddings", openapi_extra=body_of(EmbeddingRequest), responses=answered(EmbeddingList, *POSTED))
    async def embeddings(request: Request) -> Response:
        """One vector of length 1 for each input: the mean over its tokens of the hidden states at `depth`."""
        body = await service.read_body(request, EmbeddingRequest)
        hosted = service.hosted(request, body.model)
        work = partial(requests.embedding_ids, body, hosted.served, service.limits)
        ids = await service.prepared(request, work)
        vectors, headers = await service.embed(request, hosted.client, ids, body.pooled_at)
        tokens = sum(map(len, ids))
        vectors.reverse()
        # each goes as soon as it is written: to free all at once takes long
        data = (_embedding(index, vectors.pop(), body.encoding_format) for index in range(len(vectors)))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        whole = {"object": "list", "data": data, "model": hosted.served.name, "usage": usage}
        return await in_json(request, whole, headers)

    _add_models(router, service)
    return router


def _add_models(router: APIRouter, service: Service) -> None:
    @router.get("/models", responses=refused(*ASKED))
    async def list_models() -> ModelList:
        """Every name that a request may give as `model`; aliases name their model as `root`, adapters theirs as `parent`."""
        told = await _quantizations(service.models)
        computed = {hosted.served.name: what for hosted, what in zip(service.models, told, strict=True)}
        cards = [_card(h.served, name, computed[h.served.parent or h.served.name]) for name, h in service.names.items()]
        return {"object": "list", "data": cards}

    @router.get("/models/{name:path}", responses=refused(*ASKED))
    async def get_model(request: Request, name: str) -> ModelCard:
        hosted = service.hosted(request, name)
        (quantization,) = await _quantizations([hosted])
        return _card(hosted.served, name, quantization)


def tokenizer_routes(service: Service) -> APIRouter:
    """Token ids from and to text; lm-eval's ``local-completions`` needs all three. Without `model` the first is meant."""
    router = APIRouter(tags=["tokenizer"])

    async def tokenized(request: Request, work: Callable[[], tuple[int, bytes]]) -> Response:
        """The answer that `work` makes in a thread, with the number of its tokens."""
        count, body = await service.prepared(request, work)
        request.state.access.read(count)
        return Response(body, media_type="application/json")

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest), responses=answered(Tokenized, *POSTED))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a chat as the model reads it. They count to the key's limit."""
        body = await service.read_body(request, TokenizeRequest)
        served = service.hosted(request, body.model).served

        def work() -> tuple[int, bytes]:
            ids = prompts.tokenize(body, served, service.limits)
            found: Tokenized = {"count": len(ids), "max_model_len": served.config.context, "tokens": ids}
            return len(ids), pydantic_core.to_json(found)

        return await tokenized(request, work)

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest), responses=answered(Detokenized, *POSTED))
    async def detokenize(request: Request) -> Response:
        """Text of token ids, without control tokens. They count to the key's limit."""
        body = await service.read_body(request, DetokenizeRequest)
        served = service.hosted(request, body.model).served

        def work() -> tuple[int, bytes]:
            found: Detokenized = {"prompt": prompts.detokenize(body, served, service.limits)}
            return len(body.tokens), pydantic_core.to_json(found)

        return await tokenized(request, work)

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


def status_routes(service: Service, *, metrics: bool, gateways: Gateways | None = None) -> APIRouter:
    """`gateways` tells what each of several has counted, by its name."""
    router = APIRouter(tags=["status"])

    @router.get("/health", responses=refused(503))
    async def health() -> Status:
        """200 while this process lives and not all engines are known to be dead; 503 then: restart it."""
        found = await asyncio.gather(*(hosted.health.get() for hosted in service.models))
        for error in found:
            if isinstance(error, BaseException):  # unreachable is not dead: /ready says so
                log.warning("health check: %s", error or type(error).__name__)
        dead = [error for error in found if isinstance(error, EngineDeadError)]
        if len(dead) == len(found):
            raise dead[0]
        return {"status": "ok"}

    @router.get("/ready", responses=refused(503))
    async def ready() -> Status:
        """200 when a request for some model would be served now; 503 otherwise: send it elsewhere."""
        found = await asyncio.gather(*(hosted.health.get() for hosted in service.models))
        lost = {h.served.name: e for h, e in zip(service.models, found, strict=True) if isinstance(e, Exception)}
        if len(lost) == len(found):
            error = next(iter(lost.values()))
            got = str(error)[:200] or type(error).__name__
            raise EngineDeadError("the engine is not ready", got=got, do="try again") from error
        return {"status": "ready", "not_ready": [*lost]} if lost else {"status": "ready"}

    @router.get("/version")
    async def version() -> Version:
        return {"version": __version__, "model": service.models[0].served.name}

    @router.get("/metrics", response_class=PlainTextResponse, responses=refused(404))
    async def scrape() -> Response:
        """Prometheus' text format; what engines say of themselves is up to a second old."""
        if not metrics:
            raise NotFoundError("metrics are switched off")
        stats = {}
        told = await asyncio.gather(*(hosted.stats.get() for hosted in service.models))
        said = await asyncio.gather(*(hosted.info.get() for hosted in service.models))
        for hosted, found, info in zip(service.models, told, said, strict=True):
            if isinstance(found, dict):
                families = {key.family.name for key in found}
                alone = {key: value for key, value in ALONE.items() if key.family.name not in families}
                stats[hosted.served.name] = {**alone, **found, **infos(info if isinstance(info, list) else ())}
            else:  # a scrape must still show what this side saw
                log.warning("no engine stats: %s", found or type(found).__name__)
        own = await _counted(service, gateways)
        own |= {} if service.last_look is None else await service.last_look.samples()
        return Response(text(stats, own), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _counted(service: Service, gateways: Gateways | None) -> Samples:
    """What this gateway has counted; of several what each has, under its name: the next scrape may be another's."""
    if gateways is not None:
        try:
            found = await gateways()
        except Exception as error:  # what is not told is a gap, and no other number
            log.warning("no counts of the gateways: %s", type(error).__name__)
            return {}
        return {key.beside(gateway=name): value for name, told in found.items() for key, value in told.items()}
    return service.counted()


async def _quantizations(models: Sequence[Hosted]) -> list[str]:
    """What each model's engines compute with, separated by commas where they differ; what is stored, where the engines are
    silent."""
    found = await asyncio.gather(*(hosted.info.get() for hosted in models))
    told = [sorted({info["quantization"] for info in said}) if isinstance(said, list) else [] for said in found]
    return [",".join(names) or hosted.served.config.quantization for hosted, names in zip(models, told, strict=True)]


def _card(served: ServedModel, name: str, quantization: str) -> ModelCard:
    card: ModelCard = {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoal",
        "root": served.name,
        "parent": served.parent,
        "max_model_len": served.config.context,
        "depths": served.config.exit_names,
        "quantization": quantization,
    }
    if served.adapted is not None:
        card["adapted"] = cast(Adapted, dict(served.adapted))
    if served.policy is not None and (page := served.policy.page) is not None:
        card["page"] = {
            "path": page.path, "system": page.system, "examples": list(page.examples), "depth": served.policy.depth,
        }  # fmt: skip
    return card


def _embedding(index: int, vector: Sequence[float], encoding: str) -> bytes:
    """As JSON, in OpenAI's `encoding_format`: numbers, or base64 of little-endian float32. Raises ValueError for NaN."""
    if not math.isfinite(sum(vector)):
        raise ValueError("a number of an embedding is not finite")
    if encoding == "float":
        told = pydantic_core.to_json(vector)
    else:
        told = b'"' + base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()) + b'"'
    return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, told)
