"""The service of the loop's benchmark: one engine that follows a release, in this process, or Ray Serve's with one replica; and
clients that ask it without a pause. What each client saw is counted: answers, and whatever is not a whole one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.follow import Follower
from shoal.api.local import Changing, Here
from shoal.api.served import ServedModel
from shoal.api.server import serving
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.bench.loop_shop import Asked
from shoal.engine.engine import Engine
from shoal.engine.events import Event, Request
from shoal.engine.front import AsyncEngine
from shoal.errors import ResourceError
from shoal.loop.release import Release
from shoal.model.model import Model

CLIENTS, TOKENS = 8, 32
KEY = "shop"
HEADERS = {"Authorization": f"Bearer {KEY}"}
STARTS = 180.0  # seconds that Ray Serve has to answer
PEOPLE = 8  # questions of one customer, one after the other
NAME = "shop"


class Slow(AsyncEngine):
    """Takes half a second more for each list of events."""

    async def batches(
        self, request: Request, gap: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        async for events in super().batches(request, gap):
            await asyncio.sleep(0.5)
            yield events


class Crashing(AsyncEngine):
    """Dies in the middle of its fifth answer, with all that it has."""

    count = 0

    async def batches(
        self, request: Request, gap: Callable[[], float] | None = None
    ) -> AsyncGenerator[list[Event], None]:
        self.count += 1
        fifth = self.count == 5
        async for events in super().batches(request, gap):
            yield events
            if fifth:
                await self.close(0.0)


@dataclass
class Service:
    """As it runs. `kinds`: of engines, by model directory, where they are not plain ones."""

    url: str
    release: Release
    capture: Path
    client: httpx.AsyncClient
    kinds: dict[str, type[AsyncEngine]]
    seen: Counter[str] = field(default_factory=Counter)  # of answers: whole, status 429, broken, ...
    versions: Counter[str] = field(default_factory=Counter)
    numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def ask(self, one: Asked, *, correct: bool = False) -> None:
        """Ask as a new customer's conversation, streamed; with `correct` tell the right answer where it is another."""
        number = next(self.numbers)
        body: dict[str, Any] = {
            "model": NAME, "messages": [{"role": "user", "content": one.text}], "max_tokens": TOKENS, "temperature": 0,
            "stream": True, "user": f"customer-{number // PEOPLE}", "store": correct,
        }  # fmt: skip
        try:
            async with self.client.stream(
                "POST", f"{self.url}/v1/chat/completions", json=body, headers=HEADERS
            ) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    self.seen[f"status {reply.status_code}"] += 1
                    return
                lines = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
        except httpx.HTTPError as error:
            self.seen[f"broken: {type(error).__name__}"] += 1
            return
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        if not lines or lines[-1] != "[DONE]" or any("error" in chunk for chunk in chunks):
            self.seen["broken: no end"] += 1
            return
        self.seen["whole"] += 1
        self.versions[reply.headers.get("x-shoal-version", "")] += 1
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        if correct and said.strip() != one.answer:
            vote = {"id": chunks[0]["id"], "rating": "down", "correction": one.answer, "user": body["user"]}
            told = await self.client.post(f"{self.url}/v1/shoal/feedback", json=vote, headers=HEADERS)
            self.seen["corrected" if told.status_code == 200 else f"vote {told.status_code}"] += 1

    async def ask_all(self, some: Sequence[Asked], *, correct: bool = False) -> None:
        """All of `some`, by `CLIENTS` at once."""
        waiting = iter(some)

        async def client() -> None:
            for one in waiting:
                await self.ask(one, correct=correct)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def ask_until(self, done: Callable[[], bool], some: Sequence[Asked], most: int) -> int:
        """Of `some`, again and again, until `done`, or so many; returns how many."""
        asked, endless = 0, itertools.cycle(some)
        while not done() and asked < most:
            await self.ask_all(list(itertools.islice(endless, 4 * CLIENTS)))
            asked += 4 * CLIENTS
        return asked

    def faults(self) -> dict[str, int]:
        """What was no whole answer, and no vote that was taken."""
        return {name: count for name, count in self.seen.items() if name not in ("whole", "corrected")}


@asynccontextmanager
async def running(release: Release, capture: Path) -> AsyncIterator[Service]:
    """A service of the stable version of `release`, which it follows, with one engine; it captures texts as well."""
    kinds: dict[str, type[AsyncEngine]] = {}

    def load(directory: str) -> AsyncEngine:
        return kinds.get(directory, AsyncEngine)(Engine(Model.load(directory), max_batch=CLIENTS))

    stable = release.stable()
    serves = Changing(load(str(stable.served)), stable.label)
    here, split = Here(serves, load), Split(serves)
    app = build_app(
        [Hosted(ServedModel.load(stable.served, NAME), split)],
        api_keys=ApiKeys([f"{KEY} name=shop admin=yes texts=yes"]),
        capture=CaptureArgs(str(capture), texts=True),
        follower=Follower(release, split, here, serves=stable.number),
    )
    try:
        async with serving(app) as at, httpx.AsyncClient(timeout=120) as client:
            yield Service(at.url, release, capture, client, kinds)
    finally:
        await here.close()


@asynccontextmanager
async def on_ray(release: Release, capture: Path) -> AsyncIterator[Service]:
    """The same by `shoal serve`: Ray Serve with one replica, and for a canary a second application. Raises ResourceError where
    it does not come up."""
    keys, log = capture.with_name("keys.txt"), capture.with_name("serve.log")
    keys.parent.mkdir(parents=True, exist_ok=True)
    keys.write_text(f"{KEY} name=shop admin=yes texts=yes\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--release", str(release.directory), "--name", NAME, "--port", str(port), "--replicas", "1"]
    words += ["--api-keys", str(keys), "--capture", str(capture), "--capture-texts"]
    with log.open("wb") as file:
        served = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "shoal.cli", *words, stdout=file, stderr=file, stdin=asyncio.subprocess.DEVNULL
        )
    try:
        async with httpx.AsyncClient(timeout=120) as client:
            url = f"http://127.0.0.1:{port}"
            await _answers(client, url, served, log)
            yield Service(url, release, capture, client, {})
    finally:
        if served.returncode is None:
            served.terminate()
        await served.wait()


async def _answers(client: httpx.AsyncClient, url: str, served: asyncio.subprocess.Process, log: Path) -> None:
    until = time.monotonic() + STARTS
    while served.returncode is None and time.monotonic() < until:
        try:
            if (await client.get(f"{url}/ready", headers=HEADERS)).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.5)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise ResourceError("Ray Serve did not come up", got=" ".join(last)[:200], do="look whether shoal serve does")
