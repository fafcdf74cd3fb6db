"""A corpus from S3 to S3 on nodes that share no folder: raylets of this machine with a cache of their own each. Two die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from shoal import presets
from shoal.data import lease
from shoal.data.documents import SourceSpec
from shoal.data.place import Bucket
from shoal.on_ray.prepare import prepare
from tests.on_ray.nodes import lose, nodes
from tests.s3 import Service, service

pytestmark = [pytest.mark.ray, pytest.mark.drill]

ASK: dict[str, Any] = {"mix": {"text": 0.6, "code": 0.4}, "preset": presets.get("test"), "seed": 5}
NODES = 4  # beside the head, of one CPU each
URI = "s3://ocean/made"


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        for n in range(60):
            text = f"Log {n}: the boat {n * 7} left at {n % 24}, wind {n % 12}, and came home.\n" * 4
            code = f'def f{n}(a):\n    """Add {n} to it."""\n    return a + {n}\n\n\nprint(f{n}(1))\n'
            for name, body in {"md": text, "py": code}.items():
                made.client.put_object(Bucket="ocean", Key=f"raw/{n}.{name}", Body=body.encode())
        yield made


@pytest.fixture
def cluster(s3: Service, tmp_path: Path) -> Iterator[Cluster]:
    with nodes(NODES, tmp_path) as made:
        yield made


@pytest.mark.smoke
def test_a_node_is_lost_in_each_pass_and_the_corpus_is_that_of_a_folder(
    s3: Service, cluster: Cluster, tmp_path: Path
) -> None:
    sources = [SourceSpec("raw", "s3://ocean/raw", "CC0-1.0")]
    lost, used = [], set()

    def told(what: str, done: int, total: int) -> None:
        used.update(path.name for path in tmp_path.glob("node-*"))
        if what in ("read and clean", "encode and pack") and done > total / 4 and what not in lost:
            lost.append(what)
            lose(cluster, cluster.worker_nodes.copy().pop())

    report = prepare(URI, sources=sources, **ASK, on_progress=told)
    assert lost == ["read and clean", "encode and pack"] and len(used) > 1, (
        "several nodes, of which two died, had a part"
    )
    prepare(tmp_path / "folder", sources=sources, **ASK)
    bucket = Bucket(URI, s3.inside)
    made = {name: bucket.text(name) for name, _ in bucket.sizes() if not name.startswith("report.")}
    wanted = {
        path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir() if not path.name.startswith("report.")
    }
    assert made == wanted and bucket.tag(lease.NAME) is None
    assert prepare(URI, sources=sources, **ASK) == report
