"""Training on Ray Train: one local cluster for the file, the `test` preset, two workers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal import Model, presets
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError
from shoal.on_ray.resources import local_ray
from shoal.on_ray.train import train
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan
from tests.corpus import write_chats, write_corpus

pytestmark = pytest.mark.ray
STEPS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"))


def plan(data: Path, run: Path, **more: object) -> FitPlan:
    return pretrain_plan("test", str(data), str(run), **{"steps": STEPS, "eval_every": 0, "accumulate": 2, **more})


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in log.read(run) if record["kind"] == "step"]


def kill_a_worker() -> None:
    """SIGKILL to one of the processes that train; Ray names them after the actor's class."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in process.name() or any("RayTrainWorker" in part for part in process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no training worker is running")


def test_two_workers_train_as_one_process_does(cluster: None, data: Path, tmp_path: Path) -> None:
    """FSDP2 on gloo, 2 workers x 2 micro-batches against 1 x 4, with progress as it happens."""
    seen: list[log.Record] = []
    result = train(plan(data, tmp_path / "two"), workers=2, cpus_per_worker=0.5, on_progress=seen.append)
    alone = fit(plan(data, tmp_path / "one", accumulate=4))

    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    assert result.tokens == alone.tokens
    assert result.bpb["text"] == pytest.approx(alone.bpb["text"], abs=1e-5)
    two, one = Model.load(result.out).net.state_dict(), Model.load(alone.out).net.state_dict()
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < 1e-4
    kinds = [record["kind"] for record in seen]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == STEPS and "checkpoint" in kinds


@pytest.mark.timeout(400)  # two starts of a worker group, on what may be a busy machine
def test_other_workers_go_on_and_a_killed_one_costs_no_step(cluster: None, data: Path, tmp_path: Path) -> None:
    """One process begins and is interrupted, two workers go on, one of them is killed, the group restarts from its newest
    checkpoint: the history is that of a run which nothing happened to."""

    class Interrupted(Exception):
        pass

    def interrupt(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 4:
            raise Interrupted

    killed_at: list[int] = []

    def kill(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] >= 8 and not killed_at:
            killed_at.append(record["step"])
            kill_a_worker()

    run, more = tmp_path / "hit", {"steps": 40, "checkpoint_minutes": 0.0}
    with pytest.raises(Interrupted):
        fit(plan(data, run, accumulate=4, **more), interrupt)
    result = train(plan(data, run, **more), workers=2, cpus_per_worker=0.5, max_failures=1, on_progress=kill)
    calm = fit(plan(data, tmp_path / "calm", steps=40, accumulate=4))

    assert killed_at and (result.steps, result.tokens) == (calm.steps, calm.tokens)
    starts = [record["step"] for record in log.read(run) if record["kind"] == "start"]
    assert len(starts) == 3 and starts[0] == 0 and starts[1] == 3 and starts[2] >= killed_at[0] - 1
    assert [record["step"] for record in log.read(run) if record["kind"] == "step"] == list(range(1, 41))
    assert losses(run) == pytest.approx(losses(tmp_path / "calm"), abs=1e-3)


def test_plans_that_cannot_run_are_refused(cluster: None, data: Path, tmp_path: Path) -> None:
    """Before any worker is started, with the numbers."""
    with pytest.raises(ResourceError, match=r"2 worker\(s\) x 64 CPU = 128 CPUs"):
        train(plan(data, tmp_path / "cpus"), workers=2, cpus_per_worker=64)
    with pytest.raises(ConfigError, match=r"do not divide over 3 worker\(s\)"):
        train(plan(data, tmp_path / "batch"), workers=3, cpus_per_worker=0.1)
    with pytest.raises(DataError, match="too short"):
        train(plan(data, tmp_path / "short", batch_tokens=96 * 4000), workers=2, cpus_per_worker=0.5)
    few = write_chats(tmp_path / "few.jsonl", rows=3)
    with pytest.raises(DataError, match="too short"):
        train(plan(few, tmp_path / "few"), workers=2, cpus_per_worker=0.5)


def test_a_workers_own_error_arrives_as_it_was(cluster: None, data: Path, tmp_path: Path) -> None:
    """In one line and without another try: it would be the same."""
    fit(plan(data, tmp_path / "run", steps=1))
    with pytest.raises(CheckpointError, match=r"of another configuration.*train.seed: 0 -> 5") as caught:
        train(plan(data, tmp_path / "run", steps=2, seed=5), cpus_per_worker=0.5)
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_a_run_as_interrupted_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    """Ray Train would end it with exit code 0, as if the model were there."""
    command = [sys.executable, "-m", "shoal.cli", "pretrain", "--preset", "test", "--data", str(data)]
    command += ["--out", str(tmp_path / "run"), "--minutes", "5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("step"))
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            assert process.stderr.read().splitlines()[-1].startswith("shoal: interrupted")
            assert process.wait(60) == 130
            assert psutil.wait_procs(children, timeout=10)[1] == []
        finally:
            process.kill()
    assert not (tmp_path / "run" / "model").exists()
