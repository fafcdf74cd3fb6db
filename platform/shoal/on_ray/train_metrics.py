"""What a training run says of itself, among Ray's metrics of the node that its command runs on: whoever scrapes the cluster's
nodes, as Ray and KubeRay say how, has them with no more to set."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from shoal.train.log import Record
from shoal.train.metrics import FAMILIES, samples

PREFIX = "shoal_train_"  # and Ray's own `ray_` before it
RUN = "run"  # label: the run's folder


class Exported:
    """A `Report` that tells Ray the numbers of the run in folder `run`. Ray must be running."""

    def __init__(self, run: str) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}
        self._run = {RUN: run}

    def __call__(self, record: Record) -> None:
        for name, value, labels in samples(record):
            metric = self._metrics.get(name) or self._made(name)
            if isinstance(metric, Counter):
                if value:  # Ray refuses a growth by nothing
                    metric.inc(value, tags=self._run | dict(labels))
            else:
                metric.set(value, tags=self._run | dict(labels))

    def _made(self, name: str) -> Counter | Gauge:
        family = FAMILIES[name]
        kind = Counter if family.kind == "counter" else Gauge
        self._metrics[name] = kind(PREFIX + name, description=family.help, tag_keys=(RUN, *family.labels))
        return self._metrics[name]
