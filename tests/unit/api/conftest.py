"""A scripted engine client: real events, no model; and the app over it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import httpx
import pytest

from shoal import presets
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.config import FULL
from shoal.engine.events import Event, Finished, Request, Token, TokenLogprob
from shoal.engine.metrics import Metrics, Samples, sample
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from tests.capturing import rows_are_written_at_once  # noqa: F401
from tests.serving import one_validator_of_a_kind  # noqa: F401


@dataclass
class Scripted:
    """Answers every request with `reply`, one token a byte."""

    tokenizer: Tokenizer
    reply: str = "Hello, fish! ¿ok?"
    raises: Exception | None = None  # before the first event
    ends: Finished | None = None  # instead of a good end
    hangs_after: int | None = None  # tokens; then it waits for ever
    dead: Exception | None = None
    at_once: int = 1  # events in a list
    quantization: str = "none"  # what it computes with
    requests: list[Request] = field(default_factory=list)
    open: int = 0  # requests that are running now
    metrics: Metrics = field(default_factory=lambda: Metrics(preemptions=7))

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        self.requests.append(request)
        self.open += 1
        began = time.perf_counter()
        decode = self.tokenizer.stream()
        ids = self.tokenizer.encode(self.reply)[: request.sampling.max_tokens]
        depth = 1 if request.depth == "shallow" else 4
        ready: list[Event] = []
        try:
            if self.raises:
                raise self.raises
            for count, token in enumerate(ids):
                if count == self.hangs_after:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                ready.append(Token(request.id, token, decode.push(token), self._logprob(request, token), depth))
                if len(ready) == self.at_once:
                    yield ready
                    ready = []
            yield [*ready, self.ends or self._finished(request, depth, len(ids), time.perf_counter() - began)]
        finally:
            self.open -= 1

    def _logprob(self, request: Request, token: int) -> TokenLogprob | None:
        count = request.sampling.logprobs
        if count is None:
            return None
        return TokenLogprob(token, -0.5, tuple((token + i, -0.5 - i) for i in range(count)))

    def _finished(self, request: Request, depth: int, count: int, seconds: float) -> Finished:
        assert isinstance(request.prompt, Encoded)
        reason = "length" if count == request.sampling.max_tokens else "stop"
        self.metrics.ended(reason, depth, 0.0, seconds / 2, seconds, count)
        ids, top = request.prompt.ids, request.sampling.prompt_logprobs
        known = [TokenLogprob(token, -0.25, ((token, -0.25),) * bool(top)) for token in ids[1:]]
        prompt = (None, *known) if top is not None else ()
        return Finished(
            request.id, reason, "", depth, len(ids), 3, count, 0.0, seconds / 2, seconds, prompt_logprobs=prompt
        )

    async def embed(
        self, prompts: list[list[int]], depth: str | int = FULL, *, payer: str = "", client: str = "", priority: int = 0
    ) -> list[list[float]]:
        if self.raises:
            raise self.raises
        await asyncio.sleep(0)
        last = 0.5 if depth == "shallow" else 0.25
        return [[float(len(prompt)), float(sum(prompt)), last] for prompt in prompts]

    async def load_adapter(self, directory: str) -> str:
        return f"of {directory}"

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        pass

    async def stats(self) -> Samples:
        return {sample("num_requests_running"): self.open, **self.metrics.samples((1, 2, 4))}

    async def info(self) -> list[dict[str, str]]:
        return [{"quantization": self.quantization}]

    async def check_health(self) -> None:
        if self.dead:
            raise self.dead


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest) -> ServedModel:
    """Of the preset `test`, or of a module's PRESET where more must fit the context; a letter a token."""
    preset = getattr(request.module, "PRESET", "test")
    return ServedModel("fish", presets.get(preset).model, Tokenizer.bytes_only())


@pytest.fixture
def engine(served: ServedModel) -> Scripted:
    return Scripted(served.tokenizer)


@pytest.fixture
def connect(engine: Scripted, served: ServedModel) -> Callable[..., httpx.AsyncClient]:
    """``connect(**options of build_app)`` -> an HTTP client of the app."""

    def make(headers: dict[str, str] | None = None, **options: object) -> httpx.AsyncClient:
        app = build_app([Hosted(served, engine)], **options)  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=headers)

    return make


@pytest.fixture
def http(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return connect()
