"""The engine through the Triton kernels against the oracle without them, in float64, so that tokens must be equal."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.gpu import launch
from shoal.model.net import Net

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine


@pytest.mark.smoke
@pytest.mark.parametrize("pattern", ["H", "SDL"])
def test_answers_are_those_of_the_oracle(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, one of a few tokens, other depths, and drafts that are verified."""
    config = presets.get("test").model
    config = dataclasses.replace(
        config, attn_pattern=pattern, window=8, top_k=3, kv_heads=1, heads=2, dense_length=16 * ("S" in pattern)
    )
    net = Net(config).init_(5).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    model = Model(config, net, Tokenizer.bytes_only())
    asked = [([*range(40, 66)], "full", 0), ([70, 71, 72], "shallow", 0), ([*range(90, 99)], "full", 2)]
    with monkeypatch.context() as without:
        without.setattr(launch, "ON", set())
        want = [model.generate_naive(ids, 3, depth, ignore_eos=True) for ids, depth, _ in asked]
    engine = Engine(model, units=80, max_batch=3, max_batch_tokens=18, speculative_max_batch=3)
    calls, kernel = [], launch._attend
    monkeypatch.setattr(launch, "_attend", lambda *args: (calls.append(1), kernel(*args)))
    answers = engine.generate(
        [
            Request(ids, Sampling(temperature=0, max_tokens=3, ignore_eos=True, speculative=drafts), depth=depth)
            for ids, depth, drafts in asked
        ]
    )
    assert [answer.tokens for answer in answers] == want
    assert len(calls) > 4 * 3, "the kernels were not asked"
    engine.scheduler.check_integrity()
