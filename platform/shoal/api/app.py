"""`build_app` makes the HTTP surface over any `EngineClient`: the same app for ``shoal serve --no-ray`` and for Ray Serve.

A request: `Gate` (id, key, size, log) -> `wire.parse` -> `requests` (to engine requests, in a thread) -> `client.gather`
(events) -> `answers` (JSON or SSE). `routes` says which request is which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from shoal import __version__
from shoal.api.auth import ApiKeys
from shoal.api.client import EngineClient
from shoal.api.middleware import Gate
from shoal.api.requests import Limits
from shoal.api.routes import BODIES, REFERENCE, openai_routes, status_routes, tokenizer_routes
from shoal.api.runs import runs_routes
from shoal.api.served import ServedModel
from shoal.api.service import Service
from shoal.api.wire import envelope

UiMount = Callable[[FastAPI], FastAPI]


def build_app(
    client: EngineClient,
    served: ServedModel,
    *,
    api_keys: ApiKeys | None = None,
    limits: Limits | None = None,
    metrics: bool = True,
    cors: Sequence[str] = (),
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
    app.include_router(openai_routes(service))
    app.include_router(tokenizer_routes(service))
    app.include_router(status_routes(service, metrics=metrics))
    if runs is not None:
        app.include_router(runs_routes(runs))
    app.add_exception_handler(HTTPException, _http_failed)
    app.add_middleware(
        Gate, keys=api_keys, body_bytes=limits.body_bytes, failed=service.failed, answer_id=answer_request_id
    )
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    return ui_mount(app) if ui_mount else app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, with the schemas of the bodies that the routes read themselves."""
        document = super().openapi()
        _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFERENCE)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document


async def _http_failed(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path}: {error.detail}"[:300]
    return JSONResponse(envelope(message, error.status_code, code=code), error.status_code, error.headers)
