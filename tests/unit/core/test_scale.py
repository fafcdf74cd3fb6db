"""The arithmetic of sizes against what is measured: within a fifth, and what can be exact is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from shoal import presets, scale
from shoal.cli import main
from shoal.data.needs import of_a_rank
from shoal.data.shards import open_index
from shoal.errors import ConfigError
from shoal.model.cost import kv_bytes_stored, parameters
from shoal.model.net import Net
from shoal.train.checkpoint import CheckpointStore
from shoal.train.loss import LossModel
from shoal.train.needs import checkpoint_bytes, memory_parts
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.recompute import WAYS
from shoal.train.state import TrainState
from tests.corpus import write_corpus

ALONE = Ranks(0, 1, torch.device("cpu"))
DOCS = Path(__file__).parents[3] / "docs"


def made(plan: FitPlan) -> tuple[LossModel, torch.optim.Optimizer]:
    model = LossModel(Net(plan.model).init_(0))
    shard_(model, ALONE, recompute=plan.recompute)
    return model, make_optimizer(model, plan.train)


def forward(plan: FitPlan, model: nn.Module, rows: int) -> torch.Tensor:
    """A micro-batch of text, forward: what is minimised."""
    c = plan.model
    tokens = torch.randint(10, c.vocab, (rows, c.train_length), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    patches, grid = torch.zeros(0, c.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64)
    sums = model(tokens, targets, torch.zeros_like(tokens), patches, grid)
    return sums.ce.sum()


def planned(preset: str, rows: int, **more: object) -> FitPlan:
    """One micro-batch of so many rows."""
    tokens = rows * presets.get(preset).model.train_length
    return pretrain_plan(preset, "data", "run", **{"steps": 1, "batch_tokens": tokens, "accumulate": 1, **more})


@pytest.mark.parametrize(("preset", "rows"), [("test", 4), ("tiny", 2), ("mini", 1)])
def test_what_backward_keeps_is_what_is_said(preset: str, rows: int) -> None:
    """Bytes of all that autograd holds after a forward pass, each storage once, parameters left out."""
    plan = planned(preset, rows)
    model, _ = made(plan)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss = forward(plan, model, rows)
    assert loss.requires_grad
    said = memory_parts(plan, 1)
    measured = sum(storage.nbytes() for storage in held.values())
    assert said["activations"] + said["logits"] == pytest.approx(measured, rel=0.2)


def test_weights_gradients_and_moments_are_to_the_byte() -> None:
    plan = planned("tiny", 1)
    model, optimizer = made(plan)
    forward(plan, model, 1).backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    said = memory_parts(plan, 1)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "moments": sum(value.nbytes for value in moments),
    }
    assert {part: said[part] for part in measured} == measured


@pytest.mark.parametrize("preset", ["tiny", "mini"])
def test_a_checkpoint_is_as_large_as_is_said(preset: str, tmp_path: Path) -> None:
    plan = planned(preset, 1)
    model, optimizer = made(plan)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    path = CheckpointStore(tmp_path).save(model, optimizer, TrainState(step=1), ALONE)
    assert checkpoint_bytes(plan) == pytest.approx(sum(file.stat().st_size for file in path.iterdir()), rel=0.02)


def test_shards_are_as_large_as_is_said(tmp_path: Path) -> None:
    """Bytes of a token in Arrow files of packed rows of text."""
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=400, heldout=2)
    index = open_index(data)
    size = sum(file.stat().st_size for file in data.glob("*train*text*.arrow"))
    tokens = index.total("rows", "train", "text") * index.length
    said = scale.corpus(tokens * scale.BYTES_A_TOKEN, "test")
    assert said.stored == pytest.approx(size, rel=0.2)
    assert said.tokens == tokens and said.rows == index.total("rows", "train", "text")


def test_10_tb_are_prepared_by_a_head_of_8_gb_unless_in_small_files() -> None:
    """As the clusters' files give it."""
    memory = {file: sum(scale.corpus(10e12, "7b", file).memory.values()) for file in scale.SOURCE_FILES}
    assert memory[1e9] < memory[32e6] < 2e9 and memory[1e6] > 4e9
    assert sum(scale.corpus(1e12, "7b").memory.values()) < memory[1e9]


def test_what_the_page_says_of_requests_and_of_the_order_of_rows() -> None:
    found = [scale.corpus(10e12, "7b", file).requests for file in scale.SOURCE_FILES]
    page = " ".join((DOCS / "scale.md").read_text().split())
    assert {f"{count / 1e6:.1f}" for count in found} == {"3.7"} and "of 10 TB 3.7 million." in page
    orders = [of_a_rank(rows, 0)["order"] / 1e6 for rows in (2**20 + 1, 2**21, scale.corpus(10e12, "7b").rows)]
    assert [round(order) for order in orders] == [57, 113, 64]
    assert "of the rows' order 57 to 113 MB, however many there are, here 64" in page


def test_what_gpus_exchange_follows_the_definition() -> None:
    """By hand, for 4 GPUs in 2 groups: each gathers the half it lacks, twice for each micro-batch, in 2 bytes; sums up the
    gradients of the half that it keeps; and adds that half to the other group's."""
    plan = dataclasses.replace(scale.plan_at("1b", 4), replicas=2)
    total = parameters(plan.model).total
    by_hand = 2 * plan.train.accumulate * 2 * total / 2 + 4 * total / 2 + 2 * (4 * total / 2) / 2
    assert scale.exchanged(plan, 4) == pytest.approx(by_hand)
    assert scale.exchanged(dataclasses.replace(plan, replicas=1), 1) == 0


