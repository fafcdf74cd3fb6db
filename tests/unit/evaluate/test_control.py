"""The exit tax: the control is the main run without early exits, and nothing else differs."""

import dataclasses
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.evaluate import report
from shoal.evaluate.control import control_plan, exit_tax, too_high
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.refusal import check

DEPTHS = ("shallow", "middle", "full")


def main_plan(shards: Path, run: Path) -> FitPlan:
    more = {"steps": 24, "eval_every": 4, "eval_rows": 8, "exit_warmup": 0.0, "accumulate": 1}
    return pretrain_plan("test", str(shards), str(run), **more)


@pytest.fixture(scope="module")
def main(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> FitPlan:
    plan = main_plan(shards, tmp_path_factory.mktemp("main") / "run")
    fit(plan)
    return plan


def records(run: str | Path, kind: str) -> list[log.Record]:
    return [record for record in log.read(run) if record["kind"] == kind]


@pytest.mark.drill
def test_19_deeper_exits_predict_held_out_rows_better(shards: Path, tmp_path: Path) -> None:
    fit(pretrain_plan("test", str(shards), str(tmp_path), steps=100, eval_every=100, eval_rows=64, accumulate=1))
    (measured,) = records(tmp_path, "eval")
    overall = [sum(measured["bpb"][kind][depth] for kind in ("text", "code", "image")) for depth in DEPTHS]
    assert overall[0] > overall[1] > overall[2], measured["bpb"]


@pytest.mark.drill
def test_19_the_tax_is_measured_at_the_same_step_on_the_same_rows(main: FitPlan, tmp_path: Path) -> None:
    plan = control_plan(main, tmp_path / "control", 1 / 3)
    assert plan.steps == 8 and plan.train.exit_weights == (0.0, 0.0, 1.0) and plan.model == main.model
    check(plan, workers=1)
    fit(plan)
    rates = [[record["rate"] for record in records(run, "step")] for run in (main.run, plan.run)]
    assert rates[1] == rates[0][:8], "the main run's, not a schedule of 8 steps"
    assert [r["targets"] for r in records(plan.run, "step")] == [r["targets"] for r in records(main.run, "step")][:8]
    tax = exit_tax(main.run, plan.run)
    assert (tax["step"], tax["steps"]) == (8, 24)
    assert {row["modality"] for row in tax["rows"]} == {"text", "code", "image"}
    measured = next(record for record in records(main.run, "eval") if record["step"] == 8)
    (alone,) = records(plan.run, "eval")
    for row in tax["rows"]:
        taxed, free = measured["bpb"][row["modality"]]["full"], alone["bpb"][row["modality"]]["full"]
        assert (row["with"], row["without"]) == (taxed, free) and taxed != free
        assert row["tax"] == pytest.approx((taxed - free) / free)
    assert set(alone["bpb"]["text"]) == {"full"}, "the control has no early exits"


@pytest.mark.drill
def test_a_control_with_the_same_exits_is_the_main_run_to_the_bit(main: FitPlan, tmp_path: Path) -> None:
    """So start, rows and rates are the same, and what the tax shows comes from the exits alone."""
    plan = control_plan(main, tmp_path / "same", 1 / 3)
    fit(dataclasses.replace(plan, train=main.train))
    losses = [[record["loss"] for record in records(run, "step")] for run in (main.run, plan.run)]
    assert losses[1] == losses[0][:8] and len(losses[1]) == 8
    assert [row["tax"] for row in exit_tax(main.run, plan.run)["rows"]] == [0.0, 0.0, 0.0]


def test_the_report_shows_the_tax_and_says_when_it_is_too_high(tmp_path: Path) -> None:
    rows = [
        {"modality": "text", "with": 2.6, "without": 2.5, "tax": 0.04},
        {"modality": "code", "with": 2.0, "without": 2.01, "tax": -0.005},
    ]
    tax = {"step": 100, "steps": 300, "rows": rows}
    (sentence,) = too_high(tax)
    assert "4.0% bits a byte of text at step 100" in sentence
    report.render({"title": "t", "exit_tax": tax}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in ("update 100 of 300", "2.600", "2.500", "+4.0 %", "-0.5 %"):
        assert shown in page


@pytest.mark.drill
def test_a_control_that_cannot_follow_is_refused(main: FitPlan, tmp_path: Path) -> None:
    plan = control_plan(main, tmp_path / "control", 1.0)
    assert plan.steps == 24
    for broken, message in (
        (dataclasses.replace(plan, steps=25), "learning rates: got '24 steps'; allowed: 25 or more"),
        (dataclasses.replace(plan, rates_of=str(tmp_path / "nowhere")), "learning rates: got '0 steps'"),
    ):
        with pytest.raises(DataError, match=message):
            check(broken, workers=1)
    log.metrics_file(tmp_path / "empty").parent.mkdir()
    log.metrics_file(tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="never measured"):
        control_plan(dataclasses.replace(main, run=str(tmp_path / "empty")), tmp_path / "control", 0.5)
    with pytest.raises(DataError, match="not measured at the same step"):
        exit_tax(main.run, tmp_path / "empty")
