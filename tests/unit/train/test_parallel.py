"""Many ranks over gloo, without Ray: the same run as alone, whatever their number, and nobody waits for ever when one is odd.

Processes are started once and play all scenes, since starting them takes longer than what they do: two play those of two, and
eight those of more, which are drills, with most of those of two (`DRILLS`).
"""

from __future__ import annotations

import datetime
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from shoal import presets, scale
from shoal.data.batches import Batch, PretrainBatches
from shoal.errors import CheckpointError, DataError, ShoalError
from shoal.model import checkpoint
from shoal.train import fresh, log, loop, parallel
from shoal.train.checkpoint import CheckpointStore
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loop import fit
from shoal.train.loss import LossModel
from shoal.train.manifest import damage
from shoal.train.optim import left_out, make_optimizer, rotates
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan
from shoal.train.snapshot import Snapshot
from shoal.train.start import whole_tensors
from shoal.train.step import count, update

pytestmark = pytest.mark.timeout(400)  # eight processes on what may be two busy cores
PROCESSES = {"two": 2, "more": 8}
# of two, beside those of more
DRILLS = (
    "long-2", "selective", "once", "less-memory", "int8", "muon", "bf16", "lora-2", "exchanged", "full-model",
    "full-disk", "slow",
)  # fmt: skip
# What an update may leave out or add: all ranks must leave out and add the same, or they wait for each other for ever
ODD = {"layer_dropout": 0.9, "rotate_exits": "on", "distill": 0.5, "exit_warmup": 0.0, "seed": 2}
INT8 = {"quantize": True, "distill": 30.0, "warmup": 0.3}  # with a teacher; rounding begins after the first update
LONG = {"steps": 50, "batch_tokens": 384, "eval_every": 0, "checkpoint_minutes": 1.0}
MOVED = {"steps": 12, "eval_every": 0}  # 2 ranks to step 4, 1 to step 8, 4 to the end
# name: world, STAYS_GATHERED, fields of the plan
WORLD_OF_RUN = {
    "each-use": (2, 0, {}),
    "once": (2, 2**28, {}),
    "odd": (2, 0, ODD),
    "long-2": (2, 2**28, LONG),
    "long-4": (4, 2**28, LONG),
    "hsdp": (4, 0, {"replicas": 2}),
    "less-memory": (2, 0, {"recompute": True}),
    "selective": (2, 0, {"recompute": "selective"}),
    "muon": (2, 0, {"optimizer": "muon"}),
    "uneven": (3, 0, {"parts": 4, "accumulate": 2}),
    "int8": (2, 0, INT8),
}

LORA = {"lora_rank": 4}
# name, world, fields
TUNED = [
    ("chats", 2, {}),
    ("chats", 3, {"parts": 8, "accumulate": 3}),
    ("chats", 8, {}),
    ("lora", 2, LORA),
    ("lora", 4, LORA),
]


