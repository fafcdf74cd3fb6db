"""Steps with drafts, and of compared exits, as graphs on a CPU: `tests.recorded` stands in for the device."""

from __future__ import annotations

import dataclasses
import logging
import random
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import Engine, Request, Sampling
from shoal.engine import graphs
from shoal.engine.engine import Completion
from shoal.engine.events import MAX_DRAFTS, Guide
from shoal.engine.graphs import DRAFTS, PLAIN, Graphs
from shoal.engine.plan import Outcome, Plan
from shoal.model.cache import GroupCache
from shoal.model.cpu import fused
from shoal.model.net import Net
from tests.recorded import Again
from tests.unit.engine.lively import lively

MODEL = lively()
# a step of few units, in which requests are preempted; and one in which little more than the graphs' rows is drafted
LIMITS: list[dict[str, int]] = [{}, {"units": 60}, {"max_batch": 2}]


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops of a CPU are no part of it."""
    monkeypatch.setattr(fused, "usable", lambda x: False)
    monkeypatch.setattr(fused, "few", lambda rows: False)
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 16)


def engine_of(record: Any = None, **limits: int) -> Engine:
    limits = {"units": 200, "max_batch": 6, "max_batch_tokens": 40, "speculative_max_batch": 6} | limits
    engine = Engine(MODEL, **limits)  # type: ignore[arg-type]
    if record is not None:
        engine.runner.graphs = Graphs(MODEL.net, engine.runner.cache, limits["max_batch"], record)
    return engine


def asked(seed: int, count: int, most: int = 5) -> list[Request]:
    """Requests that draft more or less, with a tolerance or not, guided, penalised; and others."""
    rng = random.Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 7, "logprobs": 2},
        {"temperature": 0.5, "guided": Guide("regex", "[a-f]{2,9}"), "ignore_eos": False},
        {"temperature": 0, "frequency_penalty": 0.7}, {"temperature": 0, "stop_token_ids": (*range(20, 90),)},
    ]  # fmt: skip
    made = []
    for i in range(count):
        depth = rng.choice(("shallow", "middle", "full", "full"))
        tolerance = rng.choice((None, 0.05, 2.0)) if depth == "full" else None
        told = {"ignore_eos": True, "seed": 1, **rng.choice(kinds), "speculative": rng.choice((0, 1, 3, most))}
        sampling = Sampling(max_tokens=rng.randrange(1, 16), **told)
        prompt = [rng.randrange(20, 260) for _ in range(rng.randrange(1, 30))]
        gaps = rng.random() < 0.3
        made.append(Request(prompt, sampling, depth=depth, quality_tolerance=tolerance, gaps=gaps, id=str(i)))
    return made


def said(answers: list[Completion]) -> list[Any]:
    return [(answer.tokens, answer.finish_reason, answer.depth) for answer in answers]


@pytest.mark.drill
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 7), limits=st.sampled_from(LIMITS))
def test_answers_are_those_without_graphs(seed: int, count: int, limits: dict[str, int]) -> None:
    record = Again()
    engine, other = engine_of(record, **limits), engine_of(**limits)
    got, want = engine.generate(asked(seed, count)), other.generate(asked(seed, count))
    assert said(got) == said(want)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.finished is not None and theirs.finished is not None
        assert mine.finished.spent == pytest.approx(theirs.finished.spent, abs=1e-9)
    assert engine.scheduler.metrics.drafts == other.scheduler.metrics.drafts
    assert engine.scheduler.metrics.preemptions == other.scheduler.metrics.preemptions
    event(f"drafts {engine.scheduler.metrics.drafts > 0}, preempted {engine.scheduler.metrics.preemptions > 0}")
    engine.scheduler.check_integrity()


class Beside:
    """In place of the `run` of an engine's runner: each step with drafts that graphs take is taken again from the same memory,
    without graphs; what both leave is kept: logits that are drawn from, keys and values, summaries."""

    def __init__(self, engine: Engine) -> None:
        self.runner, self.run = engine.runner, engine.runner.run
        self.left: list[tuple[list[Tensor], list[Tensor], set[int]]] = []
        self.counts: list[list[int]] = []
        self.runner.run = self  # type: ignore[assignment, method-assign]

    def __call__(self, plan: Plan) -> Outcome:
        kept, cache = self.runner.graphs, self.runner.cache
        assert kept is not None
        if not kept.takes(plan.works) or not any(work.drafts for work in plan.works):
            return self.run(plan)
        before = [cache.kv.clone(), cache.summaries.clone()]
        holdings = [work.running.holding for work in plan.works]

        def left() -> tuple[Outcome, list[Tensor]]:
            given, sample = list[Tensor](), self.runner._sample
            cache.kv.copy_(before[0])
            cache.summaries.copy_(before[1])

            def seen(works: Any, logits: Tensor, *rest: Any) -> Any:
                given.append(logits.clone())
                self.counts.append([work.count for work in works])
                return sample(works, logits, *rest)

            self.runner._sample = seen  # type: ignore[method-assign]
            try:
                outcome = self.run(plan)
            finally:
                self.runner._sample = sample  # type: ignore[method-assign]
            return outcome, [*given, cache.kv.clone(), cache.summaries.clone()]

        mine = left()
        self.runner.graphs = None
        other = left()
        self.runner.graphs = kept
        own = {0}.union(*({*held.tables[:, held.at // held.page :].flatten().tolist()} for held in holdings))
        changed = (mine[1][1] != before[0]).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert {*changed} <= own, "what no row of the step writes changed"
        self.left.append((mine[1], other[1], own))
        return other[0]


@pytest.mark.drill
def test_a_step_writes_and_gives_what_the_other_way_does() -> None:
    """To rounding, and nothing else but the null unit changes; drafts of several lengths in one step."""
    record = Again()
    engine = engine_of(record)
    seen = Beside(engine)
    for seed in range(3):
        answers = engine.generate(asked(seed, 7))
        assert all(answer.finish_reason != "error" for answer in answers)
    assert len(seen.left) > 8 and record.replayed > record.made > 8
    for mine, other, _ in seen.left:
        assert torch.allclose(mine[0], other[0], rtol=0, atol=1e-9)
        for a, b in zip(mine[1:], other[1:], strict=True):
            assert torch.allclose(a[:, 1:], b[:, 1:], rtol=0, atol=1e-9)
    assert any(len({*counts}) > 2 for counts in seen.counts)


def test_the_tolerance_is_spent_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law that a draft was drawn from is kept: in the graphs' memory that of the next one lies."""
    drafts = Sampling(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True, speculative=4)
    one = [Request([30 + i] * 9, drafts, depth="full", quality_tolerance=1.0, id=str(i)) for i in range(3)]
    got, want = engine_of(Again()).generate(one), engine_of().generate(one)
    assert said(got) == said(want)
    spent = [[each.finished.spent for each in answers if each.finished] for answers in (got, want)]
    assert spent[0] == pytest.approx(spent[1]) and min(spent[1]) > 0  # type: ignore[type-var]


