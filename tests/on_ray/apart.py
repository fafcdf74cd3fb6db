"""Ray's fake provider of nodes, whose nodes share no folder. A module of its own: the autoscaler's process imports it, and
little else should be imported there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

CACHES = "TEST_CACHES"  # the folder in which each node has one of its own


class Apart(FakeMultiNodeProvider):
    """Of each node SHOAL_CACHE is another folder."""

    def _create_node_with_resources_and_labels(self, *given: Any) -> None:
        with self.lock:
            os.environ["SHOAL_CACHE"] = str(Path(os.environ[CACHES], f"node-{self._next_node_id}"))
            super()._create_node_with_resources_and_labels(*given)