def plan(shards: Path, run: Path, world: int = 1, **more: Any) -> FitPlan:
    """With an evaluation and checkpoints between updates, which must leave nothing gathered behind."""
    values = {"steps": 4, "eval_every": 2, "eval_rows": 4, "checkpoint_minutes": 0.0, "accumulate": 4 // world, **more}
    return pretrain_plan("test", str(shards), str(run), **values)


def tune(chats: Path, model: Path, run: Path, world: int, **more: Any) -> FitPlan:
    """Chats of very different lengths, 8 micro-batches in all."""
    values = {"steps": 3, "batch_tokens": 768, "eval_every": 0, "accumulate": 8 // world, **more}
    return finetune_plan(str(model), str(chats), str(run), **values)


class Interrupted(Exception):
    pass


def stop_at(step: int) -> log.Report:
    """Raises on every rank when the checkpoint of `step` is written."""

    def report(record: log.Record) -> None:
        if record["kind"] == "checkpoint" and record["step"] == step:
            raise Interrupted

    return report


# ---- the scenes; each is played by the first `world` processes, in a process group of their own


def play(rank: int, who: str, root: Path, shards: Path, chats: Path, model: Path) -> None:
    torch.set_num_threads(1)

    def scene(name: str, world: int, act: Callable[[], object]) -> None:
        # `moved` goes from two, over one, to four
        many = world > PROCESSES["two"] or name.startswith("moved") or name in DRILLS
        if rank < world and many == (who == "more"):
            # who plays in few scenes waits for those that play in all
            wait = datetime.timedelta(seconds=300)
            meet = f"file://{root}/{name}.store"
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=wait)
            act()
            dist.destroy_process_group()

    for name, (world, gathered, more) in WORLD_OF_RUN.items():
        parallel.STAYS_GATHERED = gathered
        scene(name, world, lambda w=world, n=name, m=more: fit(plan(shards, root / n, w, **m)))  # type: ignore[misc]
    parallel.STAYS_GATHERED = 2**28
    fp32, parallel.mixed_precision = parallel.mixed_precision, lambda *_, **__: as_on_a_gpu(fp32)
    scene("bf16", 2, lambda: fit(plan(shards, root / "bf16", 2)))
    parallel.mixed_precision = fp32
    for world, end in ((2, 4), (1, 8), (4, 12)):
        scene(f"moved-{world}", world, lambda w=world, e=end: move(shards, root / "moved", w, e))  # type: ignore[misc]
    for name, world, more in TUNED:
        run = root / f"{name}-{world}"
        scene(run.name, world, lambda w=world, r=run, m=more: fit(tune(chats, model, r, w, **m)))  # type: ignore[misc]
    scene("not-finite", 2, lambda: one_rank_is_not_finite(shards, rank))
    scene("sync", 2, lambda: gradients_are_exchanged_once(shards, rank))
    scene("exchanged", 2, lambda: as_much_is_exchanged_as_is_said(shards, rank))
    for world, replicas in ((3, 1), (4, 2)):
        scene(f"fresh-{world}", world, lambda r=replicas: fresh_weights_are_those_of_one_process(r))  # type: ignore[misc]
    scene("full-model", 2, lambda: the_disk_is_full_for_the_model(shards, root))
    scene("depth", 2, lambda: ranks_differ_in_depth(shards, rank))
    scene("alone-in-error", 2, lambda: an_error_of_one_rank_is_every_ranks(shards, root, rank))
    scene("one-row", 2, lambda: rows_that_one_rank_cannot_read_end_the_run_on_all(shards, root, rank))
    scene("slow", 2, lambda: the_others_exchange_while_one_is_slow(shards, root, rank))
    scene("full-disk", 2, lambda: fit(plan(shards, root / "full-disk", 2, eval_every=0), fill_the_disk()))


def move(shards: Path, run: Path, world: int, end: int) -> None:
    try:
        fit(plan(shards, run, world, **MOVED), stop_at(end))
    except Interrupted:
        return
    assert end == MOVED["steps"]


def prepared(shards: Path, rank: int) -> tuple[FitPlan, LossModel, torch.optim.Optimizer, list, parallel.Ranks]:
    ranks = parallel.Ranks.join()
    todo = plan(shards, Path("unused"), 2)
    from shoal.model.net import Net

    model = LossModel(Net(todo.model).init_(0))
    parallel.shard_(model, ranks)
    return (
        todo,
        model,
        make_optimizer(model, todo.train),
        open_feed(todo, shard_tokenizer(shards), "", ranks).at(0),
        ranks,
    )


def fresh_weights_are_those_of_one_process(replicas: int) -> None:
    """To the bit, norms and gates too, where shards are uneven and where groups hold the same; none has the whole before."""
    from shoal.model.net import Net

    config, ranks = presets.get("test").model, parallel.Ranks.join()
    net = fresh.meta(config)
    assert all(parameter.is_meta == (parameter.dim() > 1) for parameter in net.parameters())
    model = LossModel(net)
    parallel.shard_(model, ranks, replicas=replicas)
    fresh.fill_(model, net, 7, ranks.device)
    wanted = Net(config).init_(7).state_dict()
    found = dict(whole_tensors(model, ranks))
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def the_disk_is_full_for_the_model(shards: Path, root: Path) -> None:
    """Rank 0 cannot write it, in the middle of what all gather: both are told, and nobody waits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(record: log.Record) -> None:
        if record["kind"] == "checkpoint" and record["step"] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 2**10, before[1]))

    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*full-model/model: got"):
            fit(plan(shards, root / "full-model", 2, eval_every=0, steps=1), report)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (root / "full-model" / "model").exists()


def one_rank_is_not_finite(shards: Path, rank: int) -> None:
    """Rank 1's gradients are not numbers, though every loss is; both ranks must refuse to write."""
    todo, model, optimizer, batches, ranks = prepared(shards, rank)
    before = [p.to_local().clone() for p in model.parameters()]  # type: ignore[attr-defined]
    if rank == 1:
        model.register_forward_hook(lambda _, __, sums: sums.ce.register_hook(lambda grad: grad * torch.nan) and None)
    with pytest.raises(ShoalError, match="gradient norm is not finite"):
        update(model, optimizer, batches, config=todo.train, weights=(0.2, 0.3, 0.5), rate=1e-3, ranks=ranks)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), old)  # type: ignore[attr-defined]
    assert not optimizer.state