def test_what_exits_lose_is_that_without_graphs() -> None:
    """Beside drafts as well, whose own places nobody compares."""
    more = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    drafts = Sampling(temperature=0, max_tokens=9, ignore_eos=True, speculative=3)
    both = [
        Request([30, 31, 32], more, depth="full", gaps=True, signals=True, id="0"),
        Request([40] * 5, drafts, depth="full", id="1"),
        Request([50] * 5, more, depth="shallow", gaps=True, signals=True, id="2"),
    ]
    record, found = Again(), []
    for engine in (engine_of(record), engine_of()):
        found.append([answer.finished.signals for answer in engine.generate(both) if answer.finished])
    mine, other = (answers[0].gaps for answers in found)  # type: ignore[union-attr]
    assert mine == pytest.approx(other, abs=1e-9) and mine and min(mine) > 0 and record.replayed


def test_drafts_are_recorded_last_and_where_the_memory_lacks_those_of_fewer_rows_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record, room = Again(), 3 * 8 + 8 + 7 + 3

    def short(run: graphs.Run) -> graphs.Run:
        if record.made == room:
            raise RuntimeError("CUDA error: out of memory")
        return record(run)

    engine = engine_of(short, max_batch=4)
    kept = engine.runner.graphs
    assert kept is not None and kept._buckets[DRAFTS] == [1, 2, 4, 8, 12, 16, MAX_DRAFTS + 1]
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        kept.prepare()
    assert kept._buckets[PLAIN] == [1, 2, 4] and kept._buckets[DRAFTS]
    most = max(kept._buckets[DRAFTS])
    (line,) = caplog.records
    assert f"rows with drafts, so steps of more than {most} are launched one by one" in line.getMessage()
    assert all(kept._needs(key) for key in kept._made) and max(key[1] for key in kept._made) == max(4, most)
    want = engine_of(max_batch=4).generate(asked(5, 6))
    assert said(engine.generate(asked(5, 6))) == said(want)


