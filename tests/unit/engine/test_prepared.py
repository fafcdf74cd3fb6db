"""What an engine takes at the edge of what it takes, and what it makes of a request: by value."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

import numpy as np
import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.config import GROUPS
from shoal.engine import naive
from shoal.engine.events import LATER
from shoal.errors import AdapterGoneError, ContextLengthError, RequestError
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.model.adapters import Adapter, nothing
from shoal.model.net import Net
from shoal.model.router import Router
from tests.unit.engine.lively import lively

MODEL = lively()
CONFIG = MODEL.config


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, units=40)


def test_settings_at_the_edge_of_what_is_allowed_are_taken() -> None:
    routed = Model(CONFIG, MODEL.net, MODEL.tokenizer, router=Router(CONFIG))
    least = {"units": 2, "max_batch": 1, "max_queue": 1, "max_batch_tokens": 1 + CONFIG.page, "speculative": 16}
    for budget in (1, 1e-9):
        made = Engine(routed, compute_budget=budget, **least)  # type: ignore[arg-type]
        assert made.runner.compute_budget == budget and made.scheduler.pages.total == 1


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias", "banned"])
def test_every_id_of_the_vocabulary_may_be_named_and_none_beside(engine: Engine, name: str) -> None:
    def of(token: int) -> Request:
        given = {"stop_token_ids": [60, token], "logit_bias": {60: 1.0, token: 1.0}, "banned": [[60], [60, token]]}
        return Request([50], Sampling(**{name: given[name]}), depth="full")  # type: ignore[arg-type]

    for token in (0, CONFIG.vocab - 1):
        assert engine.prepare(of(token)).request.sampling
    with pytest.raises(RequestError, match=f"got {CONFIG.vocab};.*0 to {CONFIG.vocab - 1}") as caught:
        engine.prepare(of(CONFIG.vocab))
    assert caught.value.param == name


def test_prompt_and_answer_may_fill_the_context_and_who_is_too_long_is_named(engine: Engine) -> None:
    def of(prompt: int, most: int) -> Request:
        return Request([50] * prompt, Sampling(max_tokens=most), depth="full")

    assert engine.prepare(of(CONFIG.context - 7, 7)).prompt_len == CONFIG.context - 7
    for prompt, most, param in (
        (CONFIG.context - 7, 8, "max_tokens"), (CONFIG.context - 1, 2, "max_tokens"), (CONFIG.context, 1, "prompt"),
    ):  # fmt: skip
        with pytest.raises(
            ContextLengthError, match=f"got {prompt + most};.*at most {CONFIG.context} together"
        ) as caught:
            engine.prepare(of(prompt, most))
        assert caught.value.param == param


def test_an_image_stands_in_one_piece_wherever_it_is_taken(engine: Engine) -> None:
    """A word between its patches would move those after it by a column, and forty beyond the last."""
    image = Patches(np.zeros((4, CONFIG.patch_values), dtype=np.uint8), 2, 2)
    one, sampling = image.tokens(), Sampling(max_tokens=1, temperature=0)
    for ids in ([60, *one, *one, 61], [*one, 60, *one]):
        prompt = Encoded(ids, [image, image])
        (answer,) = engine.generate([Request(prompt, sampling, depth="full")])
        assert answer.tokens == naive.generate(MODEL, Request(prompt, sampling, depth="full")).tokens
    other = Patches(np.zeros((2, CONFIG.patch_values), dtype=np.uint8), 1, 2)
    for torn in (
        [60, *one[:at], *[61] * count, *one[at:], 62] for at in range(1, len(one)) for count in (1, 40)
    ):  # fmt: skip
        for given in (Encoded(torn, [image]), Encoded([*other.tokens(), *torn], [other, image])):
            request = Request(given, sampling, depth="full")
            for take in (
                lambda r=request: engine.prepare(r),
                lambda r=request: naive.generate(MODEL, r),
                lambda g=given: MODEL.logits(g.ids, images=g.images),
            ):
                with pytest.raises(RequestError, match=r"prompt images.*in one piece") as caught:
                    take()
                assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="prompt images"):
        engine.prepare(Request(Encoded([*one, *other.tokens()], [other, image]), sampling, depth="full"))


def test_a_request_becomes_what_it_says(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda bits: 2**bits - 1)
    layers = CONFIG.exits[1]
    request = Request([50, 51], Sampling(max_tokens=5), depth="middle", priority=3, signals=True, quality_tolerance=0.2)
    found = engine.prepare(request)
    assert (found.tokens, found.prompt_len, found.order, found.seed) == ([50, 51], 2, (3, 0, 0), 2**64 - 1)
    assert (found.layers, found.groups, found.tolerance, found.look) == (layers, CONFIG.groups(layers), 0.2, None)
    assert (found.watched, found.spent, found.images, found.adapter, found.grammar) == (True, 0.0, None, None, None)
    assert found.holding.tables.shape == (GROUPS, 1)
    sure = engine.prepare(dataclasses.replace(request, sampling=Sampling(max_tokens=5, seed=7), signals=False))
    assert (sure.seed, sure.watched) == (7, False)
    whole = engine.prepare(Request([50], Sampling(max_tokens=5)))
    assert (whole.layers, whole.groups) == (CONFIG.layers, GROUPS), "without a router auto is full depth"


def test_what_it_holds_is_told_as_a_share_and_what_may_wait_is_not_urgent() -> None:
    engine, page = Engine(MODEL, units=41), CONFIG.page
    assert not engine.urgent
    engine.submit(Request([50] * (page + 1), Sampling(max_tokens=9, ignore_eos=True), depth="full", priority=LATER))
    engine.step()
    stats = engine.stats()
    assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["kv_units"]) == (1, 0, 40)
    assert stats["kv_cache_usage_perc"] == pytest.approx(2 * GROUPS / 40) and stats["kv_units_cached"] == 0
    assert not engine.urgent and not engine.idle
    engine.submit(Request([50], Sampling(max_tokens=1), depth="full"))
    assert engine.urgent


def test_an_idle_engine_whose_books_are_wrong_is_dead() -> None:
    engine = Engine(MODEL, units=41)
    assert engine.step() == [] and engine.dead is None
    engine.scheduler.pages.allocate(1)  # and nobody has it
    assert engine.step() == [] and engine.dead is not None


@pytest.mark.parametrize("more", [{}, {"page": 1, "block": 1}])
def test_the_memory_that_it_tells_is_what_its_units_lie_in(more: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **more)
    engine = Engine(Model(config, Net(config).init_(0).double(), MODEL.tokenizer), units=41)
    cache = engine.runner.cache
    whole = cache.kv.nbytes + cache.summaries.nbytes
    assert engine.stats()["kv_cache_bytes"] * 41 == 40 * whole, "all but the null unit"


def test_an_adapter_is_named_by_its_identity_while_it_is_loaded() -> None:
    engine, pairs = Engine(MODEL, units=41), nothing(MODEL.net).pairs
    one, two = Adapter("one", pairs), Adapter("two", pairs)
    assert [engine.load_adapter(each) for each in (one, two)] == ["one", "two"]
    request = Request([50], Sampling(max_tokens=2), adapter="two")
    prepared = engine.prepare(request)
    assert (prepared.adapter, engine.prepare(dataclasses.replace(request, adapter="")).adapter) == (two, None)
    engine.keep_adapters(["one", "none"])
    assert dict(engine.adapters) == {"one": one}
    with pytest.raises(AdapterGoneError, match="not loaded") as caught:
        engine.prepare(request)
    assert caught.value.param == "model"
