"""A running service for the flows over HTTP: the real engine on random weights of the `test` preset, a real socket, no Ray."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openai
import pytest

from shoal import Engine, Model
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.limits import Limits
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.front import AsyncEngine
from shoal.open_weights.served_adapter import read
from tests.adapters import write
from tests.neighbours import lend
from tests.serving import Thread, in_a_thread, one_validator_of_a_kind  # noqa: F401

KEY = "a-key-for-this-test"


@dataclass
class Service:
    thread: Thread
    model: Model
    engine: AsyncEngine

    @property
    def url(self) -> str:
        return self.thread.url

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def stats(self) -> dict[str, float]:
        return self.thread.run(self.engine.stats())

    def until_idle(self, seconds: float = 60.0) -> None:
        """Waits until no request holds anything; the units are then back, or `check_integrity` kills the engine."""
        end = time.monotonic() + seconds
        while (stats := self.stats())["num_requests_running"] + stats["num_requests_waiting"]:
            assert time.monotonic() < end, stats
            time.sleep(0.01)
        assert self.stats()["kv_cache_usage_perc"] == 0

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)


@contextmanager
def running(model: Model, *, backlog: int = 256, limits: Limits | None = None, **options: Any) -> Iterator[Service]:
    """A service over an engine with `options`."""
    served = ServedModel("fish", model.config, model.tokenizer, model.chat_template)
    engine = AsyncEngine(Engine(model, **options), backlog=backlog, read_adapter=read)
    with TemporaryDirectory() as batches, TemporaryDirectory() as adapters, TemporaryDirectory() as captured:
        write(Path(adapters) / "one", model, 1)
        app = build_app(
            [Hosted(served, engine)],
            api_keys=ApiKeys([f"{KEY} texts=yes admin=yes"]),
            limits=limits or Limits(seconds=60),
            batches=Path(batches),
            capture=CaptureArgs(captured, texts=True),
            adapters_from=Path(adapters),
        )
        with in_a_thread(app, [engine]) as thread:
            yield Service(thread, model, engine)


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest) -> Service:
    model = Model.from_preset("test", seed=3)
    return lend(request, running(model, max_queue=4, max_batch=4, max_batch_tokens=64))


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return service.openai()