def as_on_a_gpu(policy: Callable[[torch.device], MixedPrecisionPolicy]) -> MixedPrecisionPolicy:
    return policy(torch.device("cuda"))


class Scattered(TorchDispatchMode):
    """Counts exchanges of gradients: each sums them up and leaves every rank its shard."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def gradients_are_exchanged_once(shards: Path, rank: int) -> None:
    """Of two micro-batches the first keeps its gradients here: each layer group and the root exchange them once an update."""
    todo, model, optimizer, batches, ranks = prepared(shards, rank)
    with Scattered() as seen:
        update(model, optimizer, batches, config=todo.train, weights=(0.2, 0.3, 0.5), rate=1e-3, ranks=ranks)
    assert len(batches) == 2 and seen.count == len(model.net.groups) + 1


class Received(TorchDispatchMode):
    """Bytes that this rank of two receives: half of all that is gathered, and half of what is scattered."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather_base" in str(func) or "reduce_scatter_base" in str(func):
            self.total += max(args[0].nbytes, args[1].nbytes) // 2
        return func(*args, **(kwargs or {}))


def as_much_is_exchanged_as_is_said(shards: Path, rank: int) -> None:
    """By FSDP, of a model that is gathered at each use and of one that is gathered once."""
    for gathered in (0, 2**28):
        parallel.STAYS_GATHERED = scale.STAYS_GATHERED = gathered
        todo, model, optimizer, batches, ranks = prepared(shards, rank)
        with Received() as seen:
            update(model, optimizer, batches, config=todo.train, weights=(0.2, 0.3, 0.5), rate=1e-3, ranks=ranks)
        assert scale.exchanged(todo, 2, low=4) == pytest.approx(seen.total, rel=0.2), gathered


def ranks_differ_in_depth(shards: Path, rank: int) -> None:
    """Cannot happen, since depth follows from seed and step; if it did, FSDP would hang to its timeout."""
    todo, model, optimizer, batches, ranks = prepared(shards, rank)
    with pytest.raises(ShoalError, match="different layers or exits"):
        weights, skip = ((0.2, 0.3, 0.5), [2]) if rank else ((0.2, 0.3, 0.5), [])
        update(model, optimizer, batches, config=todo.train, weights=weights, rate=1e-3, ranks=ranks, skip=skip)
    with pytest.raises(DataError, match="micro-batches differ"):
        count(batches[rank:], ranks)


def an_error_of_one_rank_is_every_ranks(shards: Path, root: Path, rank: int) -> None:
    """Rank 1 finds no data; rank 0, which does, would wait for it at the first exchange."""
    with pytest.raises(DataError, match="nowhere"):
        fit(plan(shards if rank == 0 else root / "nowhere", root / "alone-in-error", 2))


def rows_that_one_rank_cannot_read_end_the_run_on_all(shards: Path, root: Path, rank: int) -> None:
    """In the middle of a run: rank 0, which reads others, would wait for rank 1, or hear of a broken connection."""

    def read(self: PretrainBatches, step: int) -> list[Batch]:
        if rank == 1 and step == 2:
            raise DataError("row 7 is not what its index says")
        return at(self, step)

    with pytest.MonkeyPatch.context() as patch:
        at = PretrainBatches.at
        patch.setattr(PretrainBatches, "at", read)
        with pytest.raises(DataError, match="row 7 is not what its index says"):
            fit(plan(shards, root / "one-row", 2, eval_every=0))


def the_others_exchange_while_one_is_slow(shards: Path, root: Path, rank: int) -> None:
    """Rank 1 as it fetches what it reads, and as it writes its share of two checkpoints; rank 0 as it looks for the newest of
    these, and with the model that it has written. Each goes on once it has seen three exchanges: one that waited for it would
    end with the collectives' timeout."""
    exchanges, seen, sum_ = 0, list[bool](), parallel.Ranks.sum

    def counted(self: parallel.Ranks, values: torch.Tensor) -> torch.Tensor:
        nonlocal exchanges
        exchanges += 1
        return sum_(self, values)

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*args: Any, **how: Any) -> Any:
            found, enough, end = work(*args, **how), exchanges + 3, time.monotonic() + 60
            while exchanges < enough and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(exchanges >= enough)
            return found

        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.Ranks, "sum", counted)
        for module in ("parallel", "checkpoint"):
            patch.setattr(f"shoal.train.{module}.PULSE", 0.01)
        if rank == 1:
            patch.setattr(loop, "located", slow(loop.located))
            patch.setattr(Snapshot, "_work", slow(Snapshot._work))
        else:
            patch.setattr(CheckpointStore, "_newest", slow(CheckpointStore._newest))
            patch.setattr(CheckpointStore, "_problem", slow(CheckpointStore._problem))
            patch.setattr(checkpoint, "save", slow(checkpoint.save))
        fit(plan(shards, root / "slow", 2, eval_every=0, steps=2))
        assert seen == [True] * (3 if rank else 2)
        CheckpointStore(root / "slow").fetched(2, parallel.Ranks.join())
        assert seen == [True] * 3
        ranks = parallel.Ranks.join()
        with pytest.raises(DataError, match="nothing there"), ranks.alike(), ranks.at_leisure():
            if rank:
                raise DataError("nothing there")


