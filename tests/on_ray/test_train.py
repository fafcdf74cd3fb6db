"""Training on Ray Train: one local cluster, the `test` preset, two workers, and what may happen to them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import ray

from shoal import Model, cli, presets
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError, ShoalError
from shoal.on_ray.train import train
from shoal.on_ray.train_metrics import PREFIX
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan
from tests.corpus import write_chats, write_corpus

pytestmark = pytest.mark.ray
STEPS = 24  # enough for what happens to a run to happen before its end


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"))


def plan(data: Path, run: Path, **more: object) -> FitPlan:
    return pretrain_plan("test", str(data), str(run), **{"steps": STEPS, "eval_every": 0, "accumulate": 2, **more})


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in log.read(run) if record["kind"] == "step"]


def workers(of: int | None = None, name: str = "RayTrainWorker") -> list[psutil.Process]:
    """The processes that train for process `of`, or for this one; Ray names them after the actor's class, `name`."""
    every = psutil.Process(of).children(recursive=True)
    return [p for p in every if name in p.name() or any(name in part for part in p.cmdline())]


class Once:
    """A `Report` that does `act` once, when step 8 is done."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.at = act, 0

    def __call__(self, record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] >= 8 and not self.at:
            self.at = record["step"]
            self.act()


def kill_a_worker() -> None:
    os.kill(workers()[0].pid, signal.SIGKILL)  # as the kernel does when memory is short


def kill_the_controller(record: log.Record) -> None:
    if record["kind"] == "start":
        (controller,) = workers(name="TrainController")
        controller.kill()


@pytest.fixture(scope="module")
def calm(shared_ray: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers to which nothing happens."""
    run = tmp_path_factory.mktemp("calm") / "run"
    seen: list[log.Record] = []
    train(plan(data, run), workers=2, cpus_per_worker=0.5, on_progress=seen.append)
    kinds = [record["kind"] for record in seen]
    assert kinds[0] == "start" and kinds[-1] == "end" and kinds.count("step") == STEPS and "checkpoint" in kinds
    return run


def same(run: Path, calm: Path) -> bool:
    """Are losses, steps and the model the same to the bit?"""
    models = [(path / "model" / "model.safetensors").read_bytes() for path in (run, calm)]
    steps = [record["step"] for record in log.read(run) if record["kind"] == "step"]
    return losses(run) == losses(calm) and steps == list(range(1, STEPS + 1)) and models[0] == models[1]


@pytest.mark.drill
def test_two_workers_train_as_one_process_does(calm: Path, data: Path, tmp_path: Path) -> None:
    """FSDP2 on gloo, 2 workers x 2 micro-batches against 1 x 4."""
    alone = fit(plan(data, tmp_path / "one", accumulate=4))
    two, one = losses(calm), losses(tmp_path / "one")
    assert two[:6] == pytest.approx(one[:6], abs=1e-6)
    assert two == pytest.approx(one, abs=1e-3), "rounding grows where the choice of blocks tips over"
    end = log.read(calm)[-1]
    assert end["tokens"] == alone.tokens
    assert end["bpb"]["text"] == pytest.approx(alone.bpb["text"], abs=1e-3)


def told_to_ray(run: str) -> dict[str, float]:
    """What the node's agent says of a run: of each metric a number, under the name that the dashboard asks for."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
    mine = [line for line in text.splitlines() if f'run="{run}"' in line]
    return {re.split("[{ ]", line)[0]: float(line.split()[-1]) for line in mine}


def until_told(run: str, enough: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The agent hears of numbers within seconds, and on a busy machine within minutes."""
    end = time.monotonic() + 300
    while not enough(found := told_to_ray(run)) and time.monotonic() < end:
        time.sleep(0.5)
    assert enough(found), found
    return found


@pytest.mark.drill
def test_a_run_tells_ray_its_numbers(calm: Path) -> None:
    """Those that grow stay when it is over."""
    tokens = log.read(calm)[-1]["tokens"]
    others = {f"ray_{PREFIX}starts_total", f"ray_{PREFIX}checkpoints_total"}  # which another process may tell later
    found = until_told(
        str(calm), lambda found: others <= found.keys() and found.get(f"ray_{PREFIX}tokens_total") == tokens
    )
    assert found[f"ray_{PREFIX}starts_total"] == 1 <= found[f"ray_{PREFIX}checkpoints_total"]


