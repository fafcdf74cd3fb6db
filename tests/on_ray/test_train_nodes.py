"""Training on nodes, raylets of this machine: one is lost, or one comes, and the run goes on where there is room."""

from __future__ import annotations

import queue
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from shoal import presets
from shoal.on_ray.resources import _loopback, worker_env
from shoal.on_ray.train import train
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.run import StoppedError, stop_file
from tests.corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.drill]
STEPS = 24
NODES = 3  # beside the head, of one CPU each


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray-")
    with _loopback(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where it also writes the address that other programs would take for theirs
        patch.setenv("RAY_NODE_TYPE_NAME", "pool")  # as an autoscaler starts its nodes
        patch.setenv("RAY_health_check_failure_threshold", "2")
        patch.setenv("RAY_health_check_period_ms", "500")
        memory = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
        for _ in range(NODES):
            made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": worker_env()})
        try:
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"))


def plan(data: Path, run: Path, **more: object) -> FitPlan:
    values: dict[str, Any] = {"steps": STEPS, "eval_every": 0, "accumulate": 2, "checkpoint_minutes": 0.0, **more}
    return pretrain_plan("test", str(data), str(run), **values)


def history(run: Path, kind: str, key: str) -> list:
    return [record[key] for record in log.read(run) if record["kind"] == kind]


def lose_a_node_that_trains(cluster: Cluster) -> None:
    """Kill its raylet; its workers die with it."""
    for node in list(cluster.worker_nodes):
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        if any("RayTrainWorker" in " ".join([p.name(), *p.cmdline()]) for p in raylet.children()):
            cluster.remove_node(node, allow_graceful=False)
            return
    raise AssertionError("no node trains")


class Lose:
    """A `Report` that ends a node where training runs, once, when step 8 is done."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.at = cluster, 0

    def __call__(self, record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] >= 8 and not self.at:
            self.at = record["step"]
            lose_a_node_that_trains(self.cluster)


def test_a_lost_node_costs_no_step_and_no_bit(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """Two workers on two of three nodes; one node dies, and two workers go on, on the other two."""
    train(plan(data, tmp_path / "calm", checkpoint_minutes=1.0), workers=2)
    lose = Lose(cluster)
    train(plan(data, tmp_path / "hit"), workers=2, max_failures=3, on_progress=lose)
    assert history(tmp_path / "hit", "start", "world") == [2, 2]
    assert history(tmp_path / "hit", "start", "step")[1] >= lose.at - 1
    assert history(tmp_path / "hit", "step", "loss") == history(tmp_path / "calm", "step", "loss")
    models = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("hit", "calm")]
    assert models[0] == models[1] and len(cluster.worker_nodes) == NODES - 1


def test_an_elastic_run_goes_on_with_the_worker_that_is_left_and_takes_another_when_it_comes(
    cluster: Cluster, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 to 2 workers, and two nodes of which one dies: the same updates, of one worker's four micro-batches. When there is a
    second node again, two workers go on; six updates later the run is stopped, and one process ends it."""
    # The environment's word counts. Ray looks every 20 s at what nodes there are, until then it tries with two, and three times
    # in all: in less than 7 s each it would give up.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    monkeypatch.setattr("shoal.on_ray.train.ROOM_SECONDS", 1.0)
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    while len(cluster.worker_nodes) > 2:
        cluster.remove_node(next(iter(cluster.worker_nodes)))
    run, calm, records = tmp_path / "hit", tmp_path / "calm", queue.SimpleQueue[log.Record]()
    # whatever the number of steps comes to, each has the same rates
    constant = {"warmup": 0.0, "decay": 0.0, "exit_warmup": 0.0, "learning_rate": 3e-4}

    def next_record(kind: str, step: int = 0) -> log.Record:
        """The next of its kind that follows `step` or a later one."""
        end = time.monotonic() + 120
        while True:
            record = records.get(timeout=max(0.0, end - time.monotonic()))
            if record["kind"] == kind and record["step"] >= step:
                return record

    with ThreadPoolExecutor(1) as pool:  # nodes can be started by the main thread alone
        todo = plan(data, run, steps=10_000, **constant)
        running = pool.submit(train, todo, workers=(1, 2), max_failures=3, on_progress=records.put)
        try:
            next_record("step", 8)
            lose_a_node_that_trains(cluster)
            assert next_record("start")["world"] == 1
            cluster.add_node(num_cpus=1)
            grown = next_record("start")
            next_record("step", grown["step"] + 6)
        finally:
            stop_file(run).touch()
        with pytest.raises(StoppedError):
            running.result(timeout=60)
    assert history(run, "start", "world") == [2, 1, 2]
    assert history(run, "start", "micro_batches") == [2, 4, 2], "as many in all: one needs no more memory"
    steps = history(run, "step", "step")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= grown["step"] + 6
    end = {"steps": len(steps), "accumulate": 4, "checkpoint_minutes": 1.0, **constant}
    tokens = [fit(plan(data, path, **end)).tokens for path in (run, calm)]
    assert tokens[0] == tokens[1] and (run / "model" / "model.safetensors").exists()
    for key in ("targets", "tokens"):
        assert history(run, "step", key) == history(calm, "step", key)
    hit, want = (history(path, "step", "loss") for path in (run, calm))
    assert hit == pytest.approx(want, abs=1e-5)


def test_a_run_waits_for_a_cluster_that_has_yet_to_grow(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """The autoscaler's part is played by the test: it starts a node when the run has asked for one."""
    while cluster.worker_nodes:
        cluster.remove_node(next(iter(cluster.worker_nodes)))
    end = time.monotonic() + 30
    while "CPU" in ray.cluster_resources():
        assert time.monotonic() < end
        time.sleep(0.1)
    records = queue.SimpleQueue[log.Record]()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, plan(data, tmp_path / "run", steps=2), on_progress=records.put)
        try:
            warning = records.get(timeout=60)
        finally:
            cluster.add_node(num_cpus=1)
        assert running.result(timeout=120).steps == 2
    assert "1 worker(s) x 1 CPU = 1 CPUs: got '0 in the cluster'" in warning["text"]
    assert warning["text"].endswith("waiting for the cluster's autoscaler")