def fill_the_disk() -> log.Report:
    """While steps 2 and 3 are saved rank 0 can write no file above 200 KiB, which its half of a checkpoint is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(record: log.Record) -> None:
        if record["kind"] == "step":
            limit = 200 * 2**10 if record["step"] in (2, 3) else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    return report


# ---- what came of them


@pytest.fixture(scope="module")
def root(shards: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with those of one process, whose names are those with ``alone``."""
    root = tmp_path_factory.mktemp("ranks")
    model = Path(fit(plan(shards, root / "alone", steps=4)).out)
    fit(plan(shards, root / "alone-odd", **ODD))
    fit(tune(chats, model, root / "alone-chats", 1))
    mp.set_forkserver_preload([__name__, "torch._dynamo"])  # torch is imported once, not by each
    return root


@pytest.fixture(scope="module")
def two(root: Path, shards: Path, chats: Path) -> Path:
    """`root` with the runs of two processes too."""
    return by("two", root, shards, chats)


@pytest.fixture(scope="module")
def more(root: Path, shards: Path, chats: Path) -> Path:
    """`root` with the runs of more processes too, and those of a single process that they alone are held to."""
    for name, of in {"moved": MOVED, "long": LONG, "int8": INT8, "muon": {"optimizer": "muon"}}.items():
        fit(plan(shards, root / f"alone-{name}", **of))
    fit(tune(chats, root / "alone" / "model", root / "alone-lora", 1, **LORA))
    return by("more", root, shards, chats)


def by(who: str, root: Path, shards: Path, chats: Path) -> Path:
    given = (who, root, shards, chats, root / "alone" / "model")
    mp.start_processes(play, given, nprocs=PROCESSES[who], start_method="forkserver")
    return root


def history(run: Path, kind: str, key: str) -> list:
    return [record[key] for record in log.read(run) if record["kind"] == kind]


def trained_as_one(mine: Path, alone: Path) -> None:
    # an activation near the middle of two integers may go to either, from the second update on, and moves gradients more
    rounds, alike = (1e-3, 1) if mine.name == "int8" else (1e-5, 2)
    for key, far in (("loss", rounds), ("grad_norm", 2e-2 if mine.name == "int8" else rounds)):
        found, wanted = (history(run, "step", key) for run in (mine, alone))
        assert found[:alike] == pytest.approx(wanted[:alike], rel=1e-5)
        assert found == pytest.approx(wanted, rel=far)
    for here, there in zip(history(mine, "eval", "bpb"), history(alone, "eval", "bpb"), strict=True):
        for modality in there:
            assert here[modality] == pytest.approx(there[modality], rel=max(rounds, 1e-4))


@pytest.mark.parametrize(("run", "alone"), [("each-use", "alone"), ("odd", "alone-odd")])
def test_ranks_train_as_one(two: Path, run: str, alone: str) -> None:
    trained_as_one(two / run, two / alone)


@pytest.mark.drill
@pytest.mark.parametrize("run", ["once", "less-memory", "int8", "hsdp", "uneven", "selective"])
def test_more_ranks_train_as_one(more: Path, run: str) -> None:
    trained_as_one(more / run, more / ("alone-int8" if run == "int8" else "alone"))


def alike_over_50_steps(mine: Path, alone: Path) -> None:
    found, want = (history(run, "step", "loss") for run in (mine, alone))
    assert len(found) == 50 and want[-1] < want[0] / 2
    assert found == pytest.approx(want, abs=1e-5)


@pytest.mark.drill
@pytest.mark.parametrize("world", [2, 4])
def test_worlds_are_alike_over_50_steps(more: Path, world: int) -> None:
    alike_over_50_steps(more / f"long-{world}", more / "alone-long")


