"""Drawing on a device: the tokens and numbers of the CPU for the same logits, and one copy to the host. The device is pretended
(`tests/pretend_gpu.py`), its values are real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import Engine, Model, Request, Sampling
from shoal.engine import filters
from shoal.engine.device import Unread
from shoal.engine.events import Guide
from shoal.engine.guided import Grammars
from shoal.engine.plan import Outcome, Plan, Sampled
from shoal.engine.sampler import Sampler
from shoal.engine.tolerance import Chain
from tests import pretend_gpu
from tests.pretend_gpu import pretended
from tests.unit.engine.test_sampler import CLOSED, Draw

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 3}, {"temperature": 1.0}, {"temperature": 0.3, "top_k": 5},
    {"temperature": 2.0, "top_p": 0.9, "logprobs": 0}, {"temperature": 1.0, "min_p": 0.02}, {"temperature": 1e-44},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.5, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {9: 3.0}, "min_tokens": 4},
]  # fmt: skip


def sampled(rows: torch.Tensor, draws: list[Draw]) -> list[Sampled]:
    forbidden = torch.zeros(rows.shape[-1], dtype=torch.bool)
    forbidden[CLOSED] = True
    return Sampler(forbidden.to(rows.device)).sample(rows, draws)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    spread=st.sampled_from([0.05, 1.0, 8.0]),
    vocab=st.sampled_from([300, 3000]),
)
def test_tokens_and_logprobs_are_those_of_the_cpu(
    seed: int, dtype: torch.dtype, kinds: list[dict[str, Any]], spread: float, vocab: int
) -> None:
    """By the compiled loops, too, in fp32 and in fp64; of seeds, whatever else is in the batch."""
    rows = torch.randn(len(kinds), vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype) * spread
    draws = [
        Draw(Sampling(**kind), tokens=[50, 51, 60 + r, 9], seed=seed + r, watched=r % 2 == 0)
        for r, kind in enumerate(kinds)
    ]
    for draw in draws[::4]:
        draw.tokens = draw.tokens[:2]  # the first of an answer, whose NLL is looked at
    plain = sampled(rows.clone(), draws)
    with torch.inference_mode():
        compiled = sampled(rows.clone(), draws)
    with pretended() as gpu:
        there = sampled(rows.clone().to(gpu), draws)
    assert [s.token for s in there] == [s.token for s in plain] == [s.token for s in compiled]
    for a, b in zip(there, plain, strict=True):
        assert (a.nll is None) == (b.nll is None) and (a.logprob is None) == (b.logprob is None)
        assert a.nll == pytest.approx(b.nll, abs=1e-5)
        if a.logprob is not None and b.logprob is not None:
            assert a.logprob.logprob == b.logprob.logprob and a.logprob.top == b.logprob.top


def test_each_row_that_asks_for_logprobs_has_its_own_and_as_many_as_it_asks_for() -> None:
    """Two, none, three beside the token's, and one whose token is only looked at."""
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = [2, None, 3, None, 1]
    draws = [
        Draw(Sampling(temperature=0, logprobs=count), tokens=[50, 51], watched=r == 3) for r, count in enumerate(asked)
    ]
    want = rows.log_softmax(-1)
    with pretended() as gpu:
        found = Sampler(torch.zeros(40, dtype=torch.bool).to(gpu)).sample(rows.clone().to(gpu), draws)
    for one, count, row in zip(found, asked, want, strict=True):
        best = row.topk(count or 1)
        assert one.token == int(best.indices[0])
        if count is None:
            assert one.logprob is None
            continue
        assert one.logprob is not None and one.logprob.logprob == pytest.approx(float(best.values[0]))
        assert [token for token, _ in one.logprob.top] == best.indices.tolist()
        assert [value for _, value in one.logprob.top] == pytest.approx(best.values.tolist())
    assert [one.nll is None for one in found] == [True, True, True, False, True]
    assert found[3].nll == pytest.approx(-float(want[3].max()))


