"""Answers as they are sent: a stream, or JSON in pieces. A client that leaves, or does not read, ends either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from shoal.api.access import Access
from shoal.api.client import ClientGone, while_connected
from shoal.api.json_text import paced, pieces, spread

JSON = "application/json"
SEND_SECONDS = 60.0  # for a client to read what fills the buffers up to it; the request's deadline bounds its units


class Sent(Response):
    """What `chunks` give. Ends their source when the client leaves, also between two of them, or does not read."""

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str], access: Access, media_type: str
    ) -> None:
        self.status_code, self.background, self.media_type = 200, None, media_type
        self.init_headers(headers)
        self._chunks, self._access = chunks, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def part(body: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async def stream() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await part(chunk)
            await part(b"", more=False)  # it waits for a client that has not read what went before

        try:
            await while_connected(receive, stream())
        except ClientGone:
            self._access.error = "client_left"
        except TimeoutError:  # of `send`: errors of the chunks are events; the server closes what is left unfinished
            self._access.error = "client_stalled"


async def in_json(request: Request, value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """The answer 200 with `value` as JSON, as `json_text.pieces` takes it. Raises ValueError for what JSON cannot say."""
    parts = [part async for part in paced(pieces(value))]
    if len(parts) == 1:
        return Response(parts[0], media_type=JSON, headers=headers)
    length = {"Content-Length": str(sum(map(len, parts)))}
    return Sent(spread(parts), {**length, **(headers or {})}, request.state.access, JSON)
