"""The routes of the Messages API."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from shoal.api.document import POSTED, answered, body_of
from shoal.api.json_text import dumps
from shoal.api.messages import calls
from shoal.api.messages.bodies import CountRequest, MessagesRequest
from shoal.api.messages.events import MessageAnswer
from shoal.api.messages.shapes import MessageErrorEnvelope, MessageEvent, MessageOut, TokenCount
from shoal.api.service import Service


def messages_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])
    told = answered(MessageOut, *POSTED, chunk=MessageEvent, envelope=MessageErrorEnvelope)

    @router.post("", openapi_extra=body_of(MessagesRequest), responses=told)
    async def messages(request: Request) -> Response:
        """The assistant's next message; with `stream`, the events of it."""
        body = await service.read_body(request, MessagesRequest)
        return await service.generated(request, body, calls.messages_call, partial(MessageAnswer, body=body))

    @router.post(
        "/count_tokens",
        openapi_extra=body_of(CountRequest),
        responses=answered(TokenCount, *POSTED, envelope=MessageErrorEnvelope),
    )
    async def count_tokens(request: Request) -> Response:
        """Tokens of a prompt as the model reads it. They count to the key's limit."""
        body = await service.read_body(request, CountRequest)
        served = service.hosted(request, body.model).served
        tokens = await service.prepared(request, partial(calls.count, body, served, service.limits))
        request.state.access.read(tokens)
        found: TokenCount = {"input_tokens": tokens}
        return Response(dumps(found), media_type="application/json")

    return router
