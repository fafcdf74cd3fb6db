"""K/V memory in int8: the engine says what a model says whose keys and values are rounded likewise, whatever happens to a
request. In float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal import Engine, Request, Sampling, presets
from shoal.engine import naive
from shoal.engine.events import Completion, Event
from shoal.engine.sizes import default_units
from shoal.errors import ConfigError
from shoal.model import slots
from shoal.model.block import Attention
from shoal.model.cost import kv_bytes_stored
from shoal.model.cpu import fused
from tests.unit.engine.lively import lively

MODEL = lively()
DEPTHS = ("full", "shallow", "full", "middle", "full")


def requests() -> list[Request]:
    """Of several depths, two and two with the same beginning; the longer ones are read sparsely."""
    texts = [[20 + (j * j + 31 * (i // 2)) % 239 for j in range(9 + 11 * i)] for i in range(len(DEPTHS))]
    sampling = [
        Sampling(temperature=0.7, seed=i, max_tokens=12, ignore_eos=True, logprobs=0) for i in range(len(DEPTHS))
    ]
    return [Request(*of, depth=depth) for *of, depth in zip(texts, sampling, DEPTHS, strict=True)]


def said(done: Completion) -> list[float]:
    """Tokens and their logprobs, which tell rounding where tokens do not."""
    return [*done.tokens, *(entry.logprob for entry in done.logprobs)]


def answers(engine: Engine) -> list[list[float]]:
    found = [said(done) for done in engine.generate(requests())]
    engine.scheduler.check_integrity()
    return found


def preempt_now_and_then(engine: Engine) -> None:
    step, steps = engine.step, itertools.count()

    def preempting() -> list[Event]:
        if next(steps) % 5 == 4 and engine.scheduler.running:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        return step()

    engine.step = preempting  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def wanted() -> list[list[float]]:
    """By the whole sequence again for every token, keys and values rounded as they come; no cache, no pages."""
    exact = Attention.project

    def rounded(self: Attention, x: Tensor, *beside: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = exact(self, x, *beside)
        return q, *slots.decode(slots.encode(k, v, torch.int8), k.dtype)

    plain = [said(naive.generate(MODEL, request)) for request in requests()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "project", rounded)
        found = [said(naive.generate(MODEL, request)) for request in requests()]
    assert all(a != pytest.approx(b, abs=1e-4) for a, b in zip(found, plain, strict=True)), "rounding is to be seen"
    return found


# the loops of the first take 20 s to compile; a layer by them is held beside torch's in tests/unit/model/test_fused.py
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.drill), False], ids=["compiled", "torch"])
def test_the_engine_says_what_the_rounded_model_says(
    wanted: list[list[float]], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, again from the prefix cache, with prompts cut and requests preempted, and with drafts."""
    if not compiled:
        monkeypatch.setattr(fused, "usable", lambda x: False)
    engines = [
        Engine(MODEL, units=200, kv_cache_dtype="int8"),
        Engine(MODEL, units=99, kv_cache_dtype="int8", max_batch=3, max_batch_tokens=3 + MODEL.config.page),
        Engine(MODEL, units=200, kv_cache_dtype="int8", speculative=3),
    ]
    preempt_now_and_then(engines[1])
    for engine in engines:
        assert engine.runner.cache.kv.dtype == torch.int8
        for _ in ("at first", "from the prefix cache"):
            for got, want in zip(answers(engine), wanted, strict=True):
                assert got == pytest.approx(want, abs=1e-9)
    assert engines[0].stats()["prefix_cache_hits_total"] > 0
    assert engines[1].stats()["num_preemptions_total"] > 0
    assert engines[2].stats()["spec_decode_num_draft_tokens_total"] > 0


def test_a_unit_is_smaller_and_so_more_of_them_fit() -> None:
    engines = [Engine(MODEL, units=9, kv_cache_dtype=kind) for kind in ("auto", "int8")]
    each = [engine.stats()["kv_cache_bytes"] / engine.stats()["kv_units"] for engine in engines]
    for engine, size in zip(engines, each, strict=True):
        cache = engine.runner.cache
        assert 9 * size == cache.kv.nbytes + cache.summaries.nbytes
    assert [engine.scheduler.pages.total for engine in engines] == [8, 8]
    fit = [default_units(MODEL.config, 10**6, int(size), MODEL.device) - 1 for size in each]
    assert fit[1] / fit[0] == pytest.approx(each[0] / each[1], rel=0.1), "free memory may change in between"
    base = presets.get("base").model
    kinds = (None, torch.int8)
    sizes = [kv_bytes_stored(base, 1, base.group_layers, torch.float32, kind) for kind in kinds]
    assert sizes[0] > 3.5 * sizes[1], "of a quarter, scales and block summaries take a tenth"


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: got 'int4'; allowed: auto, int8"):
        Engine(MODEL, kv_cache_dtype="int4")  # type: ignore[arg-type]
