"""The routes, over any `EngineClient`. `build_app` makes the same app for ``shoal serve --no-ray`` and for Ray Serve.

A request: `Gate` (id, key, size) -> `wire.parse` -> `requests` (to engine requests, in a thread) -> `client.gather`
(events) -> `answers` (JSON or SSE). An error anywhere before the first token becomes its HTTP status; after it, one
``data: {"error": ...}`` event ends the stream, since the status is already sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from shoal import __version__
from shoal.api import requests as plan
from shoal.api.answers import Answer, ChatAnswer, ChatCompletion, ModelCard, ModelList, TextAnswer, TextCompletion
from shoal.api.auth import ApiKeys
from shoal.api.client import ClientGone, EngineClient, gather, while_connected
from shoal.api.metrics import Metrics
from shoal.api.middleware import Gate
from shoal.api.requests import Limits, Work
from shoal.api.runs import runs_routes
from shoal.api.served import ServedModel
from shoal.api.wire import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    MediaTypeError,
    NotFoundError,
    TokenizeRequest,
    W,
    Wire,
    dumps,
    envelope,
    parse,
    sse,
)
from shoal.errors import DeadlineError, EngineDeadError, QueueFullError, RequestError, ShoalError
from shoal.inputs.tokenizer import END, PAD

log = logging.getLogger("shoal.api")

PROBE_SECONDS = 5.0  # for the engine to answer /ready, /health and /metrics
BODY_SECONDS = 60.0  # for a body to arrive

_REFERENCE = "#/components/schemas/{model}"

UiMount = Callable[[FastAPI], FastAPI]


def build_app(
    client: EngineClient,
    served: ServedModel,
    *,
    api_keys: ApiKeys | None = None,
    limits: Limits | None = None,
    metrics: bool = True,
    runs: Path | None = None,
    ui_mount: UiMount | None = None,
    answer_request_id: bool = True,
) -> FastAPI:
    """The HTTP surface of `served`, answered by `client`. `runs`: a folder of training runs to show, read only;
    `ui_mount` may add a page to the finished app;
    `answer_request_id` is false behind a proxy that sends ``X-Request-Id`` itself."""
    limits = limits or Limits()
    app = _App(title="Shoal", version=__version__, docs_url=None, redoc_url=None)  # their pages load from elsewhere
    service = Service(client, served, limits)
    app.include_router(_openai_routes(service))
    app.include_router(_tokenizer_routes(service))
    app.include_router(_status_routes(service, metrics=metrics))
    if runs is not None:
        app.include_router(runs_routes(runs))
    app.add_exception_handler(HTTPException, _http_failed)
    app.add_middleware(
        Gate, keys=api_keys, body_bytes=limits.body_bytes, failed=service.failed, answer_id=answer_request_id
    )
    return ui_mount(app) if ui_mount else app


class Service:
    """What the routes share."""

    def __init__(self, client: EngineClient, served: ServedModel, limits: Limits) -> None:
        self.client, self.served, self.limits = client, served, limits
        self.metrics = Metrics(served.name)

    async def answer(self, request: Request, work: Work, answer: Answer, *, stream: bool) -> Response:
        """Runs `work` and sends `answer` whole or as a stream; a client that leaves cancels it at any point."""
        events = gather(self.client, work.requests)
        if not stream:
            whole = await while_connected(request.receive, answer.whole(events))
            return Response(dumps(whole), media_type="application/json", headers={"X-Shoal-Depth": answer.depth()})
        chunks = answer.chunks(events)
        first = await while_connected(request.receive, anext(chunks))  # until here an error has its own status
        return _EventStream(self._guarded(first, chunks))

    def failed(self, error: Exception) -> Response:
        """Any error as OpenAI's envelope with its status."""
        if isinstance(error, ClientGone):
            return Response(status_code=499)  # for the log; nobody is there to read it
        status, body = self._describe(error)
        headers = {"Retry-After": _retry_after(error)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(dumps(body), status, headers, "application/json")

    async def _guarded(self, first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
            except Exception as error:
                yield sse(self._describe(error)[1])

    def _describe(self, error: Exception) -> tuple[int, dict[str, Any]]:
        if isinstance(error, RequestError):
            status, body = error.status, envelope(error.message, error.status, param=error.param, code=error.code)
        elif isinstance(error, ShoalError):
            log.error("request failed: %s", error)
            status, body = 500, envelope(error.message, 500, code="internal_error")
        else:  # a bug: its text may hold anything, so it goes to the log and not to the client
            log.error("request failed", exc_info=error)
            status, body = 500, envelope("internal error; the server's log has the details", 500, code="internal_error")
        self.metrics.failed(body["error"]["code"], status)
        return status, body


def _retry_after(error: Exception) -> str:
    """Whole seconds, from 1 to a minute, for the header of that name."""
    seconds = error.retry_after if isinstance(error, QueueFullError) else None
    return str(min(60, max(1, math.ceil(seconds or 0))))


def _openai_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    served = service.served
    card: ModelCard = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoal",
        "max_model_len": served.config.context,
        "depths": served.config.exit_names,
        "quantization": served.config.quantization,
    }

    @router.post("/chat/completions", openapi_extra=_body(ChatRequest), responses={200: {"model": ChatCompletion}})
    async def chat_completions(request: Request) -> Response:
        body = await _read(request, ChatRequest)
        work = await run_in_threadpool(plan.chat_work, body, served, service.limits)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = ChatAnswer(work, served, logprobs=body.logprobs, include_usage=usage)
        return await service.answer(request, work, answer, stream=body.stream)

    @router.post("/completions", openapi_extra=_body(CompletionRequest), responses={200: {"model": TextCompletion}})
    async def completions(request: Request) -> Response:
        body = await _read(request, CompletionRequest)
        work = await run_in_threadpool(plan.completion_work, body, served, service.limits)
        usage = body.stream_options is not None and body.stream_options.include_usage
        answer = TextAnswer(work, served, logprobs=body.logprobs is not None, include_usage=usage)
        return await service.answer(request, work, answer, stream=body.stream)

    @router.get("/models")
    async def list_models() -> ModelList:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        plan.check_model(name, served)
        return card

    return router


def _tokenizer_routes(service: Service) -> APIRouter:
    """Token ids from and to text; lm-eval's ``local-completions`` needs all three."""
    router = APIRouter(tags=["tokenizer"])
    served = service.served

    @router.post("/tokenize", openapi_extra=_body(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, TokenizeRequest)
        ids = await run_in_threadpool(plan.tokenize, body, served, service.limits)
        return {"count": len(ids), "max_model_len": served.config.context, "tokens": ids}

    @router.post("/detokenize", openapi_extra=_body(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await _read(request, DetokenizeRequest)
        plan.check_model(body.model, served)
        plan.check_ids(body.tokens, served, "tokens")
        return {"prompt": served.tokenizer.decode(body.tokens)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {"eos_token": END, "bos_token": None, "pad_token": PAD, "chat_template": served.chat_template}

    return router


def _status_routes(service: Service, *, metrics: bool) -> APIRouter:
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


class _EventStream(Response):
    """Server-sent events. Ends the stream's source when the client leaves, also between two events."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(receive, stream())
        except ClientGone:
            log.info("client left its stream")


async def _read(request: Request, kind: type[W]) -> W:
    """The request's body as `kind`. Raises MediaTypeError, or RequestError from `wire.parse`."""
    kind_given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_given != "application/json":
        raise MediaTypeError("Content-Type", got=kind_given[:80], allowed="application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            data = await request.body()
    except TimeoutError:
        raise DeadlineError("the body did not arrive", do=f"send it within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    body = parse(kind, data)
    request.state.user = getattr(body, "user", None)
    return body


def _body(kind: type[Wire]) -> dict[str, Any]:
    """The OpenAPI entry of a body that the route reads itself."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the schemas of the bodies that the routes read themselves."""
        document = super().openapi()
        bodies = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
        _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document


async def _http_failed(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {error.detail}"[:300]
    return JSONResponse(envelope(message, error.status_code, code=code), error.status_code, error.headers)
