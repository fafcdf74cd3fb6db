"""Who asks for nodes that are not there, before a real autoscaler: a training run, and a service whose load comes and goes. All
that nodes share is a bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import presets
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.data import models
from shoal.data.place import Bucket
from shoal.on_ray import serve
from shoal.on_ray.serve_config import GATEWAY, check_serve_config, serve_config
from shoal.on_ray.train import train
from shoal.train import log
from shoal.train.plan import pretrain_plan
from tests.corpus import write_corpus
from tests.on_ray.autoscaled import MOST, Autoscaled, autoscaled
from tests.on_ray.load import Load, ask
from tests.on_ray.test_serve import free_port, replicas, until
from tests.s3 import Service, service, upload
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]
STEPS, SECONDS = 12, 240.0


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cluster(s3: Service, caches: Path) -> Iterator[Autoscaled]:
    with autoscaled(caches) as made:
        yield made


@pytest.fixture
def url(s3: Service, cluster: Autoscaled, tmp_path: Path) -> Iterator[str]:
    """A service of one replica to as many as there may be nodes, one for each three requests."""
    lively().save(tmp_path / "model")
    models.put(tmp_path / "model", "s3://ocean/fish", s3.inside)
    args = ServeArgs(model="s3://ocean/fish", name="fish", min_replicas=1, max_replicas=MOST, max_batch=4)
    values = serve_config(args, port=free_port()).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["import_path"] = "tests.on_ray.breakable:app"  # its steps take their time
    scaling: dict[str, Any] = {
        "min_replicas": 1, "max_replicas": MOST, "target_ongoing_requests": 3, "metrics_interval_s": 1,
        "look_back_period_s": 3, "upscale_delay_s": 1, "downscale_delay_s": 5,  # in place of two minutes
        "policy": {"policy_function": "shoal.on_ray.scaling:by_load"},
    }  # fmt: skip
    values["applications"][0]["deployments"] = [{"name": ENGINE, "autoscaling_config": scaling}]
    try:
        yield serve.run(check_serve_config(values, "autoscaled"), blocking=False, seconds=SECONDS)
    finally:
        serve.stop()


def test_a_run_starts_the_nodes_that_it_asks_for_ends_on_them_though_one_is_lost_and_they_go(
    s3: Service, cluster: Autoscaled, caches: Path, tmp_path: Path
) -> None:
    """Two workers where no node is. One of the nodes dies in the middle, and the autoscaler finds another."""
    upload(write_corpus(tmp_path / "data", presets.get("test")), "s3://ocean/data", s3.inside)
    run = "s3://ocean/run"
    records, seen, lost = list[log.Record](), set[str](), list[int]()

    def told(record: log.Record) -> None:
        records.append(record)
        seen.update(cluster.nodes())
        if record["kind"] == "step" and record["step"] >= STEPS // 2 and not lost:
            lost.append(len(seen))
            cluster.lose_one_with("RayTrainWorker")

    assert not cluster.nodes()
    more: dict[str, Any] = {"steps": STEPS, "eval_every": 0, "accumulate": 2, "checkpoint_minutes": 0.0}
    plan = pretrain_plan("test", "s3://ocean/data", run, **more)
    result = train(plan, workers=2, max_failures=3, on_progress=told)
    assert result.steps == STEPS
    assert "2 worker(s) x 1 CPU = 2 CPUs: got '0 in the cluster'" in records[0]["text"]
    Bucket(run, s3.inside).get("metrics.jsonl", log.metrics_file(tmp_path))
    steps = [record["step"] for record in log.read(tmp_path) if record["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert [record["world"] for record in log.read(tmp_path) if record["kind"] == "start"] == [2, 2]
    assert lost == [2] and len(seen) > 2
    used = [cache for cache in caches.glob("node-*") if any(cache.rglob("*.*"))]
    assert len(used) > 2, "each node that had a worker read by way of a cache of its own"
    until(lambda: not cluster.nodes(), SECONDS)


def test_a_service_grows_to_three_nodes_and_shrinks_to_one_and_no_answer_fails_though_a_node_is_lost(
    cluster: Autoscaled, url: str
) -> None:
    """Each answer is whole, and is what the model answers: of those that run where a node dies, and where nodes go, too."""
    wanted = ask(url)
    assert wanted[0] == 200 and wanted[2] and len(cluster.nodes()) == 1
    with Load(url, streams=3 * MOST) as many:
        until(lambda: len(cluster.nodes()) == len(replicas(ENGINE)) == MOST, SECONDS)
        before, given = cluster.nodes(), len(many.answers)
        until(lambda: len(many.answers) >= given + 2 * MOST, SECONDS)
        cluster.lose_one_with(ENGINE)
        until(lambda: len(cluster.nodes()) == MOST != len(cluster.nodes() & before), SECONDS)
        until(lambda: len(replicas(ENGINE)) == MOST, SECONDS)
    with Load(url, streams=1) as few:
        until(lambda: len(cluster.nodes()) == len(replicas(ENGINE)) == 1, SECONDS)
        given = len(few.answers)
        until(lambda: len(few.answers) > given + 1, SECONDS)
    assert len(replicas(GATEWAY)) == 1
    assert Counter(many.answers) == {wanted: len(many.answers)}
    assert Counter(few.answers) == {wanted: len(few.answers)}
