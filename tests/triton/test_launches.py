"""Launches of docs/benchmarks/gpu.md that nothing else counts: those inside the operators of training, which fake tensors take
as one each, and of layers with INT8 weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shoal import Engine, Request
from shoal.engine.graphs import Graphs, Kind
from shoal.model import int8
from shoal.model.gpu import sparse
from shoal.model.gpu.sparse import Spans
from tests import fake_gpu, pretend_gpu
from tests.pretend_gpu import pretended
from tests.trees import tree_leaves
from tests.triton.test_graphs import GREEDY, KERNELS, kernels_there, model  # noqa: F401  # a fixture

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine


class Launched(TorchDispatchMode):
    """Names of all that is launched while this is on, but for what a kernel of ours takes in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        super().__init__()
        self.names, run = list[str](), InterpretedFunction.run

        def kernel(function: Any, *args: Any, **named: Any) -> None:
            self.names.append(function.fn.__name__)
            with _disable_current_modes():
                run(function, *args, **named)

        monkeypatch.setattr(InterpretedFunction, "run", kernel)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = function(*args, **(kwargs or {})), str(function).rsplit(".", 1)[0]
        made = any(isinstance(each, Tensor) for each in tree_leaves(out))
        self.names += [name] * (made and not function.is_view and name not in fake_gpu.FREE)
        return out


def test_operators_of_training_launch_what_is_counted_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fake_gpu.OURS`, in bf16; and scores of two strips twice what those of one do."""
    draw, kernels = torch.Generator().manual_seed(0), Launched(monkeypatch)
    q, k, v = (torch.randn(1, 40, heads, 16, generator=draw).bfloat16() for heads in (4, 2, 2))
    spans = Spans.packed(torch.zeros(1, 40, dtype=torch.long), 4)
    summaries = torch.randn(1, 10, 2, 16, generator=draw)
    counts = dict[str, int]()

    def count(name: str, *given: Any) -> Any:
        kernels.names.clear()
        with kernels:
            out = getattr(sparse, f"_{name}")._init_fn(*given)
        counts[name] = len(kernels.names)
        return out

    numbers = count("choose", q, summaries, spans.ends, spans.many, 2, 1)
    lists = (numbers, spans.first, spans.tails, spans.block_of)
    near, chosen = count("near", q, k, v, spans.starts, 6), count("chosen", q, k, v, *lists, 4, 0)
    for name, given, (out, lse), last in (("near", [spans.starts], near, [6]), ("chosen", lists, chosen, [4, 0])):
        count(f"{name}_back", q, k, v, *given, out, lse, out, torch.zeros_like(lse), *last)
    assert counts == fake_gpu.OURS
    monkeypatch.setattr(sparse, "SCORED", 2 * 10 * 32)
    assert sparse._strip(q, summaries) == (32, 32)
    assert torch.equal(count("choose", q, summaries, spans.ends, spans.many, 2, 1), numbers)
    assert Counter(kernels.names) == {"_rate": 2, "_pick": 2}


def test_a_product_of_an_int8_layer_is_two_launches(kernels_there: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Levels of its rows, and the product with both scales: four more than a layer has in bf16."""
    monkeypatch.setattr(int8, "choice", lambda *_: ("triton",) * len(int8.MEASURED))
    layers = list[list[str]]()
    with pretended() as gpu:
        made = model("H", quantized=True)
        made.net.float()
        engine = Engine(made.to(gpu), units=80, max_batch=1, max_batch_tokens=128)
        engine.runner.graphs = kept = Graphs(made.net, engine.runner.cache, 1, lambda run: run)
        group = kept._group

        def layer(j: int, b: int, width: int, kind: Kind) -> None:
            before = len(pretend_gpu.launched)
            group(j, b, width, kind)
            layers.append(pretend_gpu.launched[before:])

        kept._group = layer  # type: ignore[method-assign]
        engine.generate([Request([*range(50, 66)], GREEDY, depth="full")])
    gate_and_sum = ["sigmoid", "add.Tensor"]  # of the layer, and of its group
    assert Counter(layers[1]) == Counter([*KERNELS, *["_levels", "_product"] * 4, *gate_and_sum])
