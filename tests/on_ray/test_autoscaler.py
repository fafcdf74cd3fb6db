"""A training run asks for nodes that are not there, before a real autoscaler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import presets
from shoal.on_ray.train import train
from shoal.train import log
from shoal.train.plan import pretrain_plan
from tests.corpus import write_corpus
from tests.on_ray.autoscaled import Autoscaled, autoscaled
from tests.on_ray.test_serve import until

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]
STEPS, SECONDS = 12, 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    with autoscaled() as made:
        yield made


def test_a_run_starts_the_nodes_that_it_asks_for_ends_on_them_though_one_is_lost_and_they_go(
    cluster: Autoscaled, tmp_path: Path
) -> None:
    """Two workers where no node is. One of the nodes dies in the middle, and the autoscaler finds another."""
    data, run = write_corpus(tmp_path / "data", presets.get("test")), tmp_path / "run"
    records, seen, lost = list[log.Record](), set[str](), list[int]()

    def told(record: log.Record) -> None:
        records.append(record)
        seen.update(cluster.nodes())
        if record["kind"] == "step" and record["step"] >= STEPS // 2 and not lost:
            lost.append(len(seen))
            cluster.lose_one_with("RayTrainWorker")

    assert not cluster.nodes()
    plan = pretrain_plan("test", str(data), str(run), steps=STEPS, eval_every=0, accumulate=2, checkpoint_minutes=0.0)
    result = train(plan, workers=2, max_failures=3, on_progress=told)
    assert result.steps == STEPS
    assert "2 worker(s) x 1 CPU = 2 CPUs: got '0 in the cluster'" in records[0]["text"]
    steps = [record["step"] for record in log.read(run) if record["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert [record["world"] for record in log.read(run) if record["kind"] == "start"] == [2, 2]
    assert lost == [2] and len(seen) > 2
    until(lambda: not cluster.nodes(), SECONDS)
