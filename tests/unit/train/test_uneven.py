"""A number of workers that does not divide the micro-batches of an update: the same update, in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from shoal.data.batches import Batch
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.model.net import Net
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.step import count, filled, update

PARTS = 8
CPU = torch.device("cpu")


class Still(torch.optim.SGD):
    """Writes nothing, so that gradients can be looked at."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pass


def pairs(path: Path) -> Path:
    texts = ("It is deep.", "It is cold and wide.", "It is far away.")
    rows = [{"prompt": f"What is sea {n}?", "chosen": texts[n % 3], "rejected": texts[(n + 1) % 3]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan(data: Path, world: int) -> FitPlan:
    one = pretrain_plan("test", str(data), "unused", steps=4, batch_tokens=16 * 96, accumulate=PARTS)
    return one.at_world(1, world)


def of_world(data: Path, shards: Path, world: int, dpo: float) -> tuple[dict[str, torch.Tensor], float, int]:
    """Gradients of one update by `world` ranks together, its loss, and how many blank micro-batches they went through."""
    todo = plan(data, world)
    tokenizer = shard_tokenizer(shards)
    if dpo:
        todo = dataclasses.replace(todo, init="base", train=dataclasses.replace(todo.train, dpo=dpo))
    feeds = [open_feed(todo, tokenizer, DEFAULT_TEMPLATE, Ranks(rank, world, CPU)) for rank in range(world)]
    batches: list[list[Batch]] = [feed.at(1) for feed in feeds]
    assert len({len(each) for each in batches}) == 1, "as many on every rank"
    together = [batch for each in batches for batch in each]
    net = Net(todo.model).init_(0).double()
    teacher = Net(todo.model).init_(1).double() if dpo else None
    model = LossModel(net, teacher=teacher)
    still = Still([p for p in model.parameters() if p.requires_grad], lr=0.0)
    weights = (0.2, 0.3, 0.5)
    alone = Ranks(0, 1, CPU)
    report = update(model, still, together, config=todo.train, weights=weights, rate=0.0, ranks=alone)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, report.loss, sum(not filled(batch).any() for batch in together)


@pytest.mark.parametrize("worlds", [(3, 7), pytest.param((5, 6, 8), marks=pytest.mark.drill)], ids=["few", "more"])
@pytest.mark.parametrize(
    "kind",
    [
        "chats",
        *(pytest.param(kind, marks=pytest.mark.drill) for kind in ("shards", "pairs")),
    ],
)
def test_any_world_makes_the_same_update(
    shards: Path, chats: Path, tmp_path: Path, kind: str, worlds: tuple[int, ...]
) -> None:
    """Gradients and loss of 1 rank with 8 micro-batches are those of 3, 5, 6 and 7 with some blank ones, and of 8."""
    data = {"shards": shards, "chats": chats, "pairs": pairs(tmp_path / "pairs.jsonl")}[kind]
    dpo = 0.3 if kind == "pairs" else 0.0
    want, loss, blanks = of_world(data, shards, 1, dpo)
    assert blanks == 0 and math.isfinite(loss) and any(grad.abs().max() > 1e-3 for grad in want.values())
    for world in worlds:
        found, its_loss, blanks = of_world(data, shards, world, dpo)
        if kind == "shards":  # 16 rows, of which a rank takes two at a time
            full = sum(-(-len(range(rank, 16, world)) // 2) for rank in range(world))
            assert blanks == world * -(-PARTS // world) - full
        else:
            assert blanks == -PARTS % world
        assert its_loss == pytest.approx(loss, rel=1e-12)
        for name, grad in want.items():
            assert torch.allclose(found[name], grad, rtol=1e-9, atol=1e-13), (world, name)


def test_counts_leave_blanks_out(shards: Path) -> None:
    """What losses are divided by is the same, and rows of a blank micro-batch are none."""
    tokenizer = shard_tokenizer(shards)

    def counts(world: int) -> object:
        ranks = [Ranks(rank, world, CPU) for rank in range(world)]
        batches = [b for each in ranks for b in open_feed(plan(shards, world), tokenizer, "", each).at(0)]
        return count(batches, Ranks(0, 1, CPU))

    assert counts(1) == counts(3) == counts(5)
