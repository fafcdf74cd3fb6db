"""How many engine replicas, or gateways, the load asks for. Ray Serve's controller runs this, so it imports nothing of ours.

    up      at once to what the requests (running and queued) need, or the K/V memory of engines, or the processor time of
            gateways, where a replica would have more than its target
    down    only to as many replicas as would then be below `LOW` of their targets: between the two nothing changes, so a load
            that wavers by less than a quarter of its peak moves nothing

Serve adds the bounds, the start from zero, and the delays: seconds before it adds replicas, minutes before it takes one
(`replicas`). Each change is a line in the controller's log.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

KV_USE, CPU_USE = "kv_use", "cpu_use"  # of an engine's K/V memory; of a core, by a gateway, which has but one thread
KV_TARGET = 0.8  # the share in use at which another replica is wanted
TARGETS = {KV_USE: ("memory", "K/V", KV_TARGET), CPU_USE: ("processor time", "cores", 0.6)}
LOW = 0.75  # of both targets
ROUNDING = 1e-9  # of a replica: not worth another

log = logging.getLogger("ray.serve")


def replicas(least: int, most: int, requests: float) -> dict[str, Any]:
    """Serve's options for a deployment of `least` to `most` replicas, each with a target of so many requests."""
    if least == most:
        return {"num_replicas": most}
    with warnings.catch_warnings():
        # what is to replace `metrics_interval_s` are variables of a whole cluster's environment
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=requests,
            metrics_interval_s=2.0,
            look_back_period_s=6.0,
            upscale_delay_s=2.0,
            downscale_delay_s=120.0,
            downscale_to_zero_delay_s=300.0,  # the next request then waits for a model to load
            policy=AutoscalingPolicy(policy_function=f"{__name__}:{by_load.__name__}"),  # type: ignore[no-untyped-call]
        )
    return {"autoscaling_config": scaling}


def wanted(
    requests: float, target: float, uses: list[float], replicas: int, use: str = KV_USE, running: int | None = None
) -> tuple[int, str]:
    """Replicas, and why. `requests`: running and queued, of all; `target`: of one replica; `uses`: share in use of what `use`
    names, of each replica that told; `replicas`: as many as there are to be at present, of which so many are `running` [all]:
    those that have yet to start hold nothing."""
    name, unit, most = TARGETS[use]
    there = replicas if running is None else running
    taken = there * sum(uses) / len(uses) if uses and requests else 0.0  # in replicas' worth
    need = {"requests": requests / target, name: taken / most}
    cause = max(need, key=lambda name: need[name])
    told = f"{requests:.1f} requests, {target:g} a replica; {unit} of {taken:.2f} replicas in use"
    if (up := math.ceil(need[cause] - ROUNDING)) > replicas:
        return up, f"more for {cause}: {told}"
    if (down := math.ceil(need[cause] / LOW - ROUNDING)) < replicas:
        return down, f"fewer: {told}"
    return replicas, f"enough: {told}"


def by_load(context: Any) -> tuple[int, dict[str, Any]]:
    """`wanted` for Serve's AutoscalingContext; the state that Serve keeps for the next call holds the last number told."""
    metrics = context.aggregated_metrics or {}
    use = CPU_USE if CPU_USE in metrics else KV_USE
    uses = list((metrics.get(use) or {}).values())
    present, running = context.target_num_replicas, context.current_num_replicas
    target = context.config.target_ongoing_requests
    number, reason = wanted(context.total_num_requests, target, uses, present, use, running)
    if number != (context.policy_state or {}).get("told", present):
        log.info("%s: %d replicas to be %d, %s", context.deployment_name, present, number, reason)
    return number, {"told": number}