def test_where_memory_lacks_in_the_middle_of_drafts_the_step_goes_on_without_and_others_keep_their_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(Again())
    kept, failed = engine.runner.graphs, list[int]()
    assert kept is not None
    group = kept._group

    def short(j: int, b: int, width: int, kind: graphs.Kind) -> None:
        if kind.drafts and not failed:
            failed.append(b)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        group(j, b, width, kind)

    monkeypatch.setattr(kept, "_group", short)
    how = Sampling(temperature=0, max_tokens=8, ignore_eos=True, speculative=3)
    both = [Request([30 + i] * 5, how, depth="full", id=str(i)) for i in range(2)]
    caplog.set_level(logging.WARNING)
    assert said(engine.generate(both)) == said(engine_of().generate(both))
    assert failed == [2] and engine.runner.graphs is kept and len(caplog.records) == 1
    assert kept._buckets[DRAFTS] == [1] and kept._buckets[PLAIN] == [1, 2, 4, 6]


def test_the_first_exit_is_read_of_those_alone_who_draft_on() -> None:
    engine, found = engine_of(Again()), list[tuple[int, int | None]]()
    kept = engine.runner.graphs
    assert kept is not None
    first = kept.first

    def seen(planned: Any, works: Any, requests: Any, going: int, newest: Tensor | None = None) -> Any:
        given = first(planned, works, requests, going, newest)
        assert given is not None and len(given[0]) == len(works)
        found.append((going, None if given[1] is None else len(given[1])))
        return given

    kept.first = seen  # type: ignore[method-assign]
    how = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
    asked_for = [dataclasses.replace(how, speculative=count) for count in (0, 1, 3)]
    engine.generate([Request([30 + i] * 5, each, depth="full", id=str(i)) for i, each in enumerate(asked_for)])
    assert found[:4] == [(2, 2), (1, 1), (1, 1), (0, None)] and {(0, None)} == {one for one in found if not one[0]}


def test_each_row_stands_by_itself_and_with_drafts_apart_from_the_second_group_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There rows of one request are several, whose keys one launch writes and another sums up."""
    kept, told = Graphs(MODEL.net, GroupCache.zeros(MODEL.config, 20, torch.float64), 4, Again()), list[Any]()
    for j, group in enumerate(MODEL.net.groups):

        def stepped(x: Tensor, step: Any, cache: Any, j: int = j) -> Tensor:
            assert step.starts == step.rows.starts == list(range(len(x) + 1)) and len(step.tables) == len(x)
            told.append((j, len(x), step.rows.apart))
            return x

        monkeypatch.setattr(group, "stepped", stepped)
    with torch.inference_mode():
        kept.prepare()
    plain = [(j, b, False) for b in (1, 2, 4) for j in range(4)]
    # four requests have one row each in the first group
    drafts = [(j, b, j > 0) for b in (1, 2, 4, 8, 12, 16, MAX_DRAFTS + 1) for j in range(4) if j or b <= 4]
    assert told[::2] == told[1::2] == plain + drafts, "recorded, and replayed"


@pytest.mark.parametrize("at", [1, 5, *(pytest.param(at, marks=pytest.mark.drill) for at in (2, 9, 14))])
def test_a_device_that_refuses_in_the_middle_of_drafts_goes_on_without(at: int) -> None:
    """What was drafted by then is verified all the same."""
    record = Again()

    def refuse(run: graphs.Run) -> graphs.Run:
        if record.made == at:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(run)

    engine = engine_of(refuse)
    want = engine_of().generate(asked(4, 6))
    assert said(engine.generate(asked(4, 6))) == said(want)
    assert engine.runner.graphs is None


@pytest.mark.parametrize(("most", "rows"), [(1, 17), (8, 17), (9, 18), (12, 24), (300, 512), (600, 512)])
def test_of_drafts_there_are_rows_for_one_of_each_request_or_for_as_many_as_one_may_ask_for(
    most: int, rows: int
) -> None:
    assert (MAX_DRAFTS, graphs.MOST_ROWS) == (16, 512)
    kept = Graphs(MODEL.net, GroupCache.zeros(MODEL.config, 20, torch.float64), most, Again())
    assert kept._buckets[DRAFTS][-1] == len(kept._logits) == rows and kept._buckets[PLAIN][-1] == min(most, 512)


def test_a_model_without_early_exits_has_no_graphs_of_drafts() -> None:
    config = dataclasses.replace(MODEL.config, early_exits=False)
    kept = Graphs(Net(config), GroupCache.zeros(config, 20, torch.float32), 2, Again())
    assert kept._buckets[PLAIN] == [1, 2] and kept._buckets[DRAFTS] == [] and len(kept._logits) == 2
