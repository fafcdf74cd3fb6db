"""Prometheus metrics: the HTTP requests that ended in an error, as the routes saw them; and all that the engines say of
themselves at the moment of the scrape (queue, KV memory, tokens, depths, latencies), each model under its ``model_name``.

The table of `engine.metrics` says which metrics there are. Their names end as vLLM's do, and begin with a prefix of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import Metric

from shoal.engine.metrics import FAMILIES, Samples

PREFIX = "shoal:"


class Metrics:
    """One registry an app, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        errors = FAMILIES["request_errors"]
        self._failed = Counter(PREFIX + errors.name, errors.help, errors.labels, registry=self.registry)

    def failed(self, model: str, code: str) -> None:
        """Counts one HTTP request for `model` (empty: for none that exists) that ended in an error."""
        self._failed.labels(model_name=model, code=code).inc()

    def text(self, stats: Mapping[str, Samples], own: Samples | None = None) -> bytes:
        """The exposition, with what the engines of each model say, and the gateway of its `own`."""
        scrape = CollectorRegistry()
        scrape.register(_Stats(stats, own or {}))
        return generate_latest(self.registry) + generate_latest(scrape)


class _Stats:
    def __init__(self, stats: Mapping[str, Samples], own: Samples) -> None:
        self._stats, self._own = stats, own

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, Metric] = {}
        told = [({"model_name": model}, samples) for model, samples in self._stats.items()]
        for beside, samples in [*told, ({}, self._own)]:
            for key, value in samples.items():
                if key.name not in metrics:
                    metrics[key.name] = Metric(PREFIX + key.name, key.family.help, key.family.kind)
                labels = {**beside, **key.labels}
                metrics[key.name].add_sample(PREFIX + key.name + key.ending, labels, value)
        yield from metrics.values()