def test_what_the_host_must_know_comes_in_one_copy() -> None:
    """Of any kinds in a batch, grammars and rows without a token among them."""
    rows = torch.randn(len(KINDS) + 2, 300, generator=torch.Generator().manual_seed(0))
    rows[-1] = torch.nan
    draws = [
        Draw(Sampling(**kind), watched=True)
        for kind in [*KINDS, {"temperature": 0.5}, {"temperature": 1.0, "top_p": 0.5}]
    ]
    draws[-2].grammar = Grammars(Model.from_preset("test").tokenizer, 300).compile(Guide("choice", ("yes", "no")))
    with pretended() as gpu:
        there = rows.to(gpu)
        for some in (slice(0, 1), slice(2, 3), slice(0, len(draws) - 1)):
            sampler_rows, forbidden = there[some].clone(), torch.zeros(300, dtype=torch.bool).to(gpu)
            sampler = Sampler(forbidden)
            pretend_gpu.waited.clear()
            found = sampler.sample(sampler_rows, draws[some])
            assert pretend_gpu.waited == ["tolist"]
            assert all(each.error is None for each in found)
        broken = Sampler(forbidden).sample(there[-1:].clone(), draws[-1:])
    assert broken[0].error is not None and broken[0].error.status == 500


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    near=st.sampled_from([0.01, 0.3, 2.0]),
    tolerance=st.sampled_from([0.05, 0.5, 50.0]),
    read=st.booleans(),
)
def test_drafts_stand_at_the_price_that_they_have_on_a_cpu_to_the_bit(
    seed: int, dtype: torch.dtype, kinds: list[dict[str, Any]], near: float, tolerance: float, read: bool
) -> None:
    """Of chains of four drafts and the row after them, whose tokens the host has `read` or not; in one copy."""
    draw, vocab = torch.Generator().manual_seed(seed), 300
    rows = torch.randn(5 * len(kinds), vocab, generator=draw, dtype=dtype) * 3
    exits = rows + near * torch.randn(rows.shape, generator=draw, dtype=dtype)
    exits[:, CLOSED] = -torch.inf
    drafts = torch.randint(vocab - 20, (len(rows),), generator=draw) + 20
    draws = [
        Draw(Sampling(**kind), tokens=[50, 51, *range(60, 60 + i)], seed=seed + c, watched=c == 0)
        for c, kind in enumerate(kinds)
        for i in range(5)
    ]

    def settled(there: Any, chains: list[Chain], unread: Unread) -> list[tuple[Any, ...]]:
        forbidden = torch.zeros(vocab, dtype=torch.bool)
        forbidden[CLOSED] = True
        sampler = Sampler(forbidden.to(there.device))
        pretend_gpu.waited.clear()
        found = sampler.sample(there, draws, chains, unread)
        return [(one.token, one.spent, one.logprob and one.logprob.token, one.error) for one in found]

    def chains_of(logits: Any, known: bool) -> tuple[list[Chain], Unread]:
        chains, unread = list[Chain](), Unread()
        for c in range(len(kinds)):
            span, told = slice(5 * c, 5 * c + 4), list[int]()
            there = () if known else tuple(drafts.to(logits.device)[span].unbind())
            if known:
                told += drafts[span].tolist()
            else:
                unread.add([*there], lambda numbers, told=told: told.extend(int(one) for (one,) in numbers))  # type: ignore[misc]
            chains.append(Chain(5 * c, told, logits[span].unbind(), tolerance, 0.01, 3 + c, there))
        return chains, unread

    want = settled(rows.clone(), *chains_of(exits, True))
    with pretended() as gpu:
        got = settled(rows.clone().to(gpu), *chains_of(exits.to(gpu), read))
        assert pretend_gpu.waited == ["tolist"]
    assert got == want


def test_a_nucleus_of_many_tokens_takes_a_second_copy_and_is_whole() -> None:
    vocab = 2 * filters.CANDIDATES_THERE
    rows = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)) * 0.01
    for top_p, copies in ((0.3, 1), (0.95, 2)):
        draws = [Draw(Sampling(top_p=top_p), seed=3)]
        want = sampled(rows.clone(), draws)[0].token
        with pretended() as gpu:
            there = rows.clone().to(gpu)
            forbidden = torch.zeros(vocab, dtype=torch.bool)
            forbidden[CLOSED] = True
            sampler = Sampler(forbidden.to(gpu))
            pretend_gpu.waited.clear()
            assert sampler.sample(there, draws)[0].token == want
        assert pretend_gpu.waited == ["tolist"] * copies


def test_a_decoding_step_of_an_engine_samples_with_one_copy() -> None:
    """Whatever its requests ask."""
    with pretended() as gpu:
        engine = Engine(Model.from_preset("test", seed=3).to(gpu), units=200, max_batch_tokens=64)
        sample, run, copies = engine.runner.sampler.sample, engine.runner.run, list[int]()
        steps: list[bool] = []

        def counted(*given: Any) -> list[Sampled]:
            before = len(pretend_gpu.waited)
            found = sample(*given)
            copies.append(len(pretend_gpu.waited) - before)
            return found

        def noted(plan: Plan) -> Outcome:
            steps.append(len(plan.works) > 1 and all(work.sample and work.count == 1 for work in plan.works))
            return run(plan)

        engine.runner.sampler.sample, engine.runner.run = counted, noted  # type: ignore[method-assign]
        asked = [
            Request([30 + i, 40], Sampling(**{**kind, "max_tokens": 6, "ignore_eos": True, "seed": 1}), depth="full")
            for i, kind in enumerate(KINDS)
        ]
        assert all(len(answer.tokens) == 6 for answer in engine.generate(asked))
    assert sum(steps) >= 4 and copies == [1] * len(copies)
