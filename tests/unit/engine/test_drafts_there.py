"""Drafts that stay on a device until a step's one copy, beside those that the host reads one by one: on a pretended GPU, whose
values are real, and by graphs on a CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import Engine, Request, Sampling
from shoal.engine import graphs
from shoal.engine.drafts import Rounds
from shoal.engine.events import MAX_DRAFTS, Guide
from shoal.engine.graphs import Graphs
from shoal.engine.plan import Outcome, Plan, Sampled
from shoal.model.sending import send
from tests import pretend_gpu
from tests.pretend_gpu import pretended
from tests.recorded import Again
from tests.unit.engine.lively import lively

MODEL = lively()
CUDA = torch.device("cuda")
FREE: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 0.8, "top_k": 9, "min_p": 0.01}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
    {"temperature": 0, "logit_bias": {70: 2.0}, "min_tokens": 4, "ignore_eos": False, "stop_token_ids": (*range(20, 60),)},
    {"temperature": 0.7, "stop_token_ids": (*range(20, 90),)}, {"repetition_penalty": 1.3, "top_p": 0.9},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"banned": tuple((a, b) for a in range(20, 260, 2) for b in range(20, 260, 3)), "frequency_penalty": -0.7},
]  # fmt: skip
GUIDED: dict[str, Any] = {"guided": Guide("regex", "[a-f]{2,9}"), "ignore_eos": False}


pytestmark = pytest.mark.usefixtures("torch_alone")


def asked(seed: int, count: int, kinds: list[dict[str, Any]], tolerances: tuple[float | None, ...]) -> list[Request]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        kind, drafts = rng.choice(kinds), rng.choice((0, 1, 3, 5))
        told = {"temperature": rng.choice((0.0, 0.7)), "ignore_eos": True, "seed": i, **kind, "speculative": drafts}
        prompt = [rng.randrange(20, 260) for _ in range(rng.randrange(1, 30))]
        sampling = Sampling(max_tokens=rng.randrange(4, 16), **told)
        depth = rng.choice(("full", "full", "middle", "shallow"))
        tolerance = rng.choice(tolerances) if depth == "full" else None
        made.append(Request(prompt, sampling, depth=depth, quality_tolerance=tolerance, id=str(i), signals=i % 2 == 0))
    return made


def said(sampled: Sampled) -> Any:
    return sampled.token, sampled.drafted, [*map(said, sampled.after)]


class Twice:
    """In place of the `run` of an engine's runner: each step that drafts is taken by drafts which the host does not read in
    between, and from the same memory by those that it reads one by one. Both must give the same to the bit: logits of all rows
    that are read, samples with what they spent, keys, values and summaries."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.runner, self.run, self.device = engine.runner, engine.runner.run, device
        self.steps = self.cut = 0
        self.runner.run = self  # type: ignore[assignment, method-assign]

    def __call__(self, plan: Plan) -> Outcome:
        if not any(work.drafts for work in plan.works) or Rounds.of(plan.works, CUDA) is None:
            return self.run(plan)
        cache = self.runner.cache
        before = [cache.kv.clone(), cache.summaries.clone()]
        mine = self._left(plan, before, stay=True)
        other = self._left(plan, before, stay=False)
        assert [*map(said, mine[0].samples)] == [*map(said, other[0].samples)]
        self.steps += 1
        counts = [[work.count for work in works] for works, _ in (mine[1], other[1])]
        if counts[0] != counts[1]:  # a draft ended an answer, or was none: what follows it is nobody's
            self.cut += 1
            assert all(a >= b for a, b in zip(*counts, strict=True))
            if not len(mine[1][1]):
                return mine[0]
            rows = [torch.split(logits, count) for (_, logits), count in zip((mine[1], other[1]), counts, strict=True)]
            for a, b in zip(*rows, strict=True):
                assert torch.allclose(a[: len(b)], b, rtol=0, atol=1e-9)
        else:
            assert mine[0] == other[0] and torch.equal(mine[1][1], other[1][1])
            assert torch.equal(mine[2][0], other[2][0]) and torch.equal(mine[2][1], other[2][1])
        return mine[0]

    def _left(self, plan: Plan, before: list[Tensor], stay: bool) -> tuple[Outcome, Any, list[Tensor]]:
        cache, given, sample = self.runner.cache, list[Any](), self.runner._sample
        cache.kv.copy_(before[0])
        cache.summaries.copy_(before[1])

        def seen(works: Any, logits: Tensor, *rest: Any) -> Any:
            alone = all(work.count == 1 or work.verify for work in works)
            # beside a prompt rows are not those of the logits
            given[:] = [work for work in works if work.sample], logits.clone() if alone else logits[:0].clone()
            return sample(works, logits, *rest)

        real = Rounds.of
        self.runner._sample = seen  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rounds, "of", lambda works, _: real(works, self.device) if stay else None)
            try:
                outcome = self.run(plan)
            finally:
                self.runner._sample = sample  # type: ignore[method-assign]
        return outcome, given, [cache.kv[:, 1:].clone(), cache.summaries[:, 1:].clone()]


