"""A connection on which no request comes, or whose answer nobody reads, ends after a stated time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request, Response

from shoal.api import connection
from shoal.api.server import serving

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

LONG = 30.0  # until a test gives up
GET = b"GET /ok HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(connection, "READ_SECONDS", 0.5)
    yield


def app() -> FastAPI:
    made = FastAPI()

    async def ok() -> Response:
        return Response("ok")

    async def slow(request: Request) -> Response:
        await asyncio.sleep(1.5)
        return Response(await request.body())

    async def large() -> Response:
        return Response(b"x" * 2**26)

    made.add_api_route("/ok", ok)
    made.add_api_route("/slow", slow, methods=["POST"])
    made.add_api_route("/large", large)
    return made


@pytest.mark.parametrize("first", [b"", GET], ids=["at first", "after an answer"])
@pytest.mark.parametrize("drips", [b"", b"GET /ok HTTP/1.1\r\n" + b"a: b\r\n" * 400], ids=["silent", "slow headers"])
async def test_it_ends_where_no_request_comes(first: bytes, drips: bytes) -> None:
    async with serving(app()) as running, asyncio.timeout(LONG):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in drips:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)

        writer.write(first)
        if first:
            assert b"200" in await reader.readuntil(b"ok")
        dripping = asyncio.create_task(drip())
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b"", "the server ended it, and answered nothing"
        dripping.cancel()
        writer.close()


async def test_a_request_that_takes_longer_is_answered() -> None:
    async with serving(app()) as running, asyncio.timeout(LONG):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        for _ in range(2):
            writer.write(b"POST /slow HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nh")
            await asyncio.sleep(0.8)
            writer.write(b"i")
            assert b"200" in await reader.readuntil(b"hi")
        writer.close()


async def test_an_answer_that_nobody_reads_does_not_stay_in_memory() -> None:
    async with serving(app()) as running:
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(LONG):
                while not running.server.server_state.connections:
                    await asyncio.sleep(0.01)
                while running.server.server_state.connections:
                    await asyncio.sleep(0.05)
