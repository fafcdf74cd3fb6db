"""Prometheus metrics: the HTTP requests that ended in an error, as the routes saw them; and all that the engines say of
themselves at the moment of the scrape (queue, KV memory, tokens, depths, latencies), each model under its ``model_name``.

The table of `engine.metrics` says which metrics there are, but for those of `OF_FILES`. Their names end as vLLM's do, and begin
with a prefix of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from shoal.engine.metrics import Family, Samples, sample

PREFIX = "shoal:"

# of files that others write: of the watch's reference, and of a release's retrainings. No engine and no gateway counts them
REFERENCE = Family(
    "drift_reference_timestamp_seconds", "gauge", "When the last request of the watch's reference ended, in Unix time."
)
RETRAINED = Family(
    "retrain_failures", "gauge", "Retrainings in a row, up to the last, that made no version which the gate let pass."
)
OF_FILES = {family.name: family for family in (REFERENCE, RETRAINED)}


class Metrics:
    """Of one app."""

    def __init__(self) -> None:
        self._failed = Counter[tuple[str, str]]()

    def failed(self, model: str, code: str) -> None:
        """Counts one HTTP request for `model` (empty: for none that exists) that ended in an error."""
        self._failed[model, code] += 1

    def samples(self) -> Samples:
        """What was counted."""
        counts = self._failed.items()
        return {sample("request_errors", model_name=model, code=code): float(count) for (model, code), count in counts}


def text(stats: Mapping[str, Samples], own: Samples) -> bytes:
    """The exposition of what the engines of each model say, and of what gateways say of themselves."""
    scrape = CollectorRegistry()
    scrape.register(_Stats(stats, own))
    return generate_latest(scrape)


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
