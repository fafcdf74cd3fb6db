"""Requests are asked again at full depth while nobody waits: what is measured, when, and that it is only numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from shoal import Engine, Model
from shoal.api import reruns
from shoal.api.app import build_app
from shoal.api.capture import CaptureArgs
from shoal.api.reruns import Reruns
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import LATER, Event, Finished, Request, Sampling, Signals
from shoal.engine.front import AsyncEngine
from shoal.engine.metrics import Samples, sample
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.capture import Capture
from shoal.loop.rows import RERUN, Row
from shoal.model.router import fit_router
from tests.unit.engine.lively import lively

pytestmark = pytest.mark.anyio

SECRET = "herring in the deep sea"
EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def routed() -> Model:
    """A model whose router was fitted to noise that is within its tolerance: it takes an early exit."""
    bare = lively()
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2 * bare.config.width + 3, generator=draws)
    gaps = 0.01 * torch.rand(32, len(bare.config.exits) - 1, generator=draws)
    return Model(bare.config, bare.net, Tokenizer.bytes_only(), router=fit_router(bare.config, x, gaps, steps=20))


@pytest.fixture(autouse=True)
def soon_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests here wait for as long as nobody is answered, some several times."""
    monkeypatch.setattr(reruns, "QUIET_SECONDS", 0.05)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def service(model: Model, folder: Path, **given: Any) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine]]:
    """An app that captures over an engine of its own, as it is served."""
    engine = AsyncEngine(Engine(model, units=200))
    served = ServedModel("fish", model.config, model.tokenizer)
    app = build_app([Hosted(served, engine)], capture=CaptureArgs(str(folder), **given))
    try:
        async with app.router.lifespan_context(app):
            yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test"), engine
    finally:
        await engine.close()


def measured(folder: Path) -> list[dict[str, Any]]:
    rows = Capture(folder).rows(copies=True).to_pylist()
    return [row for row in rows if row["role"] == RERUN]


async def test_what_the_exit_that_was_chosen_has_lost_is_measured_and_no_word_is_kept(
    routed: Model, tmp_path: Path
) -> None:
    folder, body = tmp_path / "capture", {"model": "fish", "prompt": SECRET, "max_tokens": 8, "user": "u7"}
    async with service(routed, folder, reruns=1.0) as (http, _):
        answer = (await http.post("/v1/completions", json={**body, "temperature": 0.7})).raise_for_status().json()
        await until(lambda: len(measured(folder)) == 1)
        (await http.post("/v1/completions", json={**body, "depth": "shallow"})).raise_for_status()
        (await http.post("/v1/completions", json={**body, "quality_tolerance": 0.1})).raise_for_status()
        await until(lambda: len(Capture(folder).rows()) == 3)
        told = (await http.get("/metrics")).text
    (found,), asked = measured(folder), Capture(folder).rows().to_pylist()[0]
    how = Sampling(temperature=0, max_tokens=8, speculative=0)
    (wanted,) = Engine(routed, units=200).generate([Request(SECRET, how, "full", signals=True, gaps=True)])
    assert wanted.finished is not None and wanted.finished.signals is not None
    gaps = wanted.finished.signals.gaps
    lost = dict(zip(routed.config.exits, gaps, strict=False))[asked["layers"]]  # raises at full depth
    assert lost > 0 and found["regret"] == pytest.approx(lost, rel=1e-4)
    assert found["gaps"] == pytest.approx(list(gaps), rel=1e-4)
    assert found["id"] == answer["id"] == asked["id"] and found["subject"] == asked["subject"] is not None
    assert found["tolerance"] == pytest.approx(0.05) and found["regret_bound"] == pytest.approx(asked["router_bound"])
    assert found["prompt_tokens"] is None and found["layers"] is None, "numbers of the request are its own row's"
    assert 'shoal:reruns_total{outcome="done"} 1.0' in told, "a depth and a tolerance of one's own are not the router's"
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in kept and b"herring" not in kept


