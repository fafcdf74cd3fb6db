"""The clients of `shoal bench capture`: ``python -m shoal.bench.asking MODEL TOKENS``, a process of its own.

A line with a URL is a turn: all clients ask there, and the seconds that it took are the line that comes back. In the process of
the service they would wait for the same lock of the interpreter as its engine, and what they cost would be taken for its own.
"""

from __future__ import annotations

import asyncio
import sys
import time

import httpx

CLIENTS, REQUESTS = 8, 4  # of each client in a turn, one after the other


def length(place: int, tokens: int) -> int:
    """Tokens of one of a turn's answers, `tokens` in the mean of all."""
    count = CLIENTS * REQUESTS
    return tokens // 2 + tokens * (2 * (place * 11 % count) + 1) // (2 * count)


async def turn(client: httpx.AsyncClient, url: str, name: str, tokens: int) -> float:
    """Seconds until all are answered. Raises httpx.HTTPError for an answer that is none."""
    body = {"model": name, "ignore_eos": True, "stream": True}

    async def ask(number: int) -> None:
        for place in range(number * REQUESTS, (number + 1) * REQUESTS):
            prompt = f"Where is order {place}, and when does it come?"
            asked = {**body, "prompt": prompt, "max_tokens": length(place, tokens)}
            (await client.post(f"{url}/v1/completions", json=asked)).raise_for_status()

    began = time.perf_counter()
    await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    return time.perf_counter() - began


async def _serve(name: str, tokens: int) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        while url := (await asyncio.to_thread(sys.stdin.readline)).strip():
            print(await turn(client, url, name, tokens), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
