"""The OpenAPI document: what FastAPI finds in the routes, and what it cannot see there.

Routes read their bodies themselves (`wire.parse`), so each names its body's model, the answers it gives, and the statuses of
the errors, which are all one envelope. FastAPI's own 422 is never sent, so it is taken out.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from shoal.api.batches.shapes import BatchRequest
from shoal.api.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from shoal.api.changes import ReleaseRequest
from shoal.api.messages.bodies import CountRequest, MessagesRequest
from shoal.api.messages.shapes import MessageEvent
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.shapes import ResponseEvent
from shoal.api.scores.bodies import RerankRequest, ScoreRequest
from shoal.api.shapes import ChatChunk, ErrorEnvelope
from shoal.api.storing import FeedbackRequest, StoredUpdate
from shoal.api.wire import Wire

POSTED = (400, 401, 404, 408, 413, 415, 429, 500, 503)  # what a request with a body may be refused with
ASKED = (401, 404, 429)  # and one without
BODIES: tuple[type[Wire], ...] = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    MessagesRequest,
    CountRequest,
    ResponsesRequest,
    ScoreRequest,
    RerankRequest,
    BatchRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    FeedbackRequest,
    StoredUpdate,
    ReleaseRequest,
)
CHUNKS: tuple[Any, ...] = (ChatChunk, MessageEvent, ResponseEvent)  # of streams, that no whole answer is of

_REFERENCE = "#/components/schemas/{model}"
_SECURITY = {"key": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys"}}


def body_of(kind: type[Wire]) -> dict[str, Any]:
    """The entry of a body that the route reads itself."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def refused(*statuses: int, envelope: Any = ErrorEnvelope) -> dict[int | str, dict[str, Any]]:
    """The entries of errors."""
    return {status: {"model": envelope, "description": HTTPStatus(status).phrase} for status in statuses}


def answered(
    kind: Any, *statuses: int, chunk: Any = None, envelope: Any = ErrorEnvelope
) -> dict[int | str, dict[str, Any]]:
    """The entries of an answer of `kind`, streamed as events that hold a `chunk` each, and of the errors `statuses`, which are
    an `envelope` each."""
    answer: dict[str, Any] = {"model": kind}
    if chunk is not None:
        answer["content"] = {"text/event-stream": {"schema": _events(chunk.__name__, envelope.__name__)}}
    return {200: answer, **refused(*statuses, envelope=envelope)}


def _events(chunk: str, envelope: str) -> dict[str, Any]:
    """One of the events: a chunk, at last the end mark, or in its place an error that came after the first chunk."""
    shapes = [{"$ref": _REFERENCE.format(model=name)} for name in (chunk, envelope)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    end = {"const": "[DONE]"}
    return {"type": "object", "properties": {"data": {"anyOf": [end, data]}}, "required": ["data"]}


class Documented(FastAPI):
    """An app whose document is whole. `model` stands in its examples; with `keyed`, all but `open_paths` need a key."""

    def __init__(self, *, model: str, keyed: bool, open_paths: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self._model, self._keyed, self._open_paths = model, keyed, open_paths
        self._one = threading.Lock()
        self._whole: dict[str, Any] | None = None

    def setup(self) -> None:
        """Adds the document's route alone, which is run in a thread: to make it takes long, and anybody may ask for it."""

        def document(request: Request) -> JSONResponse:
            root = request.scope.get("root_path", "").rstrip("/")
            return JSONResponse({**self.openapi(), **({"servers": [{"url": root}]} if root else {})})

        if self.openapi_url:
            self.add_route(self.openapi_url, document, include_in_schema=False)

    def openapi(self) -> dict[str, Any]:
        with self._one:
            self._whole = self._whole or self._made()
            return self._whole

    def _made(self) -> dict[str, Any]:
        document = super().openapi()
        _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REFERENCE)
        for body in BODIES:
            for example in schemas["$defs"][body.__name__]["examples"]:
                example.update({"model": self._model} if "model" in example else {})
        for kind in CHUNKS:
            chunk = TypeAdapter(kind).json_schema(ref_template=_REFERENCE)
            schemas["$defs"] |= {**chunk.pop("$defs", {}), kind.__name__: chunk}
        parts = document.setdefault("components", {})
        parts.setdefault("schemas", {}).update(schemas["$defs"])
        for name in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(name, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if self._keyed and path not in self._open_paths:
                    operation["security"] = [{"key": []}]
        if self._keyed:
            parts["securitySchemes"] = _SECURITY
        return document