@pytest.mark.drill
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), recorded=st.booleans())
def test_a_step_gives_what_it_gives_where_the_host_reads_each_draft(seed: int, count: int, recorded: bool) -> None:
    """By graphs and without; and the answers are those of an engine that drafts as a CPU does."""
    limits: dict[str, Any] = {"units": 200, "max_batch": 5, "max_batch_tokens": 64, "speculative_max_batch": 5}
    engine, other = Engine(MODEL, **limits), Engine(MODEL, **limits)
    if recorded:
        engine.runner.graphs = Graphs(MODEL.net, engine.runner.cache, 5, Again())
    twice = Twice(engine, CUDA)
    requests = asked(seed, count, FREE, (None, 0.05, 2.0))
    got, want = engine.generate(requests), other.generate(requests)
    for a, b in zip(got, want, strict=True):
        assert (a.tokens, a.finish_reason, a.depth) == (b.tokens, b.finish_reason, b.depth)
        assert a.finished is not None and b.finished is not None
        assert a.finished.spent == pytest.approx(b.finished.spent, abs=1e-9)
    for name in ("drafts", "drafts_accepted"):
        assert getattr(engine.scheduler.metrics, name) == getattr(other.scheduler.metrics, name)
    engine.scheduler.check_integrity()
    event(f"steps {twice.steps > 0}, cut {twice.cut > 0}, graphs {recorded}")


def test_drafts_that_end_an_answer_are_among_those_that_are_compared() -> None:
    engine = Engine(MODEL, units=200, max_batch=5, max_batch_tokens=64, speculative_max_batch=5)
    twice = Twice(engine, CUDA)
    for seed in range(4):
        engine.generate(asked(seed, 5, FREE[3:], (None, 2.0)))
    assert twice.cut > 2 and twice.steps > twice.cut + 5


def steps_on_a_gpu(
    requests: list[Request], recorded: bool, answers: list[Any] | None = None, kind: torch.dtype = torch.float32
) -> tuple[list[tuple[int, list[str]]], list[Any]]:
    """Of each step that drafts how many drafts the longest has, and what the host waited for; and of the answers, which are put
    into `answers`, the tokens and why they ended."""
    steps = list[tuple[int, list[str]]]()
    with pretended() as gpu:
        made = lively()
        made.net.to(kind)
        engine = Engine(made.to(gpu), units=200, max_batch=4, max_batch_tokens=128, speculative_max_batch=4)
        if recorded:
            engine.runner.graphs = Graphs(made.net, engine.runner.cache, 4, lambda run: run)
        run = engine.runner.run

        def counted(plan: Plan) -> Outcome:
            pretend_gpu.waited.clear()
            found = run(plan)
            if most := max(work.drafts for work in plan.works):
                # without kernels operators of torch wait to know how many rows end a block
                steps.append((most, [each for each in pretend_gpu.waited if "nonzero" not in each]))
            return found

        engine.runner.run = counted  # type: ignore[method-assign]
        found = engine.generate(requests)
    if answers is not None:
        answers += found
    return steps, [(answer.tokens, answer.finish_reason) for answer in found]


