"""The autoscaling policy as a function of the load, and as Serve applies it with its delays."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from hypothesis import given
from hypothesis import strategies as st
from ray.serve.autoscaling_policy import _apply_autoscaling_config

from shoal.api.serve_args import ServeArgs
from shoal.on_ray import pages
from shoal.on_ray.engines import engine_options
from shoal.on_ray.gateways import REQUESTS as REQUESTS_OF_ONE
from shoal.on_ray.gateways import gateway_options
from shoal.on_ray.scaling import CPU_USE, KV_TARGET, KV_USE, LOW, by_load, wanted
from shoal.on_ray.serve_config import serve_config
from tests.clocks import tells

REQUESTS = st.one_of(st.just(0.0), st.floats(0.01, 500))
TARGETS = st.sampled_from([1.0, 8.0, 24.0])
REPLICAS = st.integers(1, 20)
USES = st.lists(st.floats(0, 1), max_size=20)


@given(REQUESTS, TARGETS, USES, REPLICAS)
def test_no_replica_is_left_with_more_than_its_target(
    requests: float, target: float, uses: list[float], n: int
) -> None:
    number, _ = wanted(requests, target, uses, n)
    assert requests <= number * target * (1 + 1e-9)
    if uses and requests:
        assert n * sum(uses) / len(uses) <= number * KV_TARGET * (1 + 1e-9)


@given(REQUESTS, TARGETS, USES, REPLICAS)
def test_the_same_load_asks_for_no_second_change(requests: float, target: float, uses: list[float], n: int) -> None:
    number, _ = wanted(requests, target, uses, n)
    if number:
        spread = [n * sum(uses) / len(uses) / number] if uses else []  # the same memory, in use on the new number
        assert wanted(requests, target, spread, number)[0] == number


@given(st.floats(1, 500), TARGETS, REPLICAS, st.lists(st.floats(LOW + 0.01, 1), min_size=1, max_size=30))
def test_a_load_that_wavers_moves_nothing(peak: float, target: float, n: int, shares: list[float]) -> None:
    """Once there are enough for its peak, a load keeps its replicas while it stays above three quarters of it."""
    number, _ = wanted(peak, target, [], min(n, math.ceil(peak / target - 1e-9)))
    assert number == math.ceil(peak / target - 1e-9)
    for share in shares:
        assert wanted(peak * share, target, [], number)[0] == number


@given(REQUESTS, st.floats(0, 100), TARGETS, REPLICAS)
def test_more_load_never_asks_for_less(requests: float, more: float, target: float, n: int) -> None:
    assert wanted(requests + more, target, [], n)[0] >= wanted(requests, target, [], n)[0]


def test_gateways_are_as_many_as_their_requests_or_their_processors_want() -> None:
    """Whichever asks for more; one that holds nothing and takes time for itself is let be."""

    def asked(requests: float, uses: list[float], present: int) -> int:
        told = {str(place): use for place, use in enumerate(uses)}
        config = SimpleNamespace(target_ongoing_requests=REQUESTS_OF_ONE)
        context = SimpleNamespace(
            aggregated_metrics={CPU_USE: told}, target_num_replicas=present, current_num_replicas=present,
            total_num_requests=requests, config=config, policy_state=None, deployment_name="Gateway",
        )  # fmt: skip
        return by_load(context)[0]

    assert [asked(requests, [0.1], 1) for requests in (1, 400, 401, 4000)] == [1, 1, 2, 10]
    assert [asked(50, [use], 1) for use in (0.59, 0.61, 1.0)] == [1, 2, 2]
    assert asked(50, [0.5, 0.4], 2) == 2 and asked(50, [0.3, 0.1], 2) == 1
    assert asked(0, [0.9], 1) == 0, "Serve keeps the least"


def test_a_service_has_as_many_gateways_as_it_is_told() -> None:
    fixed = gateway_options(ServeArgs(model="m", min_gateways=2, max_gateways=2, seconds=900))
    assert (fixed["num_replicas"], fixed["graceful_shutdown_timeout_s"]) == (2, 900)
    assert gateway_options(ServeArgs(model="m"))["num_replicas"] == 1
    scaled = gateway_options(ServeArgs(model="m", max_gateways=4))
    found = scaled["autoscaling_config"]
    assert "num_replicas" not in scaled and (found.min_replicas, found.max_replicas) == (1, 4)
    assert found.target_ongoing_requests == REQUESTS_OF_ONE


def test_pages_are_an_application_of_their_own_where_several_gateways_would_have_to_share_them() -> None:
    args = ServeArgs(model="m", max_gateways=2, ui=True, ui_api="http://sea/v1")
    (application,) = serve_config(args).applications
    found = pages.beside(application.model_copy(update={"route_prefix": "/sea"}), args)
    assert found is not None and (found.name, found.route_prefix) == ("shoal-pages", "/sea/ui")
    assert (found.import_path, found.args["api"]) == ("shoal.on_ray.pages:app", "http://sea/v1")
    assert pages.beside(application, replace(args, max_gateways=1)) is None
    assert pages.beside(application, replace(args, ui=False)) is None


def options(args: ServeArgs) -> dict[str, Any]:
    return engine_options(args, "some/model", 8)


def to_eight() -> Any:
    return options(ServeArgs(min_replicas=0, max_replicas=8, max_batch=16))["autoscaling_config"]


def context(
    requests: float,
    replicas: int = 1,
    uses: tuple[float, ...] = (),
    state: dict[str, object] | None = None,
    config: Any = None,
    running: int | None = None,
) -> SimpleNamespace:
    return SimpleNamespace(
        total_num_requests=requests, current_num_replicas=replicas if running is None else running,
        target_num_replicas=replicas, config=config or to_eight(),
        aggregated_metrics={KV_USE: dict(enumerate(uses))} if uses else {}, policy_state=state or {},
        deployment_name="EngineReplica",
    )  # fmt: skip


def test_replicas_follow_requests_and_memory() -> None:
    assert by_load(context(36))[0] == 3  # 12 of 16 a replica
    assert by_load(context(8, replicas=2, uses=(0.8, 0.8)))[0] == 2
    assert by_load(context(8, replicas=2, uses=(1.0, 1.0)))[0] == 3
    assert by_load(context(0, replicas=2, uses=(0.9, 0.9)))[0] == 0  # what is only cached asks for nothing
    silent = context(8, replicas=2)
    for silent.aggregated_metrics in (None, {}, {KV_USE: None}, {KV_USE: {}}):  # until a replica has told
        silent.policy_state = None
        assert by_load(silent) == (1, {"told": 1})


def test_replicas_that_have_yet_to_start_hold_nothing() -> None:
    """What two can hold asks for two, however often it is asked until the second is there, which may wait for a node."""
    for uses, enough in (((0.9,), 2), ((1.0,), 2), ((0.9, 0.8), 3)):
        present, running = len(uses), len(uses)
        for _ in range(20):
            present, _ = by_load(context(8, replicas=present, running=running, uses=uses))
        assert present == enough
    assert by_load(context(8, replicas=2, running=0))[0] == 1, "requests alone count then"


def test_serve_scales_up_in_seconds_and_down_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own wrapper around the policy, on a clock of ours, one decision a second."""
    policy = _apply_autoscaling_config(by_load)
    now, replicas, state, when, config = 1000.0, 1, {}, {}, to_eight()
    tells(monkeypatch, "ray.serve.autoscaling_policy", time=lambda: now)
    for second in range(1200):
        requests = 36.0 if second < 60 else 6.0 if second < 400 else 0.0
        now += 1
        found = context(requests, replicas, state=state, config=config)
        before, (replicas, state) = replicas, policy(found)
        if replicas != before:
            when[second] = replicas
    assert list(when.values()) == [3, 1, 0]
    up, down, zero = when
    assert up <= 5
    assert 120 <= down - 60 <= 130
    assert 300 <= zero - 400 <= 310


def test_from_zero_the_first_request_brings_a_replica_at_once() -> None:
    assert _apply_autoscaling_config(by_load)(context(1, replicas=0))[0] == 1


def test_a_fixed_number_of_replicas_does_not_scale() -> None:
    assert options(ServeArgs(min_replicas=2, max_replicas=2))["num_replicas"] == 2
    scaling = options(ServeArgs(max_replicas=3, max_batch=16))["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 12)
