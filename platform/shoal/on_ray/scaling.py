"""How many engine replicas the load asks for. Ray Serve's controller runs this, so it imports nothing.

Serve itself adds the bounds, and the delays that keep a short burst or lull from flapping replicas (`AutoscalingConfig`).
"""

from __future__ import annotations

from typing import Any

KV_USE, KV_TARGET = "kv_use", 0.8  # the share of K/V memory at which another replica is wanted


def by_load(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas wanted for Serve's AutoscalingContext: enough for the requests, running and queued, and for their K/V.

    Requests weigh against ``target_ongoing_requests`` a replica; memory is what long contexts run out of first.
    """
    requests: float = context.total_num_requests
    for_requests = requests / context.config.target_ongoing_requests
    uses = list(((context.aggregated_metrics or {}).get(KV_USE) or {}).values())
    for_memory = context.current_num_replicas * (sum(uses) / len(uses)) / KV_TARGET if uses and requests else 0.0
    return max(for_requests, for_memory), {}
