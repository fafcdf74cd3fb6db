"""Steps with drafts, and of compared exits, as graphs on a CPU: `tests.recorded` stands in for the device."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from shoal import Engine, Request, Sampling
from shoal.engine import graphs
from shoal.engine.engine import Completion
from shoal.engine.events import Guide
from shoal.engine.graphs import Graphs
from tests.recorded import Again
from tests.unit.engine.lively import lively

MODEL = lively()
# a step of few units, in which requests are preempted; and one in which little more than the graphs' rows is drafted
LIMITS: list[dict[str, int]] = [{}, {"units": 60}, {"max_batch": 2}]


pytestmark = pytest.mark.usefixtures("torch_alone")


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
