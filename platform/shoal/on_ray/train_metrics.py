"""What a training run says of itself, among Ray's metrics of the node that its command runs on: whoever scrapes the cluster's
nodes, as Ray and KubeRay say how, has them with no more to set.

Notable: Ray forgets a gauge that nobody has set for two of its reports, 20 seconds, and an alert on what is not there never
fires. What was last said is therefore said again and again, until the run's command has done with it.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from ray.util.metrics import Counter, Gauge

from shoal.train.log import Record
from shoal.train.metrics import FAMILIES, samples

PREFIX = "shoal_train_"  # and Ray's own `ray_` before it
RUN = "run"  # label: the run's folder
AGAIN_SECONDS = 5.0  # half of the time between two of Ray's reports


class Exported:
    """A `Report` that tells Ray the numbers of the run in folder `run`, and tells it gauges again while it is entered. Ray must
    be running."""

    def __init__(self, run: str) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}
        self._run = {RUN: run}
        self._said: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()  # of what was said: an older number must not follow a newer one
        self._over = threading.Event()
        self._again = threading.Thread(target=self._say_again, name="train-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._again.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._again.join()

    def __call__(self, record: Record) -> None:
        with self._lock:
            for name, value, labels in samples(record):
                metric = self._metrics.get(name) or self._made(name)
                if isinstance(metric, Counter):
                    if value:  # Ray refuses a growth by nothing
                        metric.inc(value, tags=self._run | dict(labels))
                else:
                    self._said[name, tuple(labels.items())] = value
                    metric.set(value, tags=self._run | dict(labels))

    def _say_again(self) -> None:
        while not self._over.wait(AGAIN_SECONDS):
            with self._lock:
                for (name, labels), value in self._said.items():
                    metric = self._metrics[name]
                    assert isinstance(metric, Gauge)
                    metric.set(value, tags=self._run | dict(labels))

    def _made(self, name: str) -> Counter | Gauge:
        family = FAMILIES[name]
        kind = Counter if family.kind == "counter" else Gauge
        self._metrics[name] = kind(PREFIX + name, description=family.help, tag_keys=(RUN, *family.labels))
        return self._metrics[name]
