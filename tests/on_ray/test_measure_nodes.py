"""A model in S3 is rounded and measured on nodes which share no folder, raylets of this machine, two of which are lost."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster

from shoal import Model, presets
from shoal.data import models
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net
from shoal.stages.training import Quantize
from tests.corpus import write_corpus
from tests.on_ray.nodes import lose, node_that_asks, nodes
from tests.s3 import Service, service, upload

# A node takes 15 to 25 s to be missed and its work to begin elsewhere, on cores that others use.
pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]
NODES = 3  # beside the head, of one CPU each
FISH, INT8 = "s3://ocean/fish", "s3://ocean/fish-int8"
# Of these requests for the weights, one after the other, the answer is held back until the node that asked is lost: when what
# was rounded is put, and when it is fetched to be measured.
WEIGHTS, LOST = r"/fish-int8/[0-9a-f]{16}/model\.safetensors$", ("PUT", "GET")


class Lose:
    """Ends the node that asks for what is next in `LOST`."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.left, self._alone = cluster, list(LOST), threading.Lock()

    def __call__(self, method: str, path: str, port: int) -> None:
        with self._alone:
            if method not in self.left[:1] or not re.search(WEIGHTS, path.partition("?")[0]):
                return
            node = node_that_asks(self.cluster, port)
            if node is not None:
                self.left.pop(0)
                lose(self.cluster, node)


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As each worker has: sums are added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_node_is_lost_as_a_model_is_rounded_and_one_as_it_is_measured_and_no_bit_of_it(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets.get("test")
    data = write_corpus(tmp_path / "data", preset, documents=20, heldout=40)
    calm, base = tmp_path / "calm", tmp_path / "fish"
    Model(preset.model, Net(preset.model).init_(0), Tokenizer.load(data / "tokenizer.json")).save(base)
    Quantize(model=str(base), out=str(calm), heldout=str(data), train=False).run()
    upload(data, "s3://ocean/data", s3.inside)
    models.put(base, FISH, s3.inside)
    with nodes(NODES, tmp_path / "caches") as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        s3.before = lose_ = Lose(cluster)
        Quantize(model=FISH, out=INT8, heldout="s3://ocean/data", train=False).run()
        assert not lose_.left and len(cluster.worker_nodes) == NODES - len(LOST)
        made = models.here(INT8, service=s3.inside)  # into this process's cache, which is gone with the nodes
    used = {path.parts[-3] for path in tmp_path.glob("caches/node-*/models/*") if path.is_dir()}
    assert len(used) == NODES, "each node had a part"
    hit, wanted = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (made, calm))
    assert "router.json" in wanted and hit == wanted
