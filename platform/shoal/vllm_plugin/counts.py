"""What vLLM counts, under our names: the engine's half of ``/metrics``."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from shoal.engine.events import Finished
from shoal.engine.metrics import Metrics, Samples, sample

GAUGES = tuple(map(sample, ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")))


class Counts(StatLoggerBase):  # type: ignore[misc]
    """vLLM tells it of each step, `VllmEngine` of each end."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.gauges: Samples = dict.fromkeys(GAUGES, 0.0)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        m = self.metrics
        if scheduler_stats is not None:
            s = scheduler_stats
            self.gauges = dict(
                zip(GAUGES, map(float, (s.num_running_reqs, s.num_waiting_reqs, s.kv_cache_usage)), strict=True)
            )
            m.prefix_queries += scheduler_stats.prefix_cache_stats.queries
            m.prefix_hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            rows = iteration_stats.num_prompt_tokens + iteration_stats.num_generation_tokens
            m.prompt_tokens += iteration_stats.num_prompt_tokens
            m.generation_tokens += iteration_stats.num_generation_tokens
            m.preemptions += iteration_stats.num_preempted_reqs
            m.steps, m.rows = m.steps + 1, m.rows + rows
            m.iteration_tokens_total.observe(rows)

    def log_engine_initialized(self) -> None:
        pass

    def ended(self, event: Finished) -> None:
        first = event.first_token_seconds if event.completion_tokens else None
        self.metrics.ended(event.reason, 0, event.queue_seconds, first, event.total_seconds, event.completion_tokens)
        self.metrics.depths[event.depth] = self.metrics.depths.get(event.depth, 0) + 1

    def broken(self, reason: str) -> None:
        """A request without a `Finished` of its own."""
        self.metrics.ended(reason, 0, 0.0, None, 0.0, 0)

    def samples(self, exits: Any) -> Samples:
        return self.gauges | self.metrics.samples(exits)