@pytest.mark.drill
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_with_drafts_waits_for_one_copy(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what it gives where the host reads each draft."""
    requests = asked(3, 4, FREE, (None,))
    steps, answers = steps_on_a_gpu(requests, recorded)
    assert len(steps) > 3 and all(waits == ["tolist"] for _, waits in steps), steps
    monkeypatch.setattr(Rounds, "of", lambda works, device: None)
    others, want = steps_on_a_gpu(requests, recorded)
    assert answers == want and len(others) == len(steps)
    assert all(len(waits) > 1 for _, waits in others)


def test_under_a_grammar_the_host_reads_each_draft_before_the_next() -> None:
    drafts = {"temperature": 0, "ignore_eos": True, "max_tokens": 8, "speculative": 2}
    steps, _ = steps_on_a_gpu([Request([40, 50, 60], Sampling(**{**drafts, **GUIDED}), depth="full")], recorded=True)
    assert steps and {len(waits) for most, waits in steps if most == 2} <= {2, 3}, steps
    assert all(len(waits) > 1 for _, waits in steps)


TOLERANT: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.0, "logprobs": 2}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.2, "min_p": 0.01, "logit_bias": {70: 2.0}},
]  # fmt: skip


@pytest.mark.drill
@pytest.mark.parametrize("tolerance", [0.05, 1.0])
def test_prices_come_with_the_tokens_and_are_those_of_the_host(tolerance: float) -> None:
    """A step with drafts under a tolerance waits once, whatever they cost; tokens, logprobs, and what was spent are those of a
    CPU, where each price is computed when it is asked for."""
    common = {"max_tokens": 8, "ignore_eos": True, "speculative": 3}
    requests = [
        Request([40 + 3 * i, 50, 60 + i], Sampling(**{**common, **kind, "seed": i}), depth="full",
                quality_tolerance=tolerance, id=str(i), signals=i % 2 == 0)
        for i, kind in enumerate(TOLERANT)
    ]  # fmt: skip
    want = Engine(MODEL, units=200, max_batch=4, max_batch_tokens=128, speculative_max_batch=4).generate(requests)
    answers = list[Any]()
    steps, _ = steps_on_a_gpu(requests, recorded=False, answers=answers, kind=torch.float64)
    assert len(steps) > 1 and all(waits == ["tolist"] for _, waits in steps), steps
    for a, b in zip(answers, want, strict=True):
        assert a.finished is not None and b.finished is not None
        assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
        assert a.finished.spent == pytest.approx(b.finished.spent, abs=1e-9)
        assert [entry.token for entry in a.logprobs] == [entry.token for entry in b.logprobs]
        assert [entry.logprob for entry in a.logprobs] == pytest.approx(
            [entry.logprob for entry in b.logprobs], abs=1e-5
        )
    assert tolerance < 1 or any(each.finished and each.finished.spent for each in want)


def test_a_model_that_gives_no_numbers_ends_its_requests_as_before() -> None:
    found = list[list[Any]]()
    for stay in (True, False):
        model = lively()
        model.net.exit_norms[str(model.config.exits[0])].weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
        engine = Engine(model, units=200, speculative_max_batch=4)
        with pytest.MonkeyPatch.context() as patch:
            real = Rounds.of
            patch.setattr(Rounds, "of", lambda works, _, real=real, stay=stay: real(works, CUDA) if stay else None)
            sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True, speculative=3)
            answers = engine.generate([Request([40, 50, 60], sampling, depth="full")])
        found.append([(each.tokens, each.finish_reason) for each in answers])
        assert engine.scheduler.metrics.drafts == 0, "no draft could be drawn, and full depth says what it says"
    assert found[0] == found[1] and found[0][0][1] == "length"


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_a_device_that_refuses_in_the_middle_of_drafts_goes_on_without_graphs(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was drafted by then, which nobody has read yet."""
    record, of = Again(), Rounds.of

    def refuse(run: graphs.Run) -> graphs.Run:
        if record.made == at:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(run)

    limits: dict[str, Any] = {"units": 200, "max_batch": 4, "max_batch_tokens": 64, "speculative_max_batch": 4}
    requests = asked(1, 4, FREE, (None, 2.0))
    want = [answer.tokens for answer in Engine(MODEL, **limits).generate(requests)]
    monkeypatch.setattr(Rounds, "of", lambda works, _: of(works, CUDA))
    engine = Engine(MODEL, **limits)
    engine.runner.graphs = Graphs(MODEL.net, engine.runner.cache, 4, refuse)
    assert [answer.tokens for answer in engine.generate(requests)] == want
    assert engine.runner.graphs is None


@pytest.mark.drill
def test_a_step_that_fails_midway_leaves_no_memory_that_the_next_writes() -> None:
    """Of the host, which the device may still copy from: nothing waits for it in between. The pretended GPU looks at what was
    sent when the host waits."""
    sampling = Sampling(temperature=0, max_tokens=MAX_DRAFTS + 4, ignore_eos=True, speculative=MAX_DRAFTS)
    request, left = Request([40, 50, 60], sampling, depth="full"), list[int]()
    with pretended() as gpu:
        made = lively()
        made.net.float()
        engine = Engine(made.to(gpu), units=200, max_batch=1, max_batch_tokens=128, speculative_max_batch=1)
        engine.runner.graphs = Graphs(made.net, engine.runner.cache, 1, lambda run: run)
        run, sampler = engine.runner.run, engine.runner.sampler

        def twice(plan: Plan) -> Outcome:
            if max(work.drafts for work in plan.works) < MAX_DRAFTS:
                return run(plan)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sampler, "sample", lambda *_: (_ for _ in ()).throw(MemoryError))
                with pytest.raises(MemoryError):
                    run(plan)
            left.append(len(pretend_gpu.copying))
            # one draft less: what is sent differs from what was
            return run(replace(plan, works=[replace(work, drafts=MAX_DRAFTS - 1) for work in plan.works]))

        engine.runner.run = twice  # type: ignore[method-assign]
        (answer,) = engine.generate([request])
    assert left[0] > MAX_DRAFTS + 1 and answer.finish_reason == "length", "all of the step's copies may still go on"


def test_memory_that_is_written_while_it_is_copied_is_found() -> None:
    """By the pretended GPU, when the host waits next; what is sent by `send` may be written at once."""
    with pretended() as gpu:
        there, host = torch.zeros(3, device=gpu), np.ones(3, dtype=np.float32)
        send(host, there)
        host[:] = 2
        assert there.tolist() == [1.0] * 3
        kept = torch.ones(3).pin_memory()
        there.copy_(kept, non_blocking=True)
        kept.numpy()[:] = 2
        with pytest.raises(AssertionError, match="was written while it was copied"):
            there.tolist()
