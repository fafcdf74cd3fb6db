"""Prometheus metrics: the HTTP requests that ended in an error, as the routes saw them; and all that the engine says of itself
at the moment of the scrape (queue, KV memory, tokens, depths, latencies), each model under its ``model_name``.

The names end as vLLM's do, under our own prefix, so a vLLM dashboard needs one replacement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import Metric

PREFIX = "shoal:"

_SAMPLE = re.compile(r'(?P<name>\w+)(?:\{(?P<label>\w+)="(?P<value>[^"]*)"\})?')
_PARTS = ("_bucket", "_sum", "_count")  # of a histogram


class Metrics:
    """One registry an app, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        text = "Requests answered with an error."
        self._failed = Counter(PREFIX + "request_errors", text, ("model_name", "code"), registry=self.registry)

    def failed(self, model: str, code: str) -> None:
        """Counts one HTTP request for `model` (empty: for none that exists) that ended in an error."""
        self._failed.labels(model, code).inc()

    def text(self, stats: Mapping[str, Mapping[str, float]]) -> bytes:
        """The exposition, with what the engine of each model says: sample names as Prometheus writes them. Those with buckets
        are histograms, others that end in ``_total`` counters, the rest gauges."""
        scrape = CollectorRegistry()
        scrape.register(_Stats(stats))
        return generate_latest(self.registry) + generate_latest(scrape)


def labels(stats: Mapping[str, float], name: str) -> list[str]:
    """The values that the label of `name` has in samples that count something."""
    found = [_SAMPLE.fullmatch(key) for key, value in stats.items() if value]
    return sorted(match["value"] for match in found if match and match["name"] == name and match["label"])


class _Stats:
    def __init__(self, stats: Mapping[str, Mapping[str, float]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for model, stats in self._stats.items():
            self._add(families, model, stats)
        yield from families.values()

    def _add(self, families: dict[str, Metric], model: str, stats: Mapping[str, float]) -> None:
        histograms = {key.partition("_bucket{")[0] for key in stats if "_bucket{" in key}
        for key, value in stats.items():
            match = _SAMPLE.fullmatch(key)
            assert match is not None, f"{key} is no sample name"
            name, label = match["name"], match["label"]
            part = next((end for end in _PARTS if name.endswith(end) and name.removesuffix(end) in histograms), None)
            kind = "histogram" if part else "counter" if name.endswith("_total") else "gauge"
            family = name.removesuffix(part or "") if part else name.removesuffix("_total")
            if family not in families:
                families[family] = Metric(PREFIX + family, "Of the engine.", kind)
            labels = {"model_name": model} | ({label: match["value"]} if label else {})
            families[family].add_sample(PREFIX + name, labels, value)
