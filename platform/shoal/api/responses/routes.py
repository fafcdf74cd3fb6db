"""The routes of the Responses API."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from shoal.api.document import POSTED, answered, body_of
from shoal.api.responses import calls
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.events import ResponseAnswer
from shoal.api.responses.shapes import ResponseEvent, ResponseOut
from shoal.api.service import Service
from shoal.api.wire import NotFoundError


def responses_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])

    @router.post(
        "",
        openapi_extra=body_of(ResponsesRequest),
        responses=answered(ResponseOut, *POSTED, chunk=ResponseEvent),
    )
    async def responses(request: Request) -> Response:
        """An answer to all turns so far; with `stream`, the events of it. Nothing of it is kept."""
        body = await service.read_body(request, ResponsesRequest)
        return await service.generated(request, body, calls.responses_call, partial(ResponseAnswer, body=body))

    async def kept(response_id: str) -> Response:
        """Always 404: answers are not kept."""
        got = response_id[:80]
        raise NotFoundError(
            "no such response", got=got, do="send the items of the turns before as `input`: none is kept"
        )

    for path, methods in (("", ["GET", "DELETE"]), ("/cancel", ["POST"]), ("/input_items", ["GET"])):
        router.add_api_route(
            "/{response_id}" + path, kept, methods=methods, response_model=None, include_in_schema=False
        )
    return router