@pytest.mark.drill
def test_bf16_as_on_gpus_is_near_fp32_and_keeps_fp32_weights(more: Path) -> None:
    """What FSDP is told to do where there are GPUs, done on the CPU: gathered and computed in bf16, added up in fp32."""
    found, want = (history(more / run, "step", "loss") for run in ("bf16", "alone"))
    assert found == pytest.approx(want, rel=2e-2) and found != pytest.approx(want, rel=1e-4)
    net = checkpoint.read(more / "bf16" / "model").net
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.drill
def test_muon_over_ranks_is_near_alone(more: Path) -> None:
    """Whole matrices are made orthogonal by every rank, in fp32, which rounds what sums in another order say."""
    found, want = (history(more / run, "step", "loss") for run in ("muon", "alone-muon"))
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.drill
def test_a_run_goes_on_at_another_world_size(more: Path) -> None:
    """2, then 1, then 4 ranks: no step is lost or done twice, and the losses are those of a run that never moved."""
    assert history(more / "moved", "start", "world") == [2, 1, 4]
    assert history(more / "moved", "step", "step") == list(range(1, 13))
    moved, calm = (history(more / run, "step", "loss") for run in ("moved", "alone-moved"))
    assert moved == pytest.approx(calm, abs=1e-6 * calm[0])
    assert history(more / "moved", "step", "tokens") == history(more / "alone-moved", "step", "tokens")


def dealt_as_one_update(mine: Path, alone: Path) -> None:
    found, want = (history(run, "step", "loss") for run in (mine, alone))
    assert found == pytest.approx(want, abs=1e-6 * max(want))


def test_masked_rows_are_one_update_however_they_are_dealt(two: Path) -> None:
    """(8 x 1) = (4 x 2), with chats of 1 to 3 sentences."""
    dealt_as_one_update(two / "chats-2", two / "alone-chats")


@pytest.mark.drill
@pytest.mark.parametrize(
    ("kind", "world"), [(kind, world) for kind, world, _ in TUNED if f"{kind}-{world}" != "chats-2"]
)
def test_masked_rows_are_one_update_however_many_they_are_dealt_to(more: Path, kind: str, world: int) -> None:
    """(8 x 1) = (2 x 4) = (1 x 8), and 3, 3 and 2; also where most weights are frozen."""
    dealt_as_one_update(more / f"{kind}-{world}", more / f"alone-{kind}")


@pytest.mark.drill
def test_lora_changes_the_layers_alone_and_leaves_a_model_of_the_same_shape(more: Path) -> None:
    before, after = (checkpoint.read(more / run / "model").net.state_dict() for run in ("alone", "alone-lora"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all(
        (".blocks." in name and name.endswith((".qkv.weight", ".out.weight"))) or ".mlp." in name for name in changed
    )


def written_once(mine: Path, alone: Path) -> None:
    """Files of all ranks together hold as many numbers as one rank's; of groups that hold the same, one writes."""

    def held(run: Path) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in (run / "checkpoints" / "step-00000004").glob("shard-*"):
            for key, tensor in load_file(path).items():
                found[key] = found.get(key, 0) + tensor.numel()
        return found

    assert held(mine) == held(alone) and held(alone)
    assert damage(mine / "checkpoints" / "step-00000004") is None


def test_ranks_write_each_tensor_once(two: Path) -> None:
    written_once(two / "each-use", two / "alone")


@pytest.mark.drill
@pytest.mark.parametrize("run", ["hsdp", "uneven"])
def test_more_ranks_write_each_tensor_once(more: Path, run: str) -> None:
    written_once(more / run, more / "alone")


@pytest.mark.drill
def test_a_full_disk_costs_checkpoints_and_no_step(more: Path) -> None:
    run = more / "full-disk"
    said = [text for text in history(run, "warning", "text") if "cannot write checkpoint" in text]
    assert "training goes on, the newest checkpoint is step 1" in said[0] and "File too large" in said[0]
    assert history(run, "step", "loss") == pytest.approx(history(more / "alone", "step", "loss"), rel=1e-5)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000001", "step-00000004"]


def test_rows_that_one_rank_cannot_read_end_the_run_on_all_after_the_updates_before(two: Path) -> None:
    assert history(two / "one-row", "step", "step") == [1, 2]


@pytest.mark.drill
def test_a_slow_rank_costs_nothing_but_time(more: Path) -> None:
    assert history(more / "slow", "checkpoint", "step") == [1, 2] and (more / "slow" / "model").is_dir()


def test_what_is_left_out_in_the_test_above_is_not_nothing() -> None:
    model, config = plan(Path(), Path("run"), 1, **ODD).model, plan(Path(), Path("run"), 1, **ODD).train
    assert any(left_out(model, config, step) for step in range(4)) and rotates(model, config)


def test_a_world_of_one_needs_no_process_group() -> None:
    ranks = parallel.Ranks.join()
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.agree("x") == "x" and torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
