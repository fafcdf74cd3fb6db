"""The OpenAPI document: what FastAPI finds in the routes, and what it cannot see there.

Routes read their bodies themselves (`wire.parse`), so each names its body's model, the answers it gives, and the statuses of
the errors, which are all one envelope. FastAPI's own 422 is never sent, so it is taken out.
"""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from shoal.api.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from shoal.api.shapes import ChatChunk, ErrorEnvelope
from shoal.api.wire import Wire

BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)

_REFERENCE = "#/components/schemas/{model}"
_SECURITY = {"key": {"type": "http", "scheme": "bearer", "description": "One of the server's API keys"}}


def body_of(kind: type[Wire]) -> dict[str, Any]:
    """The entry of a body that the route reads itself."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The entries of errors."""
    return {status: {"model": ErrorEnvelope, "description": HTTPStatus(status).phrase} for status in statuses}


def answered(kind: Any, *statuses: int, chunk: Any = None) -> dict[int | str, dict[str, Any]]:
    """The entries of an answer of `kind`, streamed as events that hold a `chunk` each, and of the errors `statuses`."""
    answer: dict[str, Any] = {"model": kind}
    if chunk is not None:
        answer["content"] = {"text/event-stream": {"schema": _events(chunk.__name__)}}
    return {200: answer, **refused(*statuses)}


def _events(chunk: str) -> dict[str, Any]:
    """One of the events: a chunk, at last the end mark, or in its place an error that came after the first chunk."""
    shapes = [{"$ref": _REFERENCE.format(model=name)} for name in (chunk, ErrorEnvelope.__name__)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    end = {"const": "[DONE]"}
    return {"type": "object", "properties": {"data": {"anyOf": [end, data]}}, "required": ["data"]}


class Documented(FastAPI):
    """An app whose document is whole. `model` stands in its examples; with `keyed`, all but `open_paths` need a key."""

    def __init__(self, *, model: str, keyed: bool, open_paths: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self._model, self._keyed, self._open_paths = model, keyed, open_paths

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()  # made once, and kept: what follows changes nothing the second time
        _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REFERENCE)
        for body in BODIES:
            for example in schemas["$defs"][body.__name__]["examples"]:
                example.update({"model": self._model} if "model" in example else {})
        chunk = TypeAdapter(ChatChunk).json_schema(ref_template=_REFERENCE)
        schemas["$defs"] |= {**chunk.pop("$defs"), ChatChunk.__name__: chunk}
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
