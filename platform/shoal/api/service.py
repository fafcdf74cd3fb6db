"""What the routes share: a body read, the work of a request run through the engine, errors in OpenAI's envelope.

An error anywhere before the first token becomes its HTTP status; after it, one ``data: {"error": ...}`` event ends the stream,
since the status is already sent.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from shoal.api.access import Access
from shoal.api.answers import Answer
from shoal.api.client import ClientGone, EngineClient, Events, gather, while_connected
from shoal.api.limits import Limits
from shoal.api.metrics import Metrics
from shoal.api.requests import Work
from shoal.api.served import ServedModel
from shoal.api.wire import MediaTypeError, ModelNotFoundError, RateLimitError, W, dumps, envelope, parse, sse
from shoal.engine.events import Token
from shoal.errors import ConfigError, DeadlineError, RequestError, ShoalError, frames

log = logging.getLogger("shoal.api")

BODY_SECONDS = 60.0  # for a body to arrive
SEND_SECONDS = 60.0  # for a client to read what fills the buffers up to it; the request's deadline bounds its units


@dataclass(frozen=True)
class Hosted:
    """A model, and the engine that runs it."""

    served: ServedModel
    client: EngineClient


class Service:
    """What the routes share."""

    def __init__(self, models: Sequence[Hosted], limits: Limits) -> None:
        """The first of `models` is meant where a request may leave its name out. Raises ConfigError for a name given twice."""
        self.models, self.limits = tuple(models), limits
        self.names = {name: hosted for hosted in models for name in hosted.served.names}
        if not models or len(self.names) < sum(len(hosted.served.names) for hosted in models):
            got = [name for hosted in models for name in hosted.served.names]
            raise ConfigError("names of the served models", got=got, do="give at least one model, and each name once")
        self.metrics = Metrics()

    def hosted(self, request: Request, name: str | None) -> Hosted:
        """The model that `request` asks for by `name`. Raises ModelNotFoundError."""
        hosted = self.models[0] if name is None else self.names.get(name)
        if hosted is None:
            raise ModelNotFoundError(
                f"model {(name or '')[:100]!r} does not exist", param="model", allowed=[*self.names]
            )
        request.state.access.served = hosted.served.name
        return hosted

    async def answer(
        self, request: Request, client: EngineClient, work: Work, answer: Answer, *, stream: bool
    ) -> Response:
        """Runs `work` and sends `answer` whole or as a stream; a client that leaves cancels it at any point."""
        access: Access = request.state.access
        access.read(work.prompt_tokens)
        events = _counted(gather(client, work.requests), work, access)
        if not stream:
            whole = await while_connected(request.receive, answer.whole(events))
            access.facts["depth"] = answer.depth()
            return Response(dumps(whole), media_type="application/json", headers={"X-Shoal-Depth": answer.depth()})
        chunks = answer.chunks(events)
        first = await while_connected(request.receive, anext(chunks))  # until here an error has its own status
        return _EventStream(self._guarded(first, chunks, answer, access), answer.early_depth(), access)

    async def embed(
        self, request: Request, client: EngineClient, ids: Sequence[list[int]], depth: str | int | None
    ) -> list[list[float]]:
        """A vector for each of `ids`, one after the other; a client that leaves ends it. Raises DeadlineError."""
        access: Access = request.state.access
        access.read(sum(map(len, ids)))

        async def vectors() -> list[list[float]]:
            async with asyncio.timeout(self.limits.seconds):
                return [await client.embed(prompt, depth) for prompt in ids]

        try:
            return await while_connected(request.receive, vectors())
        except TimeoutError:
            raise DeadlineError("the request ran out of its time", do="send fewer inputs") from None

    def failed(self, error: Exception, access: Access) -> Response:
        """Any error as OpenAI's envelope with its status."""
        if isinstance(error, ClientGone):
            return Response(status_code=499)  # for the log; nobody is there to read it
        status, body = self._describe(error, access)
        headers = {"Retry-After": _retry_after(error)} if status in (429, 503) else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(dumps(body), status, headers, "application/json")

    async def _guarded(
        self, first: bytes, chunks: AsyncGenerator[bytes, None], answer: Answer, access: Access
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
                access.facts["depth"] = answer.depth()
            except Exception as error:
                yield sse(self._describe(error, access)[1])

    def _describe(self, error: Exception, access: Access) -> tuple[int, dict[str, Any]]:
        """Its status and its envelope; it is counted, and told in the request's line."""
        if isinstance(error, RequestError):
            status, body = error.status, envelope(error.message, error.status, param=error.param, code=error.code)
        elif isinstance(error, ShoalError):
            log.error("request failed: %s", error)
            status, body = 500, envelope(error.message, 500, code="internal_error")
        else:  # a bug: its text may hold anything, the prompt too
            log.error("request failed\n%s", frames(error))
            status, body = 500, envelope("internal error; the server's log has the details", 500, code="internal_error")
        access.error = body["error"]["code"] or body["error"]["type"]
        self.metrics.failed(access.served, body["error"]["code"] or str(status))
        return status, body


async def _counted(events: Events, work: Work, access: Access) -> Events:
    """`events`, their tokens counted. An error names a field of the body, where the engine's is of another name: the one that a
    grammar came from, none for the time that the server gives."""
    async with aclosing(events):
        try:
            async for index, ready in events:
                access.wrote(sum(isinstance(event, Token) for event in ready))
                yield index, ready
        except RequestError as error:
            error.param = {"guided": work.guided_by, "deadline": None}.get(error.param or "", error.param)
            raise


def _retry_after(error: Exception) -> str:
    """Whole seconds for the header of that name: when a key's minute has room again; else a guess, from 1 to a minute."""
    seconds = max(1, math.ceil(getattr(error, "retry_after", None) or 0))
    return str(seconds if isinstance(error, RateLimitError) else min(60, seconds))


class _EventStream(Response):
    """Server-sent events. Ends the stream's source when the client leaves, also between two events, or does not read."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], depth: str | None, access: Access) -> None:
        self.status_code, self.background = 200, None
        known = {} if depth is None else {"X-Shoal-Depth": depth}
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **known})
        self._chunks, self._access = chunks, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    async with asyncio.timeout(SEND_SECONDS):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(receive, stream())
        except ClientGone:
            self._access.error = "client_left"
        except TimeoutError:  # of `send`: errors of the chunks are events; the server closes what is left unfinished
            self._access.error = "client_stalled"


async def read_body(request: Request, kind: type[W]) -> W:
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
    access: Access = request.state.access
    access.facts |= {"user": getattr(body, "user", None), "model": (getattr(body, "model", None) or "")[:100] or None}
    return body
