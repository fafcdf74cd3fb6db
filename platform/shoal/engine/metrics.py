"""What the engine counts: plain numbers and histograms, no exporter. Names end as vLLM's do, so that its dashboards need one
replacement (ours stand under the prefix that `api.metrics` sets).

`samples` gives one flat mapping, each key a sample's name as Prometheus writes it (``name_bucket{le="0.1"}``). So the sum of
two replicas' mappings, key by key, is the mapping of both.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
COUNTS = tuple(2.0**k for k in range(15))  # 1 .. 16384


class Histogram:
    """How often a value was at most each of `bounds`, how often in all, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # of values above the bound before, the last above all
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def samples(self, name: str) -> dict[str, float]:
        """Prometheus' samples: cumulative buckets, sum and count."""
        found: dict[str, float] = {}
        below = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            below += count
            found[f'{name}_bucket{{le="{bound}"}}'] = below
        return found | {f"{name}_sum": self.sum, f"{name}_count": below}


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _token_seconds() -> Histogram:
    return Histogram(TOKEN_SECONDS)


def _counts() -> Histogram:
    return Histogram(COUNTS)


@dataclass
class Metrics:
    """Totals since the start. `finished` counts requests by their end, `depths` by the layers they ran through."""

    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    rows: int = 0
    drafts: int = 0  # tokens drafted by self-speculation
    drafts_accepted: int = 0
    refused: int = 0  # the queue was full, or the deadline out of reach
    finished: dict[str, int] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    # each of the following with the name it is shown under
    time_to_first_token_seconds: Histogram = field(default_factory=_seconds)  # from submission
    inter_token_latency_seconds: Histogram = field(default_factory=_token_seconds)
    request_time_per_output_token_seconds: Histogram = field(default_factory=_token_seconds)  # after the first
    e2e_request_latency_seconds: Histogram = field(default_factory=_seconds)
    request_queue_time_seconds: Histogram = field(default_factory=_seconds)  # from submission to its first step
    iteration_tokens_total: Histogram = field(default_factory=_counts)  # rows a step; vLLM's name
    request_kv_units: Histogram = field(default_factory=_counts)  # units owned at the end

    def ended(self, reason: str, units: int, queue: float, first: float | None, total: float, tokens: int) -> None:
        """Count the end of a request that owned `units` and gave `tokens`; the times are from its submission, in seconds
        (`first`: of its first token, None without one). A request that ended badly has an end, and no latencies."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        if units:
            self.request_kv_units.observe(units)
        if reason not in ("stop", "length"):
            return
        self.e2e_request_latency_seconds.observe(total)
        self.request_queue_time_seconds.observe(queue)
        if first is not None:
            self.time_to_first_token_seconds.observe(first)
            if tokens > 1:
                self.request_time_per_output_token_seconds.observe((total - first) / (tokens - 1))

    def samples(self, exits: Sequence[int]) -> dict[str, float]:
        """Everything, by sample name; names of counters end in ``_total``."""
        found: dict[str, float] = {
            "num_preemptions_total": self.preemptions,
            "prefix_cache_queries_total": self.prefix_queries,
            "prefix_cache_hits_total": self.prefix_hits,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "steps_total": self.steps,
            "step_rows_total": self.rows,
            "requests_refused_total": self.refused,
            "spec_decode_num_draft_tokens_total": self.drafts,
            "spec_decode_num_accepted_tokens_total": self.drafts_accepted,
        }
        found |= {
            f'request_success_total{{finished_reason="{reason}"}}': self.finished.get(reason, 0)
            for reason in ("stop", "length")
        }
        found |= {f"requests_{bad}_total": self.finished.get(bad, 0) for bad in ("cancelled", "deadline", "error")}
        found |= {f"requests_depth_{e}_total": self.depths.get(e, 0) for e in exits}
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                found |= value.samples(name)
        return found
