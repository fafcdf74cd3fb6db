"""The training jobs: their options reach the plan, and a router is fitted on what the plan holds out."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.train.plan import FitPlan

JOBS = Path(__file__).parents[3] / "jobs"
SHARED = "--workers 1:2 --cpus-per-worker 0.5 --accumulate 3 --epochs 1.5 --seed 7 --learning-rate 0.25 --mirror copies"
SHARED += " --track tensorboard --set eval_every=9 --set optimizer=muon"


class Trained:
    """What stands in for `train` and `routing.finish`, and keeps what they are given."""

    def __init__(self) -> None:
        self.plan: FitPlan | None = None
        self.how: dict[str, Any] = {}
        self.fitted: tuple[Path, str] | None = None

    def train(self, plan: FitPlan, **how: Any) -> None:
        self.plan, self.how = plan, how

    def finish(self, directory: Path, heldout: str, say: object) -> None:
        self.fitted = directory, heldout


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trained:
    stand_in = Trained()
    monkeypatch.setattr("shoal.on_ray.job.train", stand_in.train)
    monkeypatch.setattr("shoal.train.routing.finish", stand_in.finish)
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
    job: str, words: str, where: str, heldout: str, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(job, f"{words} {SHARED}", monkeypatch) == 0
    plan = trained.plan
    assert plan is not None and trained.fitted == (Path(where), heldout)
    assert (plan.epochs, plan.mirror, plan.eval_every) == (1.5, "copies", 9)
    train = plan.train
    assert (train.accumulate, train.seed, train.learning_rate, train.optimizer) == (3, 7, 0.25, "muon")
    assert (trained.how["workers"], trained.how["cpus_per_worker"]) == ((1, 2), 0.5)
    assert trained.how["gpus"] is (True if job == "quantize" else None)
    assert plan.quantize == (job == "quantize") and plan.replay == ("data" if "--replay" in words else "")


def test_what_is_wrong_is_one_line(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--preset test --data data --out run --steps 1"
    for more, says in (
        ("--seed 1 --set seed=2", "--set seed and --seed"),
        ("--track pencil", "--track"),
        ("--workers 0", "N"),
    ):
        assert run("pretrain", f"{words} {more}", monkeypatch) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and says in line
    assert trained.plan is None
