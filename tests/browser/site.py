"""The API with the pages on it, over the real engine, in a thread of its own: what the browser tests drive."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal import Engine, Model, Request
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.drain import Drain
from shoal.api.follow import Follower
from shoal.api.middleware import OPEN_PATHS
from shoal.api.page import chat_page
from shoal.api.policy import Policy
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.engine.events import Event
from shoal.engine.front import AsyncEngine
from shoal.engine.metrics import FAMILIES, Samples
from shoal.errors import ConfigError
from shoal.loop.release import Release
from shoal.loop.versions import Version
from tests.serving import Thread, in_a_thread

SECONDS_A_TOKEN = 0.02
PIECE = 40  # characters


@dataclass
class Readable:
    """An engine whose random model says only letters, at the pace of a larger one: something to see on a page."""

    engine: AsyncEngine
    model: Model
    requests: list[Request] = field(default_factory=list)
    most: int | None = None  # tokens that any answer gets to for now
    # instead of the model's letters, an answer each; the last again and again
    says: list[str] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)  # beside what the engine counts, as engines on Ray tell it

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        self.requests.append(request)
        letters = {i for i in range(self.model.config.vocab) if self.model.tokenizer.token_bytes(i).isalpha()}
        bias = {i: -100.0 for i in range(self.model.config.vocab) if i not in letters}
        letters_only = replace(request, sampling=replace(request.sampling, logit_bias=bias))
        said, says = 0, bool(self.says)
        left = (self.says.pop(0) if len(self.says) > 1 else self.says[0]) if says else ""
        async with aclosing(self.engine.generate(letters_only)) as events:
            async for event in events:
                while self.most is not None and said >= self.most:
                    await asyncio.sleep(SECONDS_A_TOKEN)
                await asyncio.sleep(SECONDS_A_TOKEN)
                piece, left = left[:PIECE], left[PIECE:]
                yield [replace(event, text=piece) if says else event]
                said += 1

    async def stats(self) -> Samples:
        told = {FAMILIES[name].sample(): value for name, value in self.told.items()}
        return {**await self.engine.stats(), **told}

    async def info(self) -> list[dict[str, str]]:
        return await self.engine.info()

    async def check_health(self) -> None:
        await self.engine.check_health()


@dataclass
class Site:
    thread: Thread
    client: Readable  # of the first model
    last: Readable  # of the last, which may be the first
    drain: Drain

    @property
    def url(self) -> str:
        return self.thread.url

    def stat(self, name: str) -> float:
        return self.thread.run(self.client.stats())[name]

    @contextmanager
    def saying(self, *texts: str) -> Iterator[None]:
        """The model's answers are `texts` meanwhile, one after another, and then the last."""
        self.client.says = list(texts)
        try:
            yield
        finally:
            self.client.says = []

    @contextmanager
    def held(self, most: int) -> Iterator[None]:
        """No answer gets beyond `most` tokens meanwhile, however long the page takes to show them."""
        self.client.most = most
        try:
            yield
        finally:
            self.client.most = None


class Unmoved:
    """Engines of a release that are there already, whatever is promoted."""

    async def serve(self, version: Version) -> None:
        pass

    async def begin(self, version: Version) -> Any:
        raise ConfigError("no room for a canary")

    async def end(self) -> None:
        pass

    def weights(self, version: Version) -> str:
        return version.label


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def site(
    keys: ApiKeys | None = None,
    runs: Path | None = None,
    *,
    lost: bool = False,
    beside: Model | None = None,
    port: int | None = None,
    release: Release | None = None,
    capture: CaptureArgs | None = None,
    run_code: bool = False,
    tools: str | None = None,
    policy: Policy | None = None,
    model: Model | None = None,
) -> Iterator[Site]:
    """`release`: is followed, by engines that change nothing. `lost`: the pages look for the API where there is none. `beside`:
    a second model. `capture`: what is kept of requests. `run_code`: programs are run.
    `tools`: address of what executes some. `policy`: of the first model, which is `model` [a random one of four layers].
    `port`: None for a free one."""
    models = {"fish": model or Model.from_preset("test", seed=3)} | ({"minnow": beside} if beside else {})
    port = port or free_port()
    clients = [Readable(AsyncEngine(Engine(one)), one) for one in models.values()]
    hosted = [
        Hosted(ServedModel(name, one.config, one.tokenizer, one.chat_template, policy=policy), client)
        for (name, one), client in zip(models.items(), clients, strict=True)
    ]
    page = chat_page(f"http://127.0.0.1:{1 if lost else port}/v1", "fish")
    drain = Drain(OPEN_PATHS)
    split = Split(clients[0])  # type: ignore[arg-type]
    follower = None if release is None else Follower(release, split, Unmoved(), serves=1)
    app = build_app(
        hosted,
        api_keys=keys,
        runs=runs,
        capture=capture,
        run_code=run_code,
        tools=tools,
        ui_mount=page,
        drain=drain,
        follower=follower,
    )
    with in_a_thread(app, [client.engine for client in clients], port) as thread:
        yield Site(thread, clients[0], clients[-1], drain)
