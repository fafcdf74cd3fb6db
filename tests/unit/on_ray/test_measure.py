"""On what is measured: GPUs where the cluster has some now, else CPUs, and who may expect otherwise is told."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import ResourceError
from shoal.on_ray.measure import workers
from shoal.on_ray.resources import NODE_GROUP


@pytest.mark.parametrize(
    ("have", "group", "gpus", "told"),
    [
        (1, "head", None, False),
        (0, "head", None, True),  # of an autoscaler, which ends nodes that are idle
        (0, "", None, False),  # there never were any
        (0, "head", False, False),
        (0, "head", True, False),  # it waits for one
    ],
)
def test_who_may_expect_gpus_is_told_that_cpus_measure(
    monkeypatch: pytest.MonkeyPatch, have: int, group: str, gpus: bool | None, told: bool
) -> None:
    node: dict[str, Any] = {"Alive": True, "Labels": {NODE_GROUP: group}, "Resources": {"memory": 2.0**40, "CPU": 1.0}}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": have})
    monkeypatch.setattr("ray.nodes", lambda: [node])
    lines = list[str]()
    workers([10], gpus, say=lines.append)
    assert len(lines) == told and all("no GPU is in the cluster now" in line and "--gpu" in line for line in lines)


def test_a_gpu_that_no_node_has_and_none_can_get_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Labels": {}, "Resources": {}}])
    with pytest.raises(ResourceError, match="1 GPU to measure on: got 'none in the cluster'"):
        workers([10], True)


def on(monkeypatch: pytest.MonkeyPatch, *machines: tuple[float, float]) -> list[dict[str, float]]:
    """Machines of so many GiB of memory and CPUs; what is asked of them, once it is."""
    asked: list[dict[str, float]] = []
    made = [{"memory": size * 2.0**30, **({"CPU": cpus} if cpus else {})} for size, cpus in machines]
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Labels": {}, "Resources": some} for some in made])
    monkeypatch.setattr("shoal.on_ray.measure.each", lambda *args, **given: asked.append(given) or [])
    return asked


def test_a_large_piece_asks_for_the_cpus_of_a_machine_that_holds_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most CPUs of one and the memory of another were asked for, of which no machine has both: it waited for ever."""
    asked = on(monkeypatch, (4.0, 16.0), (64.0, 8.0))
    list(workers([10**9], whole=True)([]))
    assert [given["num_cpus"] for given in asked] == [8.0]


def test_a_head_without_cpus_holds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (64.0, 0.0), (4.0, 16.0))
    with pytest.raises(ResourceError, match=r"a worker that measures needs 5.7 GiB of memory: got '4.0 GiB"):
        workers([10**9])
