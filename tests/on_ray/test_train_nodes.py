"""Training on nodes, raylets of this machine: one is lost, or one comes, and the run goes on where there is room. In S3
they share no folder: a cache of its own each."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster

from shoal import Model, presets
from shoal.api.serve_args import ServeArgs
from shoal.data import models
from shoal.data.place import Bucket
from shoal.evaluate.rounding import rounded
from shoal.model.files import weights_sha256
from shoal.on_ray import serve
from shoal.on_ray.serve_config import serve_config
from shoal.on_ray.train import train
from shoal.stages.training import Quantize
from shoal.train import log
from shoal.train.bucket import LEASE
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan, quantize_plan
from shoal.train.run import StoppedError, stop_file
from shoal.train.trackers import together
from tests.corpus import write_corpus
from tests.on_ray.nodes import lose_a_node_with, nodes
from tests.on_ray.test_serve import free_port
from tests.s3 import Service, service, upload

pytestmark = [pytest.mark.ray, pytest.mark.drill]
STEPS = 24
NODES = 3  # beside the head, of one CPU each


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture(scope="module")
def cluster(s3: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    caches = tmp_path_factory.mktemp("caches")
    with nodes(NODES, caches, RAY_NODE_TYPE_NAME="pool") as made:  # as an autoscaler starts its nodes
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"))


def plan(data: str | Path, run: str | Path, **more: object) -> FitPlan:
    values: dict[str, Any] = {"steps": STEPS, "eval_every": 0, "accumulate": 2, "checkpoint_minutes": 0.0, **more}
    return pretrain_plan("test", str(data), str(run), **values)


def history(run: Path, kind: str, key: str) -> list:
    return [record[key] for record in log.read(run) if record["kind"] == kind]


class Lose:
    """A `Report` that ends a node where training runs, once, when step 8 is done."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.at = cluster, 0

    def __call__(self, record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] >= 8 and not self.at:
            self.at = record["step"]
            lose_a_node_with(self.cluster, "RayTrainWorker")


def test_a_lost_node_costs_no_step_and_no_bit_of_a_run_in_s3(
    s3: Service, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """Two workers on two of three nodes; one node dies, and two workers go on, on the other two. What they share is the bucket:
    corpus, run and model. The calm run has a folder."""
    train(plan(data, tmp_path / "calm", checkpoint_minutes=1.0), workers=2)
    upload(data, "s3://ocean/data", s3.inside)
    run, lose = "s3://ocean/hit", Lose(cluster)
    records = list[log.Record]()
    result = train(plan("s3://ocean/data", run), workers=2, max_failures=3, on_progress=together(records.append, lose))
    assert result.out == f"{run}/model" and len(cluster.worker_nodes) == NODES - 1
    Bucket(run, s3.inside).get("metrics.jsonl", log.metrics_file(tmp_path))
    assert history(tmp_path, "start", "world") == [2, 2]
    assert history(tmp_path, "start", "step")[1] >= lose.at - 1
    assert [record["kind"] for record in records if record["kind"] in ("start", "end")] == ["start", "start", "end"]
    for key in ("step", "loss"):
        assert history(tmp_path, "step", key) == history(tmp_path / "calm", "step", key)
    calm = tmp_path / "calm" / "model"
    assert (models.here(result.out) / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    assert not [name for name, _ in Bucket(run, s3.inside).sizes() if name.startswith((LEASE, ".ray"))]


def test_a_node_is_lost_while_a_model_in_s3_learns_to_be_rounded(
    s3: Service, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """As the run above, from a model in the bucket to an INT8 one there; the calm run has folders."""
    while (number := len(cluster.worker_nodes)) < NODES:
        cluster.add_node(num_cpus=1, env_vars={"SHOAL_CACHE": str(tmp_path / f"node-{number}")})
    base = train(plan(data, tmp_path / "base", steps=2, checkpoint_minutes=1.0), workers=1).out
    upload(data, "s3://ocean/data", s3.inside)
    models.put(Path(base), "s3://ocean/cod", s3.inside)
    values: dict[str, Any] = {"steps": STEPS, "eval_every": 0, "accumulate": 2}
    calm = train(quantize_plan(base, str(data), str(tmp_path / "calm"), checkpoint_minutes=1.0, **values), workers=2)
    lose, out = Lose(cluster), "s3://ocean/cod-int8"
    hit = quantize_plan("s3://ocean/cod", "s3://ocean/data", out, checkpoint_minutes=0.0, **values)
    result = train(hit, workers=2, max_failures=3, on_progress=lose)
    assert result.out == out and lose.at and len(cluster.worker_nodes) == NODES - 1
    assert weights_sha256(models.here(out)) == weights_sha256(Path(calm.out))
    Bucket(hit.run, s3.inside).get("metrics.jsonl", log.metrics_file(tmp_path))
    assert history(tmp_path, "start", "step")[1] >= lose.at - 1


def test_nodes_serve_a_model_that_was_rounded_in_s3_and_one_is_lost(
    s3: Service, cluster: Cluster, tmp_path: Path
) -> None:
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1)
    Model.from_preset("test", seed=3).save(tmp_path / "model")
    models.put(tmp_path / "model", "s3://ocean/fish")
    int8 = "s3://ocean/fish-int8"
    Quantize(model="s3://ocean/fish", out=int8, train=False).run()
    rounded(Model.load(tmp_path / "model")).save(tmp_path / "int8")
    assert weights_sha256(models.here(int8)) == weights_sha256(tmp_path / "int8")
    model = Model.load(tmp_path / "int8")
    prompt = model.tokenizer.encode("def f1(a):")
    wanted = model.tokenizer.decode(model.generate_naive(prompt, max_tokens=12))
    args = ServeArgs(model=int8, name="fish", min_replicas=2, max_replicas=2)
    url = serve.run(serve_config(args, port=free_port()), blocking=False)
    try:
        for lost in (False, True):
            if lost:
                lose_a_node_with(cluster, "EngineReplica", but="Gateway")
            asked = {"model": "fish", "prompt": prompt, "temperature": 0, "max_tokens": 12, "depth": "full"}
            reply = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
            assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == wanted, reply.text
    finally:
        serve.stop()


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
            started = next_record("start")
            while started["world"] == 1:  # where the machine is busy, two are tried again later
                started = next_record("start")
            next_record("step", started["step"] + 8)
            lose_a_node_with(cluster, "RayTrainWorker")
            assert next_record("start")["world"] == 1
            cluster.add_node(num_cpus=1)
            grown = next_record("start")
            next_record("step", grown["step"] + 6)
        finally:
            stop_file(run).touch()
        with pytest.raises(StoppedError):
            running.result(timeout=60)
    assert history(run, "start", "world")[-3:] == [2, 1, 2]
    assert history(run, "start", "micro_batches")[-3:] == [2, 4, 2], "as many in all: one needs no more memory"
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
