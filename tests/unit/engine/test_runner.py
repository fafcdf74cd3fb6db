"""What a step costs the runner: operators that do not grow with the batch, and logits that do not grow with the prompt."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Signals
from shoal.engine.runner import SCORED_ROWS, _seen
from shoal.model.router import NLL

MODEL = Model.from_preset("test", seed=3)
VIEWS = ("view", "_unsafe_view", "slice", "select", "unsqueeze", "expand", "transpose", "split", "detach", "alias", "t")


class Count(TorchDispatchMode):
    """Operators that compute or copy; views are free of both."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += func._schema.name.removeprefix("aten::") not in VIEWS
        return func(*args, **(kwargs or {}))


def decoding(batch: int) -> Engine:
    """An engine with `batch` requests that decode, with no block about to be completed."""
    engine = Engine(MODEL, units=400)
    for i in range(batch):
        sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
        engine.submit(Request([20 + i, 30, 40, 50], sampling, depth="full"))
    engine.step()
    return engine


def operators(engine: Engine) -> int:
    with Count() as count:
        engine.step()
    return count.operators


def test_a_decoding_steps_operators_do_not_grow_with_the_batch() -> None:
    """Of the torch path: the compiled one (`model.fused`) steps aside where operators are watched."""
    alone, together = operators(decoding(1)), operators(decoding(16))
    assert together <= alone + 4  # one row is a view where several are gathered
    # 23 a layer, and what is computed once a step: places, rope, masks, embedding, head and sampler
    assert together <= 30 * MODEL.config.layers + 80


def test_what_the_router_saw_is_told_as_far_as_it_is_a_number() -> None:
    """Of a prompt of a few tokens there is no loss; at full depth nothing is lost."""
    x, distance = torch.zeros(9), 0.5
    router: Any = SimpleNamespace(exits=(1, 2, 4), distance=lambda x: distance)
    seen = {"predicted_gaps": (0.25, 0.125), "router_distance": 0.5, "tolerance": 0.1}
    for nll, prompt, layers, bound in ((0.0, None, 1, 0.75), (2.5, 2.5, 2, 0.5), (2.5, 2.5, 4, 0.0)):
        x[NLL] = nll
        told = _seen(router, x, layers, [0.25, 0.125], [0.75, 0.5], 0.1)
        assert vars(told) == {**vars(Signals()), **seen, "prompt_nll": prompt, "router_bound": bound}
    distance = math.nan
    assert _seen(router, x, 1, [0.25, 0.125], [0.75, 0.5], 0.1) == Signals()


def test_the_logits_of_a_long_prompt_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = Engine(MODEL, units=400), list[int]()
    score = engine.runner.sampler.score

    def watch(logits: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(logits))
        return score(logits, *more)

    monkeypatch.setattr(engine.runner.sampler, "score", watch)
    prompt = [20 + i % 200 for i in range(300)]
    (answer,) = engine.generate([Request(prompt, Sampling(max_tokens=1, prompt_logprobs=0), depth="full")])
    assert answer.finished is not None and len(answer.finished.prompt_logprobs) == 300
    assert sum(sizes) == 299 and max(sizes) <= SCORED_ROWS


def test_an_image_scores_its_words_and_its_own_tokens_as_impossible() -> None:
    """Control tokens are never sampled, so their logprob is -inf; it must not become NaN on the way."""
    sampling = Sampling(temperature=0, max_tokens=1, prompt_logprobs=1)
    (answer,) = Engine(MODEL, units=400).generate([Request([2, 60, 3, 61], sampling, depth="full")])
    assert answer.finished is not None
    _, word, control, last = answer.finished.prompt_logprobs
    assert control is not None and control.logprob == -float("inf")
    assert all(entry is not None and -50 < entry.logprob < 0 for entry in (word, last))


COMPILING = """
import os
from dataclasses import replace
from shoal import Engine, Model, Request, Sampling
from shoal.model.cpu import attention, decode, draw, floats, integers, tiles

def compiled():
    modules = (attention, decode, draw, floats, integers, tiles)
    functions = {f"{function.__module__}.{name}": function for module in modules for name, function in vars(module).items()
                 if hasattr(function, "signatures")}
    return {f"{name}{signature}" for name, function in functions.items() for signature in function.signatures}

def serve(precision):
    model = Model.from_preset("test", seed=1)
    engine = Engine(model.quantized() if precision == "int8" else model, max_batch=12)
    before = compiled()
    sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
    for lengths in ((5,), (40,), (5, 40, 7), (15,) * 10):
        engine.generate([Request(list(range(20, 20 + length)), sampling, depth="full") for length in lengths])
    engine.generate([Request(list(range(30, 40)), replace(sampling, speculative=2), depth="full")])
    for more in ({}, {"top_k": 5, "top_p": 0.5}):
        engine.generate([Request(list(range(40, 50)), replace(sampling, temperature=1.0, **more), depth="full")])
    print(precision, len(before), sorted(compiled() - before), flush=True)

assert not compiled()
for precision in ("fp32", "int8"):
    if not os.fork():
        serve(precision)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.timeout(600)
def test_no_request_waits_for_a_compiler() -> None:
    """Prompts short and long, alone and together, drafts, tokens drawn with filters and without: all run what was compiled when
    the engine was made, in copies of a process that has compiled nothing before."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, timeout=500, check=True)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [(precision, later) for precision, _, later in lines] == [("fp32", "[]"), ("int8", "[]")]
    assert all(int(count) > 0 for _, count, _ in lines)
