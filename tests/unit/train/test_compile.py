"""`--set compile=true`: each layer by torch.compile, here on the CPU by its C++ compiler."""

import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from shoal.errors import ConfigError
from shoal.model.net import Net
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loss import LossModel
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import pretrain_plan
from shoal.train.refusal import check
from shoal.train.step import update


def losses(shards: Path, alone: Ranks, **how: bool) -> list[float]:
    """Of three updates on one batch: another shape would be compiled once more."""
    plan = pretrain_plan("test", str(shards), "unused", steps=3, accumulate=4)
    model = LossModel(Net(plan.model).init_(0))
    shard_(model, alone, **how)
    optimizer, batches = (
        make_optimizer(model, plan.train),
        open_feed(plan, shard_tokenizer(shards), "", alone).at(0)[:1],
    )
    given = {"config": plan.train, "weights": (0.2, 0.3, 0.5), "rate": 1e-2, "ranks": alone}
    return [update(model, optimizer, batches, **given).loss for _ in range(3)]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_train_alike_and_in_one_graph_each(
    shards: Path, alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("shoal.model.attention.STRIP", 96)  # a row in one strip: half as many kernels to compile
    torch._dynamo.reset()
    counters.clear()
    want = losses(shards, alone)
    for recompute in (False, True):
        found = losses(shards, alone, compiled=True, recompute=recompute)
        assert found == pytest.approx(want, rel=1e-5) and want[-1] < want[0]
        assert found != want, "to the bit only where nothing was compiled"
    assert not counters["graph_break"], "where a graph breaks, little is left to compile"
    assert counters["stats"]["unique_graphs"] == 1, "layers of one shape are compiled once"


def test_a_machine_without_a_compiler_is_told_before_training(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.train.refusal.COMPILER", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"compile: got 'no no-such-compiler.*leave it out"):
        check(pretrain_plan("test", str(shards), "run", steps=1, compile=True), 1)
