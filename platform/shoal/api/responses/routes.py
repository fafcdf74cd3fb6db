"""The routes of the Responses API."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from shoal.api.document import POSTED, answered, body_of
from shoal.api.responses import calls
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.events import ResponseAnswer
from shoal.api.responses.shapes import ResponseEvent, ResponseOut
from shoal.api.responses.stored import add_stored, items_before, with_referred
from shoal.api.service import Service


def responses_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])

    @router.post(
        "",
        openapi_extra=body_of(ResponsesRequest),
        responses=answered(ResponseOut, *POSTED, chunk=ResponseEvent),
    )
    async def responses(request: Request) -> Response:
        """An answer to all turns so far; with `stream`, the events of it. Kept with `store` alone, where that is allowed."""
        body = await service.read_body(request, ResponsesRequest)
        body = await with_referred(service, request.state.access, body)
        before = await items_before(service, request.state.access, body)
        to_call = partial(calls.responses_call, before=before)
        return await service.generated(request, body, to_call, partial(ResponseAnswer, body=body))

    add_stored(router, service)
    return router
