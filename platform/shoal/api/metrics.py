"""Prometheus metrics: how requests ended and how long they took, as the routes saw it; and what the engine says of itself
at the moment of the scrape (queue, KV memory, tokens, depths).

The names end as vLLM's do, under our own prefix, so a vLLM dashboard needs one replacement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from shoal.engine.events import Finished

PREFIX = "shoal:"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """One registry an app, so that two apps in one process do not mix."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets)

        self._success = counter("request_success", "Finished requests.", ("finished_reason",))
        self._failed = counter("request_errors", "Requests answered with an error.", ("code",))
        self._first = histogram("time_to_first_token_seconds", "From submission to the first token.", _SECONDS)
        self._total = histogram("e2e_request_latency_seconds", "From submission to the end.", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "From submission to the first step.", _SECONDS)
        self._each = histogram("request_time_per_output_token_seconds", "After the first token.", _TOKEN_SECONDS)

    def finished(self, end: Finished) -> None:
        """Counts one engine request that ended well."""
        self._success.labels(self._model, end.reason).inc()
        self._first.labels(self._model).observe(end.first_token_seconds)
        self._total.labels(self._model).observe(end.total_seconds)
        self._queue.labels(self._model).observe(end.queue_seconds)
        if end.completion_tokens > 1:
            spent = (end.total_seconds - end.first_token_seconds) / (end.completion_tokens - 1)
            self._each.labels(self._model).observe(spent)

    def failed(self, code: str | None, status: int) -> None:
        """Counts one HTTP request that ended in an error."""
        self._failed.labels(self._model, code or str(status)).inc()

    def text(self, stats: Mapping[str, float]) -> bytes:
        """The exposition, with `stats` of the engine: names ending in ``_total`` are counters, the others gauges."""
        scrape = CollectorRegistry()
        scrape.register(_Stats(stats, self._model))
        return generate_latest(self.registry) + generate_latest(scrape)


class _Stats:
    def __init__(self, stats: Mapping[str, float], model: str) -> None:
        self._stats, self._model = stats, model

    def collect(self) -> Iterator[Metric]:
        for name, value in sorted(self._stats.items()):
            counts = name.endswith("_total")
            kind = CounterMetricFamily if counts else GaugeMetricFamily
            family = kind(PREFIX + name.removesuffix("_total"), "Of the engine.", labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
