"""K/V memory in int8: a request's tokens still depend on nothing but the request, and little is lost. In float64."""

import pytest
import torch

from shoal import Engine, Request, Sampling
from shoal.engine.engine import default_units
from shoal.errors import ConfigError
from tests.unit.engine.lively import lively

MODEL = lively()
TEXT = [20 + (i * i) % 239 for i in range(70)]


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [done.tokens for done in engine.generate(requests)]


def requests() -> list[Request]:
    sampling = Sampling(temperature=0.7, seed=1, max_tokens=12, ignore_eos=True)
    return [
        Request(TEXT[: 9 + 11 * i], sampling, depth=depth)
        for i, depth in enumerate(("full", "shallow", "full", "middle", "full"))
    ]


def test_tokens_depend_on_the_request_alone() -> None:
    """Not on batch mates, on how prompts are cut, on preemption (a small pool), on drafts, or on what was cached."""
    alone = [answers(Engine(MODEL, units=200, kv_cache_dtype="int8"), [request])[0] for request in requests()]
    small = 4 * -(-(len(TEXT) + 12) // MODEL.config.page) + 9
    engines = [
        Engine(MODEL, units=200, kv_cache_dtype="int8"),
        Engine(MODEL, units=small, kv_cache_dtype="int8", max_batch=3, max_batch_tokens=3 + MODEL.config.page),
        Engine(MODEL, units=200, kv_cache_dtype="int8", speculative=3),
    ]
    for engine in engines:
        assert answers(engine, requests()) == alone
        assert answers(engine, requests()) == alone, "from the prefix cache"
    assert engines[1].stats()["num_preemptions_total"] > 0


def test_little_is_lost_and_the_pool_is_a_fourth() -> None:
    asked = Request(TEXT, Sampling(max_tokens=1, prompt_logprobs=0), depth="full")
    found = []
    for kind in ("auto", "int8"):
        engine = Engine(MODEL, units=200, kv_cache_dtype=kind)
        (done,) = engine.generate([asked])
        assert done.finished is not None and done.finished.prompt_logprobs is not None
        found.append([entry.logprob for entry in done.finished.prompt_logprobs if entry is not None])
    losses = [-sum(values) / len(values) for values in found]
    assert found[0] != found[1] and abs(losses[1] - losses[0]) < 0.02 * losses[0]
    units = [default_units(MODEL.config, 10**6, dtype, MODEL.device) for dtype in (torch.float32, torch.int8)]
    assert 2.5 < (units[1] - 1) / (units[0] - 1) < 4, "scales and block summaries take their share at d = 16"


def test_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: got 'int4'; allowed: auto, int8"):
        Engine(MODEL, kv_cache_dtype="int4")
