"""The engine against its oracle: whatever is batched, chunked, cached, preempted or quantised, the tokens are the same.

Real engine, random weights of the `test` preset; `Model.generate_naive` has no cache and no batching.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.errors import ConfigError, ContextLengthError, QueueFullError, RequestError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.router import fit_router

DEPTHS = ("shallow", "middle", "full")


@pytest.fixture(scope="module")
def fp32() -> Model:
    return Model.from_preset("test", seed=3)


@pytest.fixture(scope="module")
def models(fp32: Model) -> dict[str, Model]:
    return {"fp32": fp32, "int8": fp32.quantized()}


@pytest.fixture(scope="module")
def said(models: dict[str, Model]) -> Callable[[str, int], list[int]]:
    """What the whole model of a precision says to one of nine prompts, at one of three depths."""

    @cache
    def naive(precision: str, number: int) -> list[int]:
        return models[precision].generate_naive(prompts(9)[number], 16, depth=DEPTHS[number % 3], ignore_eos=True)

    return naive


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(20, 260) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(prompt: Any, depth: str, tokens: int = 16, **more: Any) -> Request:
    return Request(prompt, Sampling(temperature=0, max_tokens=tokens, ignore_eos=True), depth=depth, **more)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="roomy"),
        pytest.param({"max_batch": 3, "max_batch_tokens": 11}, id="chunked"),
        pytest.param({"units": 62, "max_batch": 6}, id="preempted"),
    ],
)
def test_a_mixed_batch_gives_each_request_its_own_tokens(
    models: dict[str, Model], said: Callable[[str, int], list[int]], precision: str, limits: dict[str, int]
) -> None:
    model = models[precision]
    engine = Engine(model, **limits)
    asked = [(prompt, DEPTHS[i % 3]) for i, prompt in enumerate(prompts(9))]
    answers = engine.generate([greedy(prompt, depth) for prompt, depth in asked])
    for number, ((_, depth), answer) in enumerate(zip(asked, answers, strict=True)):
        assert answer.tokens == said(precision, number)
        assert (answer.finish_reason, answer.depth) == ("length", model.config.depth(depth))
    assert engine.stats()["kv_cache_usage_perc"] == 0
    if "units" in limits:
        assert engine.stats()["num_preemptions_total"] > 0


def test_the_router_decides_the_same_from_fresh_and_from_cached_pages(fp32: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 2 * fp32.config.width + 3
    x = torch.randn(64, inputs, generator=generator)
    gaps = torch.rand(64, len(fp32.config.exits) - 1, generator=generator)
    model = Model(fp32.config, fp32.net, Tokenizer.bytes_only(), router=fit_router(fp32.config, x, gaps, steps=20))
    engine, shared = Engine(model), prompts(1, 64, seed=9)[0] * 2
    for tolerance in (0.0, 0.3, 5.0):
        # without drafts it is the router alone that decides
        request = Request(
            shared[:60], Sampling(temperature=0, max_tokens=4, speculative=0), quality_tolerance=tolerance
        )
        (fresh,) = Engine(model).generate([request])
        (first,), (cached,) = engine.generate([request]), engine.generate([request])
        assert fresh.depth == first.depth == cached.depth
        assert fresh.tokens == cached.tokens
    assert engine.stats()["prefix_cache_hits_total"] > 0


def test_what_cannot_be_served_is_refused_by_field(fp32: Model) -> None:
    engine = Engine(fp32, max_batch=1, max_queue=1)
    for request, error, says in (
        (Request([50] * 380, Sampling(max_tokens=9)), ContextLengthError, "384"),
        (Request([50], depth="abyss"), RequestError, "shallow"),
        (Request([9999]), RequestError, "prompt token id"),
        (Request("hi", Sampling(stop_token_ids=[9999])), RequestError, "stop_token_ids"),
    ):
        with pytest.raises(error, match=says):
            engine.submit(request)
    for _ in range(2):
        engine.submit(greedy([50], "full"))
    with pytest.raises(QueueFullError):
        engine.submit(greedy([51], "full"))
    with pytest.raises(ConfigError, match="compute_budget"):
        Engine(fp32, compute_budget=0.5)
