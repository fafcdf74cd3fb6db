"""Decoding steps as graphs over the Triton kernels: recorded as strictly as a device does (`tests.recorded.Tape`), and on a
pretended GPU, where every launch is counted, and all that the host waits for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shoal import Engine, Model, Request, Sampling, presets
from shoal.engine import graphs
from shoal.engine.graphs import Graphs, Kind
from shoal.engine.plan import Outcome, Plan
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.gpu import launch
from shoal.model.net import Net
from tests import pretend_gpu
from tests.pretend_gpu import OnGpu, pretended
from tests.recorded import Again, Tape, kernels_on_tape

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

KERNELS = ["_norm", "_store", "_attend", "_norm", "_swiglu"]


def model(pattern: str, quantized: bool = False) -> Model:
    config = presets.get("test").model
    config = dataclasses.replace(
        config, attn_pattern=pattern, window=8, top_k=3, kv_heads=1, heads=2, dense_length=16 * ("S" in pattern)
    )
    net = Net(config).init_(5).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    made = Model(config, net, Tokenizer.bytes_only())
    return made.quantized() if quantized else made


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(InterpretedFunction, "run", kernels_on_tape(InterpretedFunction.run))
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 16)


@pytest.mark.parametrize(("pattern", "teams"), [("H", False), ("D", False), ("H", True)])
def test_a_replay_gives_what_the_kernels_give_bit_for_bit(
    pattern: str, teams: bool, taped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As requests join and leave, at all depths: logits of each step, and what is stored, beside the same sizes run anew; and
    the answers of an engine without graphs. No operator in it waits for a value."""
    if teams:
        for name, value in (("FEW_NUMBERS", 0), ("ALONE_BLOCKS", 0), ("_teams", lambda *given: (2, 2))):
            monkeypatch.setattr(launch, name, value)
    made, counts = model(pattern), Again()
    asked = [
        Request(
            [40 + i, *range(50, 50 + 5 * i)], Sampling(temperature=0, max_tokens=3 + i, ignore_eos=True), depth=depth
        )
        for i, depth in enumerate(("full", "shallow", "middle", "full"))
    ]
    want = [answer.tokens for answer in Engine(made, units=80, max_batch=2).generate(asked)]
    engine = Engine(made, units=80, max_batch=2)
    cache = engine.runner.cache
    engine.runner.graphs = Graphs(made.net, cache, 2, Tape(counts))
    replay, steps = engine.runner.graphs.run, list[int]()

    def both(works: Any) -> Tensor:
        before = cache.kv.clone(), cache.summaries.clone()
        mine = [replay(works).clone(), cache.kv[:, 1:].clone(), cache.summaries[:, 1:].clone()]
        cache.kv.copy_(before[0])
        cache.summaries.copy_(before[1])
        anew = [Graphs(made.net, cache, 2, lambda run: run).run(works).clone(), cache.kv[:, 1:], cache.summaries[:, 1:]]
        assert all(map(torch.equal, mine, anew))
        steps.append(len(works))
        return mine[0]

    engine.runner.graphs.run = both  # type: ignore[method-assign]
    assert [answer.tokens for answer in engine.generate(asked)] == want
    assert {*steps} == {1, 2} and counts.replayed > counts.made > 6
    engine.scheduler.check_integrity()


def test_the_tape_replays_no_python_and_refuses_what_waits() -> None:
    x, out, seen = torch.zeros(3), torch.zeros(3), list[int]()

    def run() -> None:
        seen.append(1)
        out.copy_(x.sin() + len(seen))

    replay = Tape()(run)
    x.fill_(2.0)
    replay()
    assert seen == [1, 1] and torch.equal(out, torch.full((3,), 2.0).sin() + 2)
    for waiting in (lambda: x[x > 0], lambda: x.sum().item(), lambda: x.nonzero()):
        with pytest.raises(RuntimeError, match="waits for the device"):
            Tape()(waiting)


@pytest.fixture
def kernels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels on a pretended GPU: they run on what its tensors hold."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def instead(self: Any, *args: Any, **named: Any) -> None:
        pretend_gpu.launched.append(self.fn.__name__)
        there = [each.held if isinstance(each, OnGpu) else each for each in args]
        assert all(isinstance(each, OnGpu) for each in args if isinstance(each, Tensor)), "a tensor of the host"
        with _disable_current_modes():
            run(self, *there, **named)

    monkeypatch.setattr(launch, "ON", {"cuda"})
    # rows by which an engine tries the kernels: 128 take the interpreter a minute
    monkeypatch.setattr(launch, "BUSY", 2)
    monkeypatch.setattr(launch, "able", lambda device: True)
    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(InterpretedFunction, "run", instead)


GREEDY = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True)
ALL_ASKED = Sampling(temperature=0.7, top_p=0.9, seed=1, max_tokens=3, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize(
    ("pattern", "pieces", "few", "sampling", "beside"),
    [
        ("H", 2, 0, ALL_ASKED, 89),
        ("L", 2, 0, ALL_ASKED, 89),
        ("H", 1, launch.FEW_NUMBERS, ALL_ASKED, 89),
        ("H", 1, launch.FEW_NUMBERS, GREEDY, 16),
    ],
)
def test_a_decoding_step_on_a_gpu_waits_for_one_copy_and_its_launches_are_counted(
    pattern: str,
    pieces: int,
    few: int,
    sampling: Sampling,
    beside: int,
    kernels_there: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it, from the plan to the tokens. A layer is five kernels of ours, four products, and the gate's sigmoid; a group
    adds a sum, the zeros that those count from who join pieces, if there are pieces, and the first one what embeds and rotates;
    `beside` all layers are exit, head and sampler."""
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (pieces, pieces * (far > 0)))
    monkeypatch.setattr(launch, "FEW_NUMBERS", few)
    layers: dict[int, list[str]] = {}
    with pretended() as gpu:
        made = model(pattern)
        made.net.float()
        engine = Engine(made.to(gpu), units=80, max_batch=4, max_batch_tokens=128)
        engine.runner.graphs = kept = Graphs(made.net, engine.runner.cache, 4, lambda run: run)
        run, steps, group = engine.runner.run, list[tuple[int, list[str], int]](), kept._group

        def counted(plan: Plan) -> Outcome:
            rows = len(plan.works) * kept.takes(plan.works)
            pretend_gpu.waited.clear()
            pretend_gpu.launched.clear()
            found = run(plan)
            steps.append((rows, list(pretend_gpu.waited), len(pretend_gpu.launched)))
            return found

        def layers_of(j: int, b: int, width: int, kind: Kind) -> None:
            before = len(pretend_gpu.launched)
            group(j, b, width, kind)
            layers[j] = pretend_gpu.launched[before:]

        engine.runner.run, kept._group = counted, layers_of  # type: ignore[method-assign]
        engine.generate([Request([40 + i, *range(50, 66)], sampling, depth="full") for i in range(2)])
    assert [waits for rows, waits, _ in steps if rows == 2] == [["tolist"]] * 2
    assert Counter(name for name in layers[1] if name[0] == "_") == Counter(KERNELS), "a group is one layer"
    others = [name for name in layers[1] if name[0] != "_"]
    assert others.count("zeros") == (pieces > 1)
    # products, sum and sigmoid; what the group leaves is copied by a way that the pretended device does not count
    assert len(others) == 4 + 1 + (pattern == "H") + (pieces > 1), others
    assert len(layers[0]) - len(layers[1]) == 15, layers[0]
    assert max(total for rows, _, total in steps if rows == 2) == beside + sum(map(len, layers.values()))
