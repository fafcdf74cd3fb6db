"""Steps with drafts, adapters and compared exits as graphs over the Triton kernels: recorded as strictly as a device does, and
on a pretended GPU, where every launch is counted, and all that the host waits for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal import Engine, Model, Request, Sampling
from shoal.engine.drafts import Rounds
from shoal.engine.graphs import Graphs, Kind
from shoal.engine.plan import Outcome, Plan
from shoal.engine.runner import Runner
from shoal.model.adapters import Adapter
from tests import pretend_gpu
from tests.adapters import linears
from tests.pretend_gpu import pretended
from tests.recorded import Again, Tape
from tests.triton.test_graphs import KERNELS, kernels_there, model, taped  # noqa: F401  # fixtures

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine


def adapters(made: Model) -> list[Adapter]:
    """Two, of other ranks, of which one changes all linears and the other some."""
    found = []
    for number, ranks in enumerate((2, 5)):
        draw, pairs = torch.Generator().manual_seed(number), {}
        for index, (name, linear) in enumerate(linears(made).items()):
            if number == 0 or index % 3 == 0:
                sizes = linear.weight.shape[::-1]  # type: ignore[union-attr,index,operator]
                a, b = (torch.randn(ranks, size, generator=draw, dtype=torch.float64) / size**0.5 for size in sizes)
                pairs[name] = a.to(made.net.dtype), b.to(made.net.dtype)
        found.append(Adapter(f"adapter {number}", pairs))
    return found


def asked(drafts: list[int], names: list[str], gaps: bool = False, tokens: int = 3, **more: Any) -> list[Request]:
    return [
        Request(
            [40 + i, *range(50, 57 + 5 * i)],
            Sampling(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "speculative": count, **more}),
            depth="full" if count or not i else "shallow",
            adapter=name,
            gaps=gaps,
        )
        for i, (count, name) in enumerate(zip(drafts, names, strict=True))
    ]


class Thrice:
    """In place of the `run` of a runner: each step that its graphs take is replayed, launched anew by graphs that record
    nothing, and run without any, from the same memory. What each leaves must be equal to the bit: logits that are drawn from,
    keys, values and summaries; without graphs where the bucket has no more rows than the step."""

    def __init__(self, runner: Runner, net: Any) -> None:
        self.runner, self.run, self.net, self.kinds = runner, runner.run, net, Counter[Any]()
        runner.run = self  # type: ignore[assignment, method-assign]

    def __call__(self, plan: Plan) -> Outcome:
        kept, cache = self.runner.graphs, self.runner.cache
        assert kept is not None
        if not kept.takes(plan.works):
            return self.run(plan)
        before, sample = [cache.kv.clone(), cache.summaries.clone()], self.runner._sample

        def left(graphs: Graphs | None) -> tuple[Outcome, list[Tensor], list[int]]:
            given, counts = list[Tensor](), list[int]()

            def seen(works: Any, logits: Tensor, *rest: Any) -> Any:
                given.append(logits.clone())
                counts.extend(work.count for work in works)
                return sample(works, logits, *rest)

            cache.kv.copy_(before[0])
            cache.summaries.copy_(before[1])
            self.runner.graphs, self.runner._sample = graphs, seen  # type: ignore[method-assign]
            try:
                outcome = self.run(plan)
            finally:
                self.runner._sample = sample  # type: ignore[method-assign]
            return outcome, [*given, cache.kv[:, 1:].clone(), cache.summaries[:, 1:].clone()], counts

        mine = left(kept)
        anew = left(Graphs(self.net, cache, kept._most, lambda run: run))
        other = left(None)
        self.runner.graphs = kept
        kind = Kind.of(plan.works, any(work.drafts for work in plan.works))
        assert all(map(torch.equal, mine[1], anew[1]))
        exact = sum(mine[2]) in kept._buckets[kind] and len({work.last for work in plan.works}) == 1
        for a, b in zip(mine[1], other[1], strict=True):
            assert torch.equal(a, b) if exact and len(plan.works) == 1 else torch.allclose(a, b, rtol=0, atol=1e-9)
        assert [sampled.token for sampled in mine[0].samples] == [sampled.token for sampled in other[0].samples]
        self.kinds[kind, exact and len(plan.works) == 1] += 1
        return mine[0]


@pytest.mark.parametrize(
    ("drafts", "names", "gaps", "seen", "unread"),
    [
        ([1], [""], False, {(Kind(True), True)}, False),
        ([1], [""], False, {(Kind(True), True)}, True),
        ([1, 0], ["", ""], True, {(Kind(True), False)}, False),
        ([1, 0], ["", ""], True, {(Kind(True), False)}, True),
        ([0, 0], ["adapter 0", ""], False, {(Kind(adapted=True), False)}, False),
        ([1], ["adapter 1"], False, {(Kind(True, True), True)}, False),
        ([1], ["adapter 1"], False, {(Kind(True, True), True)}, True),
    ],
)
def test_a_replay_gives_what_the_kernels_give_bit_for_bit(
    drafts: list[int],
    names: list[str],
    gaps: bool,
    seen: set[Any],
    unread: bool,
    taped: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the answers of an engine without graphs whose drafts are read one by one; those of the others are, or stay on the
    device (`unread`). No operator in a graph waits for a value."""
    made, counts = model("H"), Again()
    most = len(drafts)

    def engine_of() -> Engine:
        engine = Engine(made, units=80, max_batch=most, speculative_max_batch=most)
        for each in adapters(made):
            engine.load_adapter(each)
        return engine

    want = [answer.tokens for answer in engine_of().generate(asked(drafts, names, gaps))]
    if unread:
        of = Rounds.of
        monkeypatch.setattr(Rounds, "of", lambda works, device: of(works, torch.device("cuda")))
    engine = engine_of()
    engine.runner.graphs = Graphs(made.net, engine.runner.cache, most, Tape(counts))
    thrice = Thrice(engine.runner, made.net)
    assert [answer.tokens for answer in engine.generate(asked(drafts, names, gaps))] == want
    assert seen <= {*thrice.kinds} and counts.replayed >= counts.made > 3
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("drafts", "name", "gaps", "more", "calls"),
    [
        (2, "", False, {}, 3 * 2 + 6),
        (2, "", False, {"frequency_penalty": 0.5}, 3 * 2 + 6),
        (0, "adapter 0", False, {}, 6),
        (0, "", True, {}, 6),
    ],
)
def test_on_a_gpu_a_step_waits_for_its_tokens_and_launches_of_a_layer_are_counted(
    drafts: int,
    name: str,
    gaps: bool,
    more: dict[str, Any],
    calls: int,
    kernels_there: None,  # noqa: F811
) -> None:
    """Of a layer one more where drafts are verified, its summaries; eight more, two beside each linear, where somebody has an
    adapter. What penalties need of drafts is not waited for. A draft is three calls, and what is left six more."""
    layers: dict[tuple[int, Kind], list[str]] = {}
    steps, played = list[tuple[list[str], int]](), list[Any]()
    with pretended() as gpu:
        made = model("H")
        made.net.float()
        engine = Engine(made.to(gpu), units=80, max_batch=1, max_batch_tokens=128, speculative_max_batch=1)
        for each in adapters(model("H")):
            pairs = {key: (a.float().to(gpu), b.float().to(gpu)) for key, (a, b) in each.pairs.items()}
            engine.load_adapter(Adapter(each.identity, pairs))
        engine.runner.graphs = kept = Graphs(made.net, engine.runner.cache, 1, lambda run: run)
        run, group, play = engine.runner.run, kept._group, kept._play

        def counted(plan: Plan) -> Outcome:
            whole = kept.takes(plan.works) and bool(plan.works[0].drafts) == bool(drafts)
            pretend_gpu.waited.clear()
            played.clear()
            found = run(plan)
            if whole:
                steps.append(([*pretend_gpu.waited], len(played)))
            return found

        def layers_of(j: int, b: int, width: int, kind: Kind) -> None:
            before = len(pretend_gpu.launched)
            group(j, b, width, kind)
            layers[j, kind] = pretend_gpu.launched[before:]

        engine.runner.run, kept._group = counted, layers_of  # type: ignore[method-assign]
        kept._play = lambda key, run: (played.append(key), play(key, run))[1]  # type: ignore[method-assign]
        engine.generate(asked([drafts], [name], gaps, tokens=6, **more))
    assert (["tolist"], calls) in steps and len(steps) > 1, steps
    assert all(waits == ["tolist"] for waits, _ in steps), steps
    others = ["_summarise"] * (drafts > 0) + ["_thin", "_wide"] * 4 * bool(name)
    layer = layers[1, Kind(drafts=drafts > 0, adapted=bool(name))]
    kernels = [each for each in layer if each[0] == "_" and each != "_to_copy"]  # which is torch's, of the rotation
    assert Counter(kernels) == Counter([*KERNELS, *others]), "a group is one layer"
    assert layer.count("index_select") == (drafts > 0)
