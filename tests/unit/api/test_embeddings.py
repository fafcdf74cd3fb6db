"""POST /v1/embeddings: from the model's pooled hidden states to the wire."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Finished
from shoal.engine.front import AsyncEngine
from shoal.errors import ContextLengthError, QueueFullError

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("test", seed=3, dtype="float64")


@pytest.mark.parametrize("depth", ["shallow", "full"])
def test_a_vector_is_the_mean_of_the_normed_hidden_states_at_length_1(model: Model, depth: str) -> None:
    ids = model.tokenizer.encode("the deep sea")
    layers = model.config.depth(depth)
    hidden = model.net.exit_norms[str(layers)](model.net(model._tokens(ids)[None], exits=(layers,))[layers][0])
    mean = hidden.numpy().mean(0)
    np.testing.assert_allclose(model.embed(ids, depth).numpy(), mean / np.linalg.norm(mean), atol=1e-6)
    assert model.embed("the deep sea", depth).tolist() == model.embed(ids, depth).tolist()


def test_depths_give_other_vectors_and_long_prompts_are_refused(model: Model) -> None:
    assert model.embed("sea", "shallow").tolist() != model.embed("sea", "full").tolist()
    with pytest.raises(ContextLengthError):
        model.embed([70] * (model.config.context + 1))


async def test_the_engine_embeds_between_the_steps_of_an_answer(model: Model) -> None:
    engine = AsyncEngine(Engine(model))
    try:
        answer = engine.generate(Request("abc", Sampling(max_tokens=60, ignore_eos=True)))
        await anext(answer)
        vectors = await asyncio.gather(*[engine.embed([[70 + i], [80 + i]]) for i in range(5)])
        assert vectors == [[model.embed([j + i]).tolist() for j in (70, 80)] for i in range(5)]
        events = [event async for event in answer]
        assert isinstance(events[-1], Finished) and events[-1].completion_tokens == 60
    finally:
        await engine.close()


async def test_embeddings_that_wait_are_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine(Engine(model, max_queue=2))
    began, go_on = threading.Event(), threading.Event()

    def slow(prompt: list[int], depth: object, adapter: object) -> np.ndarray:
        began.set()
        go_on.wait(60)
        return np.zeros(2)

    monkeypatch.setattr(model, "embed", slow)
    try:
        waiting = [asyncio.create_task(engine.embed([[70]])) for _ in range(3)]  # one runs
        assert await asyncio.to_thread(began.wait, 60)
        with pytest.raises(QueueFullError):
            await engine.embed([[70]])
        waiting[-1].cancel()  # one that leaves while it waits
        go_on.set()
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert done[:-1] == [[[0.0, 0.0]]] * 2 and isinstance(done[-1], asyncio.CancelledError)
    finally:
        go_on.set()
        await engine.close()


async def in_turn(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, str, int]]) -> list[int]:
    """The prompts' numbers in the order in which they are embedded, -1 for each call that is refused; the engine is busy until
    all `calls` (payer, client, number of the first of two prompts) have come."""
    done: list[int] = []
    began, go_on = threading.Event(), threading.Event()

    def embed(prompt: list[int], depth: object, adapter: object) -> np.ndarray:
        began.set()
        assert go_on.wait(60)
        done.append(prompt[0])
        return np.zeros(2)

    monkeypatch.setattr(engine._engine.model, "embed", embed)
    first = asyncio.create_task(engine.embed([[0]]))
    assert await asyncio.to_thread(began.wait, 60)
    tasks = []
    for payer, client, number in calls:
        tasks.append(asyncio.create_task(engine.embed([[number], [number + 1]], payer=payer, client=client)))
        await asyncio.sleep(0)
    for _ in range(9):  # turns in which a call that gave its place takes back all that it asked
        await asyncio.sleep(0)
    go_on.set()
    await first
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return [*done[1:], *[-1 for answer in found if isinstance(answer, QueueFullError)]]


async def test_embeddings_take_turns(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By payer, of one payer by client: six calls that came first hold up another payer's by one prompt each."""
    engine = AsyncEngine(Engine(model))
    try:
        many = [("a", "greedy", 100 + 10 * i) for i in range(6)]
        order = await in_turn(engine, monkeypatch, [*many, ("b", "", 200), ("a", "other", 300)])
        assert order[:8] == [100, 200, 300, 201, 101, 301, 110, 111]
        assert order[8:] == [n + k for _, _, n in many[2:] for k in (0, 1)]
    finally:
        await engine.close()


URL = "/v1/embeddings"


async def embed(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post(URL, json={"model": "fish", "input": "ab", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_every_form_of_input_gives_one_vector_each(http: httpx.AsyncClient) -> None:
    for given, lengths in (("ab", [2]), (["a", "bcd"], [1, 3]), ([70, 71], [2]), ([[70], [71, 72]], [1, 2])):
        answer = await embed(http, input=given)
        assert [item["embedding"][0] for item in answer["data"]] == lengths
        assert [item["index"] for item in answer["data"]] == list(range(len(lengths)))
        assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}


async def test_base64_is_the_same_vector_as_float32(http: httpx.AsyncClient) -> None:
    text = (await embed(http, encoding_format="base64", depth="shallow"))["data"][0]["embedding"]
    plain = (await embed(http, depth="shallow"))["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == plain


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"dimensions": 8}, 400, "dimensions"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [300]}, 400, "input"),
        ({"input": "x" * 385}, 400, "input"),
        ({"input": [[70] * 385]}, 400, "input"),
        ({"input": ["x"] * 2049}, 400, "input"),
        ({"depth": "abyss"}, 400, "depth"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"model": "shark"}, 404, "model"),
    ],
)
async def test_what_cannot_be_embedded_is_named(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str
) -> None:
    reply = await http.post(URL, json={"model": "fish", "input": "ab", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