@pytest.mark.smoke
@pytest.mark.drill
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_killed_worker_costs_no_step_and_no_bit(calm: Path, data: Path, tmp_path: Path, resume: str) -> None:
    """SIGKILL to one of two: the group restarts from its newest checkpoint, also of a run that was to begin anew."""
    kill = Once(kill_a_worker)
    hit = plan(data, tmp_path / "hit", checkpoint_minutes=0.0, resume=resume)
    train(hit, workers=2, cpus_per_worker=0.5, max_failures=1, on_progress=kill)
    starts = [record["step"] for record in log.read(tmp_path / "hit") if record["kind"] == "start"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= kill.at - 1
    assert same(tmp_path / "hit", calm)


@pytest.mark.drill
def test_a_run_that_cannot_go_on_ends_in_a_line_and_the_same_command_goes_on(
    calm: Path, data: Path, tmp_path: Path
) -> None:
    """A worker is killed more often than it may be, and then the process that starts workers."""
    hit = plan(data, tmp_path / "hit", checkpoint_minutes=0.0)
    with pytest.raises(ShoalError, match=r"^worker [01] died: .*can be resumed; .*out of memory.*--accumulate") as one:
        train(hit, workers=2, cpus_per_worker=0.5, max_failures=0, on_progress=Once(kill_a_worker))
    with pytest.raises(ShoalError, match=r"^a process of the run died: .*can be resumed") as two:
        train(hit, workers=2, cpus_per_worker=0.5, on_progress=kill_the_controller)
    assert not any("\n" in str(caught.value) for caught in (one, two))
    train(hit, workers=2, cpus_per_worker=0.5)
    assert len([record for record in log.read(tmp_path / "hit") if record["kind"] == "start"]) == 3
    assert same(tmp_path / "hit", calm)


@pytest.mark.drill
def test_a_worker_out_of_memory_says_so_in_a_line(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses 844 TB of thin matrices, which the preflight is kept from refusing. A limit on the process instead
    would also take from Ray's own threads, which then stand still."""
    for need in ("disk_needed", "memory_needed", "saved_at_once"):
        monkeypatch.setattr(f"shoal.on_ray.train.{need}", lambda *_: 0)
    Model.from_preset("test").save(tmp_path / "base")
    base, chats = str(tmp_path / "base"), str(write_chats(tmp_path / "chats.jsonl"))
    todo = finetune_plan(base, chats, str(tmp_path / "run"), steps=1, lora_rank=2**42)
    with pytest.raises(ResourceError, match=r"^worker 0 is out of memory: got .* GiB in use.*--accumulate") as caught:
        train(todo, cpus_per_worker=0.5, max_failures=0)
    assert "\n" not in str(caught.value)


@pytest.mark.drill
def test_a_killed_driver_costs_no_step_and_no_bit(calm: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL to `shoal pretrain`: its workers end, and another driver goes on from what they left. Of Ray's own processes
    two agents may stay."""
    run = tmp_path / "hit"
    command = [
        sys.executable,
        "-m",
        "shoal.cli",
        "pretrain",
        "--preset",
        "test",
        "--data",
        str(data),
        "--out",
        str(run),
    ]
    command += ["--steps", str(STEPS), "--workers", "2", "--accumulate", "2", "--set", "eval_every=0"]
    with subprocess.Popen([*command, "--set", "checkpoint_minutes=0"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("saved") and "step-00000008" in line)
            children, training = psutil.Process(process.pid).children(recursive=True), workers(process.pid)
        finally:
            process.kill()
    assert len(training) == 2 and psutil.wait_procs(training, timeout=60)[1] == []
    for child in psutil.wait_procs(children, timeout=1)[1]:
        child.kill()
    assert not (run / "model").exists()
    train(plan(data, run), workers=2, cpus_per_worker=0.5)
    starts = [record["step"] for record in log.read(run) if record["kind"] == "start"]
    assert len(starts) == 2 and 8 <= starts[1] < STEPS
    assert same(run, calm)


def test_plans_that_cannot_run_are_refused(
    shared_ray: None, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    words = ["pretrain", "--preset", "test", "--data", str(data), "--out", str(tmp_path / "gpu"), "--steps", "1"]
    assert cli.main([*words, "--gpu"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "1 worker(s) x 1 GPU = 1 GPUs: got '0 in the cluster'; add nodes that have some" in line


@pytest.mark.drill
def test_a_workers_own_error_arrives_as_it_was(shared_ray: None, data: Path, tmp_path: Path) -> None:
    """In one line and without another try: it would be the same."""
    fit(plan(data, tmp_path / "run", steps=1))
    with pytest.raises(CheckpointError, match=r"of another configuration.*train.seed: 0 -> 5") as caught:
        train(plan(data, tmp_path / "run", steps=2, seed=5), cpus_per_worker=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.drill
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
            assert psutil.wait_procs(children, timeout=60)[1] == []
        finally:
            process.kill()
    assert not (tmp_path / "run" / "model").exists()
