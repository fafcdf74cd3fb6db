"""FSDP2 over two gloo processes, without Ray: the same run as alone, gathered once an update or at every use."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shoal.train import log, parallel
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan


def plan(shards: Path, run: Path, accumulate: int) -> FitPlan:
    """With an evaluation and a checkpoint between updates, which must leave nothing gathered behind."""
    more = {"steps": 4, "eval_every": 1, "eval_rows": 4, "checkpoint_minutes": 0.0, "accumulate": accumulate}
    return pretrain_plan("test", str(shards), str(run), **more)


def train_rank(rank: int, shards: Path, run: Path, stays_gathered: int) -> None:
    parallel.STAYS_GATHERED = stays_gathered
    dist.init_process_group("gloo", init_method=f"file://{run}.store", rank=rank, world_size=2)
    fit(plan(shards, run, accumulate=2))
    dist.destroy_process_group()


def history(run: Path, kind: str, key: str) -> list:
    return [record[key] for record in log.read(run) if record["kind"] == kind]


@pytest.fixture(scope="module")
def alone_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    fit(plan(shards, run, accumulate=4))
    return run


@pytest.mark.parametrize("stays_gathered", [0, 2**28], ids=["gathered at each use", "gathered once an update"])
def test_two_ranks_train_as_one(shards: Path, tmp_path: Path, alone_run: Path, stays_gathered: int) -> None:
    run = tmp_path / "run"
    mp.spawn(train_rank, (shards, run, stays_gathered), nprocs=2)
    for key in ("loss", "grad_norm"):
        assert history(run, "step", key) == pytest.approx(history(alone_run, "step", key), rel=1e-5)
    for mine, theirs in zip(history(run, "eval", "bpb"), history(alone_run, "eval", "bpb"), strict=True):
        for modality in theirs:
            assert mine[modality] == pytest.approx(theirs[modality], rel=1e-4)


def test_a_world_of_one_needs_no_process_group() -> None:
    ranks = parallel.Ranks.join()
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.agree("x") == "x" and torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
