"""Sparse layers, which are made of dense ones: where they are these to the bit, and where by the equations."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import cost
from shoal.model.cpu import fused
from shoal.model.net import Net
from tests import oracle

IDS = [int(x) for x in torch.randint(9, 260, (150,), generator=torch.Generator().manual_seed(1))]
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True, prompt_logprobs=0)


def config(**more: Any) -> ModelConfig:
    shape = {"kv_heads": 1, "attn_pattern": "S", "dense_length": 64, "window": 8, "top_k": 3, "max_length": 400, **more}
    return dataclasses.replace(presets.get("test").model, **shape)


def model_of(c: ModelConfig, dtype: torch.dtype, bias: float = 1.0) -> Model:
    """Random weights, the same whatever the kinds of the layers, with matrices so large that attention matters."""
    whole = Net(dataclasses.replace(c, attn_pattern="S")).init_(3)
    for name, p in whole.named_parameters():
        with torch.no_grad():
            p.copy_(torch.linspace(-bias, 2 * bias, len(p)) if name.endswith("gate") else p * (3 if p.dim() > 1 else 1))
    net = Net(c)
    net.load_state_dict({name: whole.state_dict()[name] for name in net.state_dict()})
    return Model(c, net.to(dtype), Tokenizer.bytes_only())


def told(model: Model, prompts: list[list[int]], **how: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens of each answer, and log-probabilities of the prompt's, twice: the second time out of the prefix cache."""
    engine = Engine(model, **{"units": 400, "max_batch_tokens": 40, **how})
    found = []
    for _ in range(2):
        for answer in engine.generate([Request(ids, GREEDY, depth="full") for ids in prompts]):
            assert answer.finished is not None
            entries = answer.finished.prompt_logprobs or []
            found.append((answer.tokens, [entry.logprob for entry in entries if entry]))
    engine.scheduler.check_integrity()
    return found


@pytest.mark.parametrize(
    ("kv", "loops"),
    [  # the loops of the last, fp32 beside keys and values in int8, take 20 s to compile, for this alone in `make test`
        ("auto", True), ("auto", False), ("int8", False), pytest.param("int8", True, marks=pytest.mark.drill),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["S", "SD", "SL"])
def test_up_to_its_dense_length_a_model_is_the_dense_one_to_the_bit(
    pattern: str, kv: str, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(fused, "usable", lambda x: False)
    c = config(attn_pattern=pattern)
    sparse, dense = (
        model_of(each, torch.float32) for each in (c, dataclasses.replace(c, attn_pattern=pattern.replace("S", "D")))
    )
    prompts = [IDS[:40], IDS[:33], IDS[5:7]]
    assert told(sparse, prompts, kv_cache_dtype=kv) == told(dense, prompts, kv_cache_dtype=kv)
    for length in (1, 63, 64):
        assert torch.equal(sparse.logits(IDS[:length]), dense.logits(IDS[:length]))
    assert not torch.equal(sparse.logits(IDS[:66]), dense.logits(IDS[:66])), "else it would be dense without end"


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_the_engine_says_what_the_whole_forward_says(data: st.DataObject) -> None:
    """Any chunks, pages and blocks, short requests beside long ones, the prefix cache, and too little memory for all."""
    block, page = data.draw(st.sampled_from([(1, 8), (2, 8), (8, 8), (4, 16)]))
    c = config(
        block=block, page=page, window=block + data.draw(st.integers(0, 12)), top_k=data.draw(st.integers(1, 4)),
        dense_length=page * data.draw(st.integers(0, 5)), attn_pattern=data.draw(st.sampled_from(["S", "SD", "DSL"])),
        summary=data.draw(st.sampled_from(["mean", "mean_var"])), kv_heads=data.draw(st.sampled_from([1, 3])),
    )  # fmt: skip
    model = model_of(c, torch.float64)
    prompts = [IDS[: data.draw(st.integers(1, 100))] for _ in range(4)]
    units = data.draw(st.sampled_from([200, 4 * (-(-112 // page) + 1)]))  # or room for one of them
    how = {"units": units, "max_batch_tokens": 4 + page * data.draw(st.sampled_from([1, 2, 20])), "max_batch": 4}
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(fused, "usable", lambda x: False)
        answers = told(model, prompts, **how)
    allowed = ~model.forbidden()
    for (tokens, logprobs), ids in zip(answers, 2 * prompts, strict=True):
        assert tokens == oracle.greedy(model, ids, 12, tokens)
        scores = model.logits(ids).masked_fill(~allowed, -torch.inf).log_softmax(-1)
        own = scores[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(logprobs, dtype=torch.float64), own, rtol=0, atol=1e-9)


def test_where_all_is_chosen_and_nothing_was_learned_it_is_dense() -> None:
    """In float64, with blocks that the window cuts."""
    c = config(dense_length=0, top_k=40, block=4, window=5, kv_heads=3)
    dense = model_of(dataclasses.replace(c, attn_pattern="D"), torch.float64)
    wanted = dense.logits(IDS)
    torch.testing.assert_close(model_of(c, torch.float64, bias=0).logits(IDS), wanted, rtol=0, atol=1e-10)
    for other in (model_of(c, torch.float64), model_of(dataclasses.replace(c, top_k=30), torch.float64, bias=0)):
        assert (other.logits(IDS) - wanted).abs().max() > 1e-3, "a bias and a choice must show"


def test_beyond_its_dense_length_fewer_tokens_are_read() -> None:
    c = config(max_length=4096)
    dense = dataclasses.replace(c, attn_pattern="D")
    for count in (cost.kv_bytes_read, cost.flops_per_token):
        assert count(c, 64) == count(dense, 64) and count(c, 4096) < count(dense, 4096) / 3
    cost.check(Net(c), c)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"dense_length": 60}, "model.dense_length: got 60; allowed: 0 or more, a multiple of page (8)"),
        ({"dense_length": -8}, "model.dense_length"),
        ({"window": 1}, "model.window: got 1; allowed: at least block (2) where layers are sparse"),
    ],
)
def test_a_shape_that_no_sparse_layer_can_have_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        config(**more)