def test_tensor_parallelism_does_not_pay_up_to_7b(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, and against what FSDP2 exchanges (decision 0015): what would be added cannot hide, what would be spared does."""
    of = scale.gpu_named("h100")
    found = scale.in_tensors("7b", 512, 8, of, 0.4)
    tokens = 8_388_608 * 8 / 512
    assert found.received == pytest.approx(32 * 6 * tokens * 4096 * 2 * 1.75)
    assert found.seconds == pytest.approx(found.received / 450e9)
    for world in (8, 64, 512):
        row, cut = scale.training("7b", world, of, 0.4, 2e9), scale.in_tensors("7b", world, 8, of, 0.4)
        assert row.fits and row.exchange < row.compute, "all of it hides behind products"
        assert cut.seconds > 0.2 * row.compute and cut.spared < row.exchange
        assert cut.hidden_from < scale.plan_at("7b", world).model.train_length


def test_no_more_is_computed_again_than_memory_asks_for() -> None:
    of = scale.gpu_named("h100")
    for preset, world in (("1b", 8), ("7b", 8), ("7b", 512)):
        found = scale.training(preset, world, of, 0.1, 2e9)
        rows = [scale.training(preset, world, of, 0.1, 2e9, [way]) for way in WAYS]
        memory, compute = [sum(row.memory.values()) for row in rows], [row.compute for row in rows]
        assert memory == sorted(memory, reverse=True) and compute == sorted(compute)
        assert compute[1] < 1.06 * compute[0] < compute[2] < 1.34 * compute[0]
        fit = [row for row, need in zip(rows, memory, strict=True) if need <= scale.ROOM * of.memory]
        assert found == (fit or rows[-1:])[0]


@pytest.mark.parametrize("world", [8, 64, 512])
@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_more_gpus_need_less_memory_and_train_more_tokens(preset: str, world: int) -> None:
    of = scale.gpu_named("h100")
    assert all(scale.training(preset, size, of, 0.1, 2e9).fits for size in (world, 2 * world))
    one, more = (scale.training(preset, size, of, 0.1, 2e9, [True]) for size in (world, 2 * world))
    assert one.fits and more.fits
    assert sum(more.memory.values()) <= sum(one.memory.values()) and one.tokens_a_day < more.tokens_a_day
    assert one.checkpoint_bytes == more.checkpoint_bytes > 12 * 1e9


def test_a_plan_on_paper_is_one_that_can_be_followed() -> None:
    for preset in ("1b", "7b"):
        for world in (1, 8, 64, 120, 512):
            plan = scale.plan_at(preset, world)
            assert plan.micro_rows(world) >= 1 and not world % plan.replicas


def test_streams_fill_replicas_by_their_keys_and_values() -> None:
    found = scale.serving("7b", 10_000, 4096, scale.gpu_named("h100"), tokens_a_second=5.0, replica_tokens=1800.0)
    each = kv_bytes_stored(presets.get("7b").model, 4096, dtype=torch.float32)
    weights = 4 * parameters(presets.get("7b").model).total
    assert found.kv_bytes == each and weights + found.a_replica * each <= 72e9 < weights + (found.a_replica + 1) * each
    assert (found.replicas_for_memory - 1) * found.a_replica < 10_000 <= found.replicas_for_memory * found.a_replica
    assert (found.replicas_for_tokens, found.gateways) == (28, 14)
    with pytest.raises(ConfigError, match="7b with 10,000,000 tokens on one h100: got"):
        scale.serving("7b", 1, 10_000_000, scale.gpu_named("h100"), tokens_a_second=1.0, replica_tokens=1.0)


def test_a_slow_network_does_not_hide_behind_products() -> None:
    """What the page says of 100 Gbit/s a node of 8 GPUs."""
    slow = dataclasses.replace(scale.gpu_named("h100"), network=100e9 / 8 / 8)
    found = scale.training("7b", 64, slow, 0.1, 2e9)
    assert round(found.exchange) == 89 and found.exchange > 2 * found.compute


@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_as_many_streams_fit_where_both_memory_and_numbers_are_halved(preset: str) -> None:
    """What the page says of serve_configs/cluster.yaml."""
    of, model = scale.gpu_named("h100"), presets.get(preset).model
    found = scale.serving(preset, 1, 4096, of, tokens_a_second=5.0, replica_tokens=1.0)
    config = yaml.safe_load((DOCS.parent / "serve_configs" / "cluster.yaml").read_text())
    (given,) = (application["args"] for application in config["applications"])
    assert given["dtype"] == "auto"
    left = given["gpu_share"] * of.memory - 2 * parameters(model).total
    held = left // kv_bytes_stored(model, 4096, dtype=torch.bfloat16)
    assert held == pytest.approx(found.a_replica, rel=0.02)


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/scale.md is written by hand around tables that the functions make."""
    assert main(["scale"]) == 0
    printed = [table.strip() for table in capsys.readouterr().out.split("\n\n")]
    page = (DOCS / "scale.md").read_text()
    assert len(printed) == 5 and all(table in page for table in printed)
    assert main(["scale", "--preset", "1b", "--gpus", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["preset"], row["gpus"]) for row in found["training"]] == [("1b", 16)]
    assert [row["file"] for row in found["corpus"]] == list(scale.SOURCE_FILES)


@pytest.mark.parametrize("wrong", [["--gpu", "h1000"], ["--utilisation", "0"], ["--preset", "8b"], ["--gpus", "0"]])
def test_bad_sizes_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", *wrong]) in (1, 2)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
