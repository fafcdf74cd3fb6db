"""Clients that read streams and do nothing else, as a process of its own: ``python -m benchmarks.streams``.

Each keeps its connection and asks again once its answer has ended. It reads bytes, since what parses HTTP and JSON would take
more of the cores than the gateway that is measured. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from typing import Any

USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
END = b"\r\n0\r\n\r\n"  # of a body in chunks
LIMIT_SECONDS = 60.0  # for an answer to go on


class Clients:
    """What all have seen."""

    def __init__(self, port: int, body: dict[str, Any], key: str) -> None:
        content = json.dumps(body).encode()
        said = f"authorization: Bearer {key}\r\n" if key else ""
        self._port = port
        self._asked = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{said}"
            f"content-length: {len(content)}\r\n\r\n"
        ).encode() + content
        self.streams = self.tokens = 0
        self.wrong = Counter[str]()

    async def run(self, number: int, seconds: float) -> None:
        """`number` of them, which begin nothing new after `seconds`."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._one(until) for _ in range(number)))

    async def _one(self, until: float) -> None:
        writer: asyncio.StreamWriter | None = None
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(LIMIT_SECONDS):
                    if writer is None:
                        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    await self._ask(reader, writer)
            except (OSError, TimeoutError, EOFError) as error:
                self.wrong[type(error).__name__] += 1
                if writer is not None:
                    writer.close()
                writer = None
                await asyncio.sleep(0.1)
        if writer is not None:
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._asked)
        head = await reader.readuntil(b"\r\n\r\n")
        status, last = head.split(b" ", 2)[1].decode(), b""
        if status != "200":
            self.wrong[status] += 1
            raise EOFError(status)
        while not last.endswith(END):
            got = await reader.read(2**16)
            if not got:
                raise EOFError("the stream broke")
            last = (last + got)[-1024:]
        usage = USAGE.findall(last)
        if not usage or b"[DONE]" not in last:
            raise EOFError("the stream has no end")
        self.streams, self.tokens = self.streams + 1, self.tokens + int(usage[-1])


def main() -> None:
    """Prints what came of it as JSON."""
    parser = argparse.ArgumentParser()
    for name, kind in {"port": int, "clients": int, "tokens": int, "seconds": float}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--key", default="")
    given = parser.parse_args()
    body = {
        "model": "bench", "prompt": [20, 21, 22, 23], "max_tokens": given.tokens, "ignore_eos": True, "depth": "full",
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    clients = Clients(given.port, body, given.key)
    began = time.monotonic()
    asyncio.run(clients.run(given.clients, given.seconds))
    found = {"streams": clients.streams, "tokens": clients.tokens, "wrong": dict(clients.wrong)}
    print(json.dumps({**found, "seconds": time.monotonic() - began, "cpu": time.process_time()}))


if __name__ == "__main__":
    main()
