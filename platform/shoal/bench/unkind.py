"""What a neighbour does to a service: ``python -m shoal.bench.unkind KIND PORT KEY TOKENS SECONDS``, a process of its own.

    cancels   16 clients that ask for a long answer and leave after 10 ms, again and again
    slow      40 streams of long answers that are read a byte a second
    choices   3 clients that ask for 64 choices of a long answer, one after the other
    idle      500 connections on which nothing is asked

It prints a line when it has begun. Sockets by hand: what it costs itself is taken from the same cores.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

LEAVE_SECONDS = 0.01
BYTE_SECONDS = 1.0
CHOICES = 64
SMALL_BUFFER = 4096  # bytes that the kernel keeps for a reader that takes its time


@dataclass(frozen=True)
class Unkind:
    port: int
    key: str
    tokens: int  # of an answer
    until: float  # on the monotonic clock

    @property
    def on(self) -> bool:
        return time.monotonic() < self.until

    @asynccontextmanager
    async def asked(self, number: int, buffer: int | None = None, **more: Any) -> AsyncIterator[asyncio.StreamReader]:
        """A request that has been sent, on a connection of its own, which is closed in the end."""
        raw = socket.socket()
        raw.setblocking(False)
        if buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=buffer or 2**16)
        body = {
            "model": "bench", "prompt": [20 + (number // 200**place) % 200 for place in range(3)], "stream": True,
            "max_tokens": self.tokens, "ignore_eos": True, "depth": "full", **more,
        }  # fmt: skip
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {self.key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        try:
            yield reader
        finally:
            writer.close()


async def cancels(unkind: Unkind, number: int) -> None:
    """One client."""
    while unkind.on:
        with suppress(OSError):
            async with unkind.asked(number):
                await asyncio.sleep(LEAVE_SECONDS)
        number += 1000


async def slow(unkind: Unkind, number: int) -> None:
    """One stream."""
    while unkind.on:
        with suppress(OSError):
            async with unkind.asked(number, SMALL_BUFFER) as reader:
                while unkind.on and await reader.read(1):
                    await asyncio.sleep(BYTE_SECONDS)
        number += 1000


async def choices(unkind: Unkind, number: int) -> None:
    """One client."""
    while unkind.on:
        with suppress(OSError, TimeoutError):
            async with unkind.asked(number, n=CHOICES, temperature=1) as reader:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + unkind.until - time.monotonic()):
                    data = b""
                    while more := await reader.read(2**16):
                        data = data[-16:] + more
                        if b"0\r\n\r\n" in data:
                            break
        number += 1000


async def idle(unkind: Unkind, number: int) -> None:
    """One connection."""
    while unkind.on:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", unkind.port)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, unkind.until - time.monotonic())):
                    await reader.read(1)  # the server may close it
            writer.close()


KINDS: dict[str, tuple[int, Callable[[Unkind, int], Coroutine[Any, Any, None]]]] = {
    "cancels": (16, cancels),
    "slow": (40, slow),
    "choices": (3, choices),
    "idle": (500, idle),
}


async def be(kind: str, unkind: Unkind) -> None:
    count, work = KINDS[kind]
    tasks = [asyncio.create_task(work(unkind, number)) for number in range(count)]
    await asyncio.sleep(1.0)
    print("begun", flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    _, kind, port, key, tokens, seconds = sys.argv
    asyncio.run(be(kind, Unkind(int(port), key, int(tokens), time.monotonic() + float(seconds))))
