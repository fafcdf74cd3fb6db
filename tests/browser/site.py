"""The API with the pages on it, over the real engine, in a thread of its own: what the browser tests drive."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoal import Engine, Model, Request
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.page import chat_page
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Event
from shoal.engine.front import AsyncEngine
from tests.serving import Thread, in_a_thread

SECONDS_A_TOKEN = 0.02


@dataclass
class Readable:
    """An engine whose random model says only letters, at the pace of a larger one: something to see on a page."""

    engine: AsyncEngine
    model: Model
    requests: list[Request] = field(default_factory=list)
    most: int | None = None  # tokens that any answer gets to for now

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        self.requests.append(request)
        letters = {i for i in range(self.model.config.vocab) if self.model.tokenizer.token_bytes(i).isalpha()}
        bias = {i: -100.0 for i in range(self.model.config.vocab) if i not in letters}
        letters_only = replace(request, sampling=replace(request.sampling, logit_bias=bias))
        said = 0
        async with aclosing(self.engine.generate(letters_only)) as events:
            async for event in events:
                while self.most is not None and said >= self.most:
                    await asyncio.sleep(SECONDS_A_TOKEN)
                await asyncio.sleep(SECONDS_A_TOKEN)
                yield [event]
                said += 1

    async def stats(self) -> dict[str, float]:
        return await self.engine.stats()

    async def check_health(self) -> None:
        await self.engine.check_health()


@dataclass
class Site:
    thread: Thread
    client: Readable  # of the first model
    last: Readable  # of the last, which may be the first

    @property
    def url(self) -> str:
        return self.thread.url

    def stat(self, name: str) -> float:
        return self.thread.run(self.client.stats())[name]

    @contextmanager
    def held(self, most: int) -> Iterator[None]:
        """No answer gets beyond `most` tokens meanwhile, however long the page takes to show them."""
        self.client.most = most
        try:
            yield
        finally:
            self.client.most = None


@contextmanager
def site(
    keys: ApiKeys | None = None, runs: Path | None = None, *, lost: bool = False, beside: Model | None = None
) -> Iterator[Site]:
    """`lost`: the pages look for the API where there is none. `beside`: a second model."""
    models = {"fish": Model.from_preset("test", seed=3)} | ({"minnow": beside} if beside else {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    clients = [Readable(AsyncEngine(Engine(model)), model) for model in models.values()]
    hosted = [
        Hosted(ServedModel(name, model.config, model.tokenizer, model.chat_template), client)
        for (name, model), client in zip(models.items(), clients, strict=True)
    ]
    page = chat_page(f"http://127.0.0.1:{1 if lost else port}/v1", "fish")
    app = build_app(hosted, api_keys=keys, runs=runs, ui_mount=page)
    with in_a_thread(app, [client.engine for client in clients], port) as thread:
        yield Site(thread, clients[0], clients[-1])
