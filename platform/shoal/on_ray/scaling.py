"""How many engine replicas the load asks for. Ray Serve's controller runs this, so it imports nothing of ours.

    up      at once to what the requests (running and queued) or the K/V memory need, where a replica would have more than
            its target
    down    only to as many replicas as would then be below `LOW` of their targets: between the two nothing changes, so a load
            that wavers by less than a quarter of its peak moves nothing

Serve adds the bounds, the start from zero, and the delays: seconds before it adds replicas, minutes before it takes one
(`engines.engine_options`). Each change is a line in the controller's log.
"""

from __future__ import annotations

import logging
import math
from typing import Any

KV_USE, KV_TARGET = "kv_use", 0.8  # the share of K/V memory in use at which another replica is wanted
LOW = 0.75  # of both targets
ROUNDING = 1e-9  # of a replica: not worth another

log = logging.getLogger("ray.serve")


def wanted(requests: float, target: float, kv_uses: list[float], replicas: int) -> tuple[int, str]:
    """Replicas, and why. `requests`: running and queued, of all; `target`: of one replica; `kv_uses`: share of the K/V memory
    in use, of each replica that told; `replicas`: as many as there are to be at present."""
    memory = replicas * sum(kv_uses) / len(kv_uses) if kv_uses and requests else 0.0  # in replicas' worth
    need = {"requests": requests / target, "memory": memory / KV_TARGET}
    cause = max(need, key=lambda name: need[name])
    told = f"{requests:.1f} requests, {target:g} a replica; K/V of {memory:.2f} replicas in use"
    if (up := math.ceil(need[cause] - ROUNDING)) > replicas:
        return up, f"more for {cause}: {told}"
    if (down := math.ceil(need[cause] / LOW - ROUNDING)) < replicas:
        return down, f"fewer: {told}"
    return replicas, f"enough: {told}"


def by_load(context: Any) -> tuple[int, dict[str, Any]]:
    """`wanted` for Serve's AutoscalingContext; the state that Serve keeps for the next call holds the last number told."""
    uses = list(((context.aggregated_metrics or {}).get(KV_USE) or {}).values())
    present = context.target_num_replicas
    number, reason = wanted(context.total_num_requests, context.config.target_ongoing_requests, uses, present)
    if number != (context.policy_state or {}).get("told", present):
        log.info("%s: %d replicas to be %d, %s", context.deployment_name, present, number, reason)
    return number, {"told": number}