class Slow:
    """An engine client that begins and does not end, until it is let."""

    def __init__(self) -> None:
        self.begun, self.closed, self.others, self.replicas = 0, 0, 0.0, 1.0
        self.requests: list[Request] = []
        self.go = asyncio.Event()
        self.raises: Exception | None = None

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        self.begun += 1
        self.requests.append(request)
        try:
            if self.raises:
                raise self.raises
            await self.go.wait()
            yield [Finished(request.id, "stop", signals=Signals(gaps=(0.25, 0.125)))]
        finally:
            self.closed += 1

    async def stats(self) -> Samples:
        return {sample("num_requests_running"): self.others, sample("num_replicas"): self.replicas}


class Offered:
    """Re-runs over `Slow`, with everything that `offer` takes."""

    def __init__(self, share: float = 1.0) -> None:
        self.client, self.host, self.rows = Slow(), SimpleNamespace(held=0), list[Row]()
        self.reruns = Reruns(share, self.rows.append)
        self.reruns.hosts = lambda: [self.host]  # type: ignore[list-item]

    def offer(self, id_: str = "a", prompts: int = 1, **row: Any) -> None:
        first = Request([1, 2, 3], Sampling(max_tokens=500, min_tokens=100, seed=7, logprobs=2), "auto")
        call: Any = SimpleNamespace(requests=[first] * 2 * prompts, n=2, silent=False)
        told = Signals(router_bound=0.02, tolerance=0.05)
        self.reruns.offer(call, self.client, told, Row(id_, 1, **{"status": 200, "layers": 2, **row}), EXITS)  # type: ignore[arg-type]

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.reruns.counts.items() if count}


async def test_one_waits_until_nobody_is_answered_here_nor_by_the_engine_for_others() -> None:
    it = Offered()
    it.host.held, it.client.others = 1, 1.0
    task = asyncio.create_task(it.reruns.run())
    it.offer()
    await asyncio.sleep(3 * reruns.QUIET_SECONDS)
    assert it.client.begun == 0
    it.host.held = 0
    await asyncio.sleep(3 * reruns.QUIET_SECONDS)
    assert it.client.begun == 0, "another gateway's request runs"
    it.client.others, it.client.replicas = 0.0, 0.0
    await asyncio.sleep(3 * reruns.QUIET_SECONDS)
    assert it.client.begun == 0, "no replica answers: those there are work, and none is started for this"
    it.client.replicas, _ = 1.0, it.client.go.set()
    await until(lambda: len(it.rows) == 1)
    (request,) = it.client.requests
    assert request.priority > LATER and request.depth == "full" and request.gaps and request.signals
    how = request.sampling
    assert (how.temperature, how.max_tokens, how.min_tokens, how.speculative, how.logprobs) == (0, 64, 64, 0, None)
    assert it.rows[0].regret == 0.125 and it.rows[0].role == RERUN and it.counts == {"done": 1}
    await ended(task)


async def test_it_gives_way_at_once_and_is_begun_again_but_not_for_ever() -> None:
    it = Offered()
    task = asyncio.create_task(it.reruns.run())
    it.offer()
    for count in range(1, reruns.TRIES + 1):
        await until(lambda count=count: it.client.begun == count)  # type: ignore[misc]
        it.host.held = 1
        await until(lambda count=count: it.client.closed == count)  # type: ignore[misc]
        it.host.held = 0
    await until(lambda: it.counts == {"gave_way": 1})
    assert it.rows == [] and len({request.id for request in it.client.requests}) == reruns.TRIES
    it.offer("b")
    it.client.go.set()
    await until(lambda: it.counts == {"gave_way": 1, "done": 1})
    await ended(task)


@pytest.mark.parametrize(
    "row", [{"status": 500}, {"role": "canary"}, {"resumed": "canary->stable"}, {"layers": 3}, {"layers": None}]
)
async def test_only_what_the_router_decided_and_the_stable_version_answered_is_asked_again(row: dict[str, Any]) -> None:
    it = Offered()
    it.offer(**row)
    assert not it.reruns._waiting
    it.offer()
    assert len(it.reruns._waiting) == 1
