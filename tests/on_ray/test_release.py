"""A release on Ray Serve, one replica under load: a promotion, a canary that answers NaN, a rollback; nobody sees an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from ray import serve as ray_serve

from shoal import Model
from shoal.api.serve_args import ServeArgs
from shoal.loop.release import Release
from shoal.on_ray import serve
from shoal.on_ray.serve_config import serve_config
from tests.on_ray.load import BODY, QUEUE, Load
from tests.on_ray.test_serve import free_port, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]

PASSED = {"passed": True, "checks": []}


@pytest.fixture
def release(tmp_path: Path) -> Release:
    made = Release(tmp_path / "release")
    broken = lively()
    for norm in broken.net.exit_norms.values():
        norm.weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    for name, model in (
        ("one", lively()),
        ("two", Model.from_preset("test", seed=11, dtype="float64")),
        ("nan", broken),
    ):
        model.save(tmp_path / name)
        made.add(tmp_path / name, verdict=PASSED)
    return made


@pytest.fixture(params=[1, 2], ids=["one gateway", "two gateways"])
def url(shared_ray: None, release: Release, request: pytest.FixtureRequest) -> Iterator[str]:
    gateways = {"min_gateways": request.param, "max_gateways": request.param}
    args = ServeArgs(release=str(release.directory), name="fish", cpus=0.5, max_batch=4, max_queue=QUEUE, **gateways)
    try:
        yield serve.run(serve_config(args, port=free_port()), blocking=False)
    finally:
        serve.stop()


def version(url: str, number: int = 0) -> str:
    """Which version answers."""
    body = {**BODY, "stream": False, "max_tokens": 2, "prompt": f"{number}: who are you?"}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    return answer.headers.get("x-shoal-version", "") if answer.status_code == 200 else ""


def test_one_replica_follows_a_release_under_load_and_nobody_sees_an_error(url: str, release: Release) -> None:
    first, second, _ = (each.label for each in release.versions())
    assert version(url) == first
    vector = httpx.post(f"{url}/v1/embeddings", json={"model": "fish", "input": "the sea"}, timeout=120)
    assert vector.headers.get("x-shoal-version") == first
    with Load(url) as load:
        release.promote(2, why="better")
        until(lambda: version(url) == second, 120)
        release.begin(3, why="try")
        canary = release.state().canary
        assert canary is not None
        release.step(replace(canary, step=3), why="half of the traffic at once")
        numbers = iter(range(10_000))
        until(lambda: bool(version(url, next(numbers))) and release.state().canary is None, 240)
        last = release.audit.entries()[-1]
        assert (last["what"], last["who"]) == ("rollback", "shoal") and "failures" in last["why"]
        assert last["figures"]["canary"]["failures"]["of"] <= 20
        until(lambda: not any("canary" in name for name in ray_serve.status().applications), 120)
        release.rollback(why="worse")
        until(lambda: version(url) == first, 120)
    assert Counter((status, whole) for status, _, whole in load.answers).keys() == {(200, True)}, load.answers
    assert release.check() == len(release.audit.entries())
