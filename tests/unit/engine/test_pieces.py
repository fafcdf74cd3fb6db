"""No forward is larger than a step may be, and none of what is allowed looks like a stuck engine, whatever is asked at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

from shoal import Engine, Request, Sampling
from shoal.engine import audits
from shoal.engine.events import LATER, Event, Finished, Token
from shoal.engine.front import AsyncEngine
from shoal.model.block import Group
from shoal.model.model import Model
from shoal.model.net import Net
from tests.clocks import tells
from tests.unit.engine.lively import lively, with_router

MODEL = lively()
TOKENS = MODEL.config.context
ROWS = 4 + MODEL.config.page  # the least that an engine of four requests may have
LONG = [20 + i * i % 240 for i in range(TOKENS)]


@pytest.mark.parametrize("depth", ["shallow", "full"])
@pytest.mark.parametrize("rows", [7, ROWS, 64, TOKENS])
def test_an_embedding_in_pieces_is_the_one_of_the_whole(rows: int, depth: str) -> None:
    found = list[Any]()

    def all_of() -> Generator[None, None, None]:
        found.append((yield from MODEL.embed_in_pieces(rows, LONG, depth)))

    assert 1 + len([*all_of()]) == -(-TOKENS // rows)
    torch.testing.assert_close(found[0], MODEL.embed(LONG, depth), rtol=0, atol=1e-6)


def watched(patch: pytest.MonkeyPatch, see: Callable[[int], object]) -> None:
    """`see` is told the rows of every forward of a layer group, and of the head."""

    def seen(kind: Any, name: str, rows: Callable[..., int]) -> None:
        method = getattr(kind, name)

        def call(self: Any, x: Any, *given: Any, **more: Any) -> Any:
            see(rows(x))
            return method(self, x, *given, **more)

        patch.setattr(kind, name, call)

    seen(Group, "forward", lambda x: x.shape[:-1].numel())
    seen(Group, "paged", len)
    seen(Net, "logits", lambda x: x.shape[:-1].numel())


async def read(engine: AsyncEngine, request: Request) -> list[Event]:
    return [event async for event in engine.generate(request)]


def long(depth: str, **more: Any) -> Request:
    """As long as a request may be."""
    tokens = 6
    return Request(LONG[:-tokens], Sampling(temperature=0, max_tokens=tokens, ignore_eos=True, **more), depth=depth)


async def everything(engine: AsyncEngine) -> list[Any]:
    """The largest of each kind that is allowed, all at once."""
    return await asyncio.gather(
        *[engine.embed([LONG] * 2, depth, payer=depth) for depth in ("shallow", "full")],
        engine.embed([LONG], priority=LATER),
        read(engine, long("full", prompt_logprobs=3, logprobs=3)),
        read(engine, long("middle", speculative=3)),
        *[read(engine, long("auto")) for _ in range(4)],
        read(engine, Request(LONG[:-6], long("auto").sampling, signals=True, quality_tolerance=0.05)),
    )


def test_no_forward_has_more_rows_than_a_step_and_none_lets_the_engine_look_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that goes on by a second for each row."""
    monkeypatch.setattr(audits, "SHARE", 1.0)
    monkeypatch.setattr(audits, "COST", 1.0)
    rows, ages, now = list[int](), list[float](), [0.0]

    def see(count: int) -> None:
        rows.append(count)
        now[0] += count
        if (began := engine._step_began) is not None:
            ages.append(now[0] - began)

    engine = AsyncEngine(
        Engine(with_router(MODEL), max_batch=4, max_batch_tokens=ROWS, speculative=2), stall_seconds=1e9
    )
    tells(monkeypatch, "shoal.engine.front", monotonic=lambda: now[0])
    watched(monkeypatch, see)

    async def work() -> list[Any]:
        try:
            return await asyncio.wait_for(everything(engine), 120)
        finally:
            await engine.close()

    *vectors, scored, drafted, one, _, _, _, judged = asyncio.run(work())
    assert [len(found) for found in vectors] == [2, 2, 1]
    assert all(
        isinstance(events[-1], Finished) and events[-1].reason == "length" for events in (scored, drafted, one, judged)
    )
    assert len(scored[-1].prompt_logprobs) == TOKENS - 6 and judged[-1].signals is not None
    assert max(rows) <= ROWS < TOKENS
    assert max(ages) <= 16 * ROWS < 4 * TOKENS, (
        "a step, or a piece: through four groups, and what is drafted and scored"
    )


def test_answers_go_on_between_the_pieces_and_who_leaves_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()
    pieces = Model.embed_in_pieces

    def noted(*given: Any) -> Any:
        inside = pieces(*given)
        while True:
            order.append("piece")
            try:
                next(inside)
            except StopIteration as last:
                return last.value
            yield

    monkeypatch.setattr(Model, "embed_in_pieces", noted)

    async def work() -> None:
        engine = AsyncEngine(Engine(MODEL, max_batch=4, max_batch_tokens=ROWS))
        try:
            answer = engine.generate(Request([50], Sampling(temperature=0, max_tokens=80, ignore_eos=True)))
            await anext(answer)
            vector = asyncio.create_task(engine.embed([LONG]))
            async for event in answer:
                order.extend(["token"] * isinstance(event, Token))
            await vector
            assert "token" in order[order.index("piece") : len(order) - order[::-1].index("piece")]
            order.clear()
            gone = asyncio.create_task(engine.embed([LONG] * 9))
            while "piece" not in order:
                await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
            await engine.stats()
            await engine.embed([[50]])
            assert len(order) <= 2 * -(-TOKENS // ROWS) and engine._pooling.begun is None
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(work(), 120))
