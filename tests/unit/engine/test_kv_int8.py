"""K/V memory in int8: the engine says what a model says whose keys and values are rounded likewise, whatever happens to a
request. In float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal import Engine, Request, Sampling, presets
from shoal.engine import naive
from shoal.engine.events import Completion, Event
from shoal.engine.sizes import default_rows, default_units, row_bytes
from shoal.errors import ConfigError, ResourceError
from shoal.model import slots
from shoal.model.block import Attention
from shoal.model.cost import kv_bytes_stored
from shoal.model.cpu import fused
from shoal.model.gpu import launch
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


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
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


def test_on_a_gpu_keys_and_values_take_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nine tenths of its memory, whatever the batch; where one text does not fit, that is said."""
    one, gpu = 4 * -(-MODEL.config.context // MODEL.config.page), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50_000_000, 100_000_000))
    assert [default_units(MODEL.config, batch, 1000, gpu) for batch in (1, 64)] == [1 + 40_000] * 2
    with pytest.raises(ResourceError, match=r"40\.\d GB.*0\.0 GB that are free"):
        default_units(MODEL.config, 1, 40_100_000_000 // one, gpu)


def test_on_a_gpu_a_step_has_8k_rows_or_what_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is outside `gpu_share`; masks over all of the context count where layers read it through torch."""
    c, gpu = MODEL.config, torch.device("cuda:0")
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    plain = 2 * (4 * c.width + 2 * heads + 3 * c.ffn) + 8 * c.heads * (c.head_dim + 2)
    assert row_bytes(c, 2, kernels=True) == plain + c.heads // c.kv_heads * c.window * 3
    assert row_bytes(c, 2, kernels=False) == plain + c.heads // c.kv_heads * c.context * 3
    dense = dataclasses.replace(c, attn_pattern="D")
    assert row_bytes(dense, 2, kernels=True) == row_bytes(c, 2, kernels=False)
    monkeypatch.setattr(launch, "able", lambda device: True)
    for total, rows in ((10**12, 8192), (20 * 2000 * row_bytes(c, 2, kernels=True), 2000), (10**6, 512)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, total))
        assert default_rows(c, gpu, torch.bfloat16, 0.9) == pytest.approx(rows, abs=1)
    assert default_rows(c, torch.device("cpu"), torch.float32) == 512


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
