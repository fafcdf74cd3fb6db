"""A second look is fitted, priced as the engine runs it, and used only where it pays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.engine.plan import Outcome, Plan
from shoal.errors import CheckpointError
from shoal.evaluate.prompts import Heldout, Prompts, Rest, measured
from shoal.evaluate.second_look import fit, losses, paid, prices, routed, rows
from shoal.inputs.chat import Encoded
from shoal.model.router import Router, fit_router
from tests.unit.engine.test_second_look import EXITS, MODEL, model, to

CONFIG = MODEL.config


def prompts(count: int, *, tells: bool, seed: int = 0, after: int = 6, answers: int = 60) -> Prompts:
    """Half of the answers are hard, which no prompt tells; what comes first of an answer does where it `tells`."""
    draws = torch.Generator().manual_seed(seed)
    inputs = 2 * CONFIG.width + 3
    x, later = torch.randn(2, count, inputs, generator=draws)
    hard = torch.rand(count, generator=draws) < 0.5
    later[:, :40] += 2.0 * tells * (2.0 * hard[:, None] - 1)
    noise = 0.01 * torch.randn(2, count, len(EXITS) - 1, generator=draws)
    rest = hard[:, None] * torch.tensor([0.6, 0.3]) + noise[0]
    head, tokens = 0.05 + noise[1], torch.full((count,), answers)
    whole = (after * head + (answers - after) * rest) / answers
    of = Rest(after, later, head, rest)
    return Prompts(x, whole, torch.full((count,), 14), tokens, ("series",) * count, torch.arange(count), of)


@pytest.fixture(scope="module")
def telling() -> tuple[Router, Router]:
    some = prompts(800, tells=True)
    router = fit_router(CONFIG, some.features, some.gaps, some.groups)
    later, found = fit(CONFIG, router, some)
    assert later is not None and found["paid_high"] < 0
    router.later = later
    return router, later


def test_it_is_used_where_answers_tell_and_keeps_the_promise_on_others(telling: tuple[Router, Router]) -> None:
    router, later = telling
    new = prompts(600, tells=True, seed=1)
    assert paid(CONFIG, router, later, new)["high"] < 0
    for tolerance in (0.05, 0.1, 0.2):
        share, lost = routed(CONFIG, router, new, tolerance)
        alone, _ = routed(CONFIG, router, dataclasses.replace(new, rest=None), tolerance)
        assert lost.mean() < tolerance + 0.02  # a mean over calibrations, and this is one
        assert share.mean() < alone.mean() - 0.1, "who may look again may begin shallow"
    assert later.covers(0.05) and later.covers(0.06) and not later.covers(0.0) and not later.covers(1.0)
    assert torch.equal(
        routed(CONFIG, router, new, 1.0)[0], routed(CONFIG, router, dataclasses.replace(new, rest=None), 1.0)[0]
    )
    share, lost = routed(CONFIG, router, new, 0.0)
    assert (share == 1).all() and (lost == 0).all()
    assert torch.equal(
        routed(CONFIG, router, new, None, 0.5)[0], routed(CONFIG, router, new.some(new.groups), None, 0.5)[0]
    )


@pytest.mark.drill
def test_it_is_not_used_where_they_do_not(telling: tuple[Router, Router]) -> None:
    some = prompts(800, tells=False)
    router = fit_router(CONFIG, some.features, some.gaps, some.groups)
    assert fit(CONFIG, router, some)[0] is None
    short = prompts(40, tells=True, answers=6)  # no answer is longer than where it would look
    assert fit(CONFIG, fit_router(CONFIG, short.features, short.gaps, short.groups), short) == (None, {})


@pytest.mark.drill
def test_a_look_that_could_not_pay_is_paid_for(telling: tuple[Router, Router]) -> None:
    """Answers that are over soon after it, behind prompts that are run again."""
    router, _ = telling
    late = prompts(800, tells=True, answers=8)
    late = dataclasses.replace(late, lengths=torch.full_like(late.lengths, 500))
    later, _ = fit(CONFIG, router, late)
    assert later is None
    early = dataclasses.replace(late, lengths=torch.full_like(late.lengths, 14))  # the same answers behind short ones
    long = dataclasses.replace(early, answers=torch.full_like(early.answers, 60))
    assert fit(CONFIG, router, long)[0] is not None


@pytest.mark.parametrize("length", [3, CONFIG.page, 2 * CONFIG.page + 5])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)])
def test_rows_are_those_that_the_engine_runs(length: int, first: int, second: int) -> None:
    after, answers, ran = 5, 9, 0
    engine = Engine(model(to(EXITS[first]), to(EXITS[second]), after), units=400, max_batch_tokens=400)
    ends, commit = (0, *CONFIG.ends), engine.scheduler.commit

    def counted(plan: Plan, outcome: Outcome) -> object:
        nonlocal ran
        ran += sum(work.count * (ends[work.last] - ends[work.first]) for work in plan.works)
        return commit(plan, outcome)

    engine.scheduler.commit = counted  # type: ignore[method-assign, assignment]
    ids = [20 + (7 * i) % 200 for i in range(length)]
    engine.generate([Request(ids, Sampling(max_tokens=answers, ignore_eos=True))])
    zero = torch.zeros(1, 2)
    rest = Rest(after, zero, zero, zero)
    asked = Prompts(zero, zero, torch.tensor([length]), torch.tensor([answers]), ("a",), torch.tensor([0]), rest)
    assert float(rows(asked, CONFIG.page, torch.tensor(EXITS).double())[0, first, second]) == ran


def test_one_look_costs_what_it_did_and_two_never_less() -> None:
    once, twice = prices(CONFIG, prompts(3, tells=True), (True, True))
    assert torch.allclose(once[:, -1], twice[:, -1, -1])  # full depth from the first is not looked at again
    for place in range(len(EXITS) - 1):
        assert (twice[:, place, place] > once[:, place]).all()
        assert (twice[:, place, place:].diff(dim=1) > 0).all()
    assert (once.diff(dim=1) > 0).all() and float(once[0, -1]) == pytest.approx(1, abs=0.3)


def test_what_is_measured_of_the_rest_is_what_a_longer_prompt_would_be() -> None:
    ids = [[20 + (7 * i + k) % 200 for i in range(40 + k)] for k in range(3)]
    answers = [[place >= 30 for place in range(len(row))] for row in ids]
    held = [Heldout(Encoded(row, [], answer), k) for k, (row, answer) in enumerate(zip(ids, answers, strict=True))]
    found = measured(MODEL.net, {"a": held}, 4)
    longer = [Heldout(Encoded(row, [], [place >= 34 for place in range(len(row))]), 0) for row in ids]
    wanted = measured(MODEL.net, {"a": longer})
    assert found.rest is not None and found.answers.tolist() == [10, 11, 12]
    torch.testing.assert_close(found.rest.features, wanted.features)
    torch.testing.assert_close(found.rest.gaps, wanted.gaps)
    whole = losses(found)[:, range(2), range(2)]  # the same exit before and behind
    torch.testing.assert_close(whole, found.gaps)
    none = measured(MODEL.net, {"a": held}, 12)
    assert none.rest is not None and (none.rest.gaps == 0).all() and (none.rest.features == 0).all()
    torch.testing.assert_close(none.rest.head, none.gaps)


def test_it_travels_with_the_model(telling: tuple[Router, Router], tmp_path: Path) -> None:
    router, later = telling
    model = Model(CONFIG, Model.from_preset("test").net, MODEL.tokenizer, router=router)
    model.save(tmp_path / "model")
    read = Model.load(tmp_path / "model").router
    assert read is not None and read.later is not None and read.later.calibration == later.calibration
    x = prompts(5, tells=True).features
    assert torch.equal(read.later(x)[1], later(x)[1]) and torch.equal(read(x)[1], router(x)[1])
    tables = json.loads((tmp_path / "model" / "router.json").read_text())
    assert tables["later"]["after"] == 6 and "later" not in tables["later"]
    router.later = None
    try:
        model.save(tmp_path / "model")
    finally:
        router.later = later
    one = Model.load(tmp_path / "model").router
    assert (
        one is not None
        and one.later is None
        and "later" not in json.loads((tmp_path / "model" / "router.json").read_text())
    )


def test_tables_without_weights_are_refused(telling: tuple[Router, Router], tmp_path: Path) -> None:
    alone = Router(CONFIG)
    Model(CONFIG, Model.from_preset("test").net, MODEL.tokenizer, router=alone).save(tmp_path / "model")
    path = tmp_path / "model" / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": {"after": 3}}))
    with pytest.raises(CheckpointError, match=r"later|router\.json"):
        Model.load(tmp_path / "model")


@pytest.mark.parametrize(("tolerance", "looks"), [(None, 0), (0.3, 1)])
def test_a_budget_is_of_one_look(tolerance: float | None, looks: int) -> None:
    engine = Engine(model(to(EXITS[0]), to(EXITS[-1]), 5), units=400, compute_budget=0.5)
    request = Request("abc", Sampling(max_tokens=9, ignore_eos=True, speculative=0), quality_tolerance=tolerance)
    (answer,) = engine.generate([request])
    assert engine.stats()["second_looks_total"] == looks and answer.depth == (EXITS[-1] if looks else EXITS[0])
