"""The jobs that train: their options reach the plan, a router is fitted on what is held out, and the last line is JSON."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.errors import DataError
from shoal.train.loop import FitResult
from shoal.train.plan import FitPlan

JOBS = Path(__file__).parents[3] / "jobs"
SHARED = "--workers 1:2 --cpus-per-worker 0.5 --accumulate 3 --epochs 1.5 --seed 7 --learning-rate 0.25 --mirror copies"
SHARED += " --rates-of other"
SHARED += " --track tensorboard --set eval_every=9 --set optimizer=muon"


class Trained:
    """What stands in for `train` and `routing.finish`, and keeps what they are given."""

    def __init__(self) -> None:
        self.plan: FitPlan | None = None
        self.how: dict[str, Any] = {}
        self.fitted: tuple[Path, str] | None = None
        self.fails: BaseException | None = None

    def train(self, plan: FitPlan, **how: Any) -> FitResult:
        self.plan, self.how = plan, how
        if self.fails is not None:
            raise self.fails
        return FitResult(str(plan.model_dir), 3, 96, 1.5, {"text": {"full": 2.5}})

    def finish(self, directory: Path, heldout: str, say: object, *, run: object) -> None:
        self.fitted = directory, heldout


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trained:
    stand_in = Trained()
    monkeypatch.setattr("shoal.on_ray.train.train", stand_in.train)
    monkeypatch.setattr("shoal.evaluate.routing.finish", stand_in.finish)
    monkeypatch.chdir(tmp_path)
    Model.from_preset("test").save("base")
    Path("data").mkdir()
    return stand_in


def run(job: str, words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", [job, *words.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(
    ("job", "words", "where", "heldout"),
    [
        ("pretrain", "--preset test --data data --out run", "run/model", "data"),
        ("finetune", "--model base --data c.jsonl --out run --heldout h.jsonl --replay data", "run/model", "h.jsonl"),
        ("finetune", "--model base --data c.jsonl --out run", "run/model", ""),
        ("quantize", "--model base --data data --out int8 --gpu", "int8", "data"),
    ],
)
def test_options_reach_the_plan(
    job: str,
    words: str,
    where: str,
    heldout: str,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(job, f"{words} {SHARED} --batch-tokens 4608", monkeypatch) == 0
    plan = trained.plan
    assert plan is not None and trained.fitted == (Path(where), heldout)
    assert (plan.epochs, plan.mirror, plan.eval_every, plan.rates_of) == (1.5, "copies", 9, "other")
    train = plan.train
    assert (train.accumulate, train.seed, train.learning_rate, train.optimizer) == (3, 7, 0.25, "muon")
    assert train.batch_tokens == 4608
    assert (trained.how["workers"], trained.how["cpus_per_worker"]) == ((1, 2), 0.5)
    assert trained.how["gpus"] is (True if job == "quantize" else None)
    assert plan.quantize == (job == "quantize") and plan.replay == ("data" if "--replay" in words else "")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"out": where, "steps": 3, "tokens": 96, "bpb": {"text": {"full": 2.5}}, "router": None}


def test_data_in_s3_keep_their_addresses(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path would lose one of the slashes."""
    words = "--model base --data c.jsonl --out run --replay s3://bucket/shards"
    assert run("finetune", words, monkeypatch) == 0
    assert trained.plan is not None and trained.plan.replay == "s3://bucket/shards"
    assert run("quantize", "--model base --data s3://bucket/shards --out int8", monkeypatch) == 0
    assert trained.plan.data == "s3://bucket/shards"


def test_what_a_command_does_without_an_option_its_job_does(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal import cli

    words = "--preset test --data data --out run --steps 1"
    assert run("pretrain", words, monkeypatch) == 0
    as_job = trained.plan, trained.how | {"on_progress": None}
    assert cli.main(["pretrain", *words.split()]) == 0
    assert as_job == (trained.plan, trained.how | {"on_progress": None})
    assert trained.how["cpus_per_worker"] == 1


def test_what_is_wrong_is_one_line(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--preset test --data data --out run --steps 1"
    for more, says in (
        ("--seed 1 --set seed=2", "--set seed and --seed"),
        ("--track pencil", "--track"),
        ("--workers 0", "N"),
        ("--cpus-per-worker 0", "--cpus-per-worker"),
        ("--cpus-per-worker nan", "--cpus-per-worker"),
    ):
        assert run("pretrain", f"{words} {more}", monkeypatch) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("shoal: ") and says in line
    assert trained.plan is None


@pytest.mark.parametrize(("error", "code"), [(DataError("no rows", do="add some"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_does_not_end_well_is_one_line_and_a_code(
    error: BaseException,
    code: int,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained.fails = error
    assert run("pretrain", "--preset test --data data --out run --steps 1", monkeypatch) == code
    told = capsys.readouterr()
    assert len(told.err.strip().splitlines()) == 1 and told.out == ""
