"""Canaries of several gateways are one: with a Serve that only keeps applications."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from shoal.api.serve_args import ServeArgs
from shoal.loop.canary_state import Canary
from shoal.loop.release import Release, State
from shoal.on_ray import canary
from shoal.on_ray.canary import OnServe


class Serve:
    """Applications by name, and how often each was started."""

    def __init__(self) -> None:
        self.applications: dict[str, Any] = {}
        self.started: list[str] = []

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(applications=dict(self.applications))

    def deployment(self, **options: object) -> Any:
        return lambda kind: SimpleNamespace(bind=lambda *given: kind)

    def _run(self, target: object, *, name: str, **options: object) -> None:
        time.sleep(0.01)  # in which another may look
        self.started.append(name)
        self.put(name)

    def put(self, name: str, status: ApplicationStatus = ApplicationStatus.RUNNING) -> None:
        self.applications[name] = SimpleNamespace(status=status)

    def delete(self, name: str) -> None:
        del self.applications[name]

    def get_deployment_handle(self, deployment: str, name: str) -> str:
        return name


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    monkeypatch.setattr(canary, "serve", made := Serve())
    monkeypatch.setattr(canary, "POLL_SECONDS", 0.01)
    # Ray writes a router's class down for one thread at a time; gateways are processes of their own
    monkeypatch.setattr(canary, "engine_options", lambda *given: {})
    return made


def gateway(folder: Path) -> OnServe:
    return OnServe(ServeArgs(release=str(folder)), "shoal")


def on_trial(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    state = State() if version is None else State(canary=Canary(version, 1, "now"))
    monkeypatch.setattr(Release, "state", lambda self: state)


def test_gateways_that_begin_a_canary_at_once_start_one(serve: Serve, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        each = [pool.submit(gateway(tmp_path)._deploy, "shoal-canary-4", "model", 8) for _ in range(3)]
        assert [one.result(timeout=60) for one in each] == ["shoal-canary-4"] * 3
    assert serve.started == ["shoal-canary-4"]
    serve.put("shoal-canary-4", ApplicationStatus.UNHEALTHY)
    gateway(tmp_path)._deploy("shoal-canary-4", "model", 8)
    assert len(serve.started) == 2, "what broke is started anew"


def test_nobody_ends_the_canary_that_is_on_trial_nor_what_is_none_of_the_service(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shoal", "shoal-canary-3", "shoal-canary-4", "other-canary-3"):
        serve.put(name)
    on_trial(monkeypatch, 4)
    gateway(tmp_path)._delete()
    assert [*serve.applications] == ["shoal", "shoal-canary-4", "other-canary-3"]
    on_trial(monkeypatch, None)
    gateway(tmp_path)._delete()
    assert [*serve.applications] == ["shoal", "other-canary-3"]
