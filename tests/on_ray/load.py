"""Clients that ask a service without a pause, each with one stream after the other."""

from __future__ import annotations

import json
import threading

import httpx

STREAMS, QUEUE = 8, 2
BODY = {"model": "fish", "prompt": "abc", "max_tokens": 48, "ignore_eos": True, "temperature": 0, "stream": True}

Answer = tuple[int, str, bool]  # status, text, whether it ended as it should


def ask(url: str) -> Answer:
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=120) as reply:
        if reply.status_code != 200:
            return reply.status_code, reply.read().decode(), False
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    whole = lines[-1] == "[DONE]" and not any("error" in chunk for chunk in chunks)
    return 200, "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ())), whole


class Load:
    """So many clients, each with one request after the other until the block ends."""

    def __init__(self, url: str, streams: int = STREAMS) -> None:
        self._url, self._over = url, threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._client) for _ in range(streams)]

    def _client(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(ask(self._url))
            except httpx.HTTPError as error:
                self.answers.append((0, repr(error), False))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
