"""What one process asks of the others and does beside them, call by call; `test_parallel` has them train together."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal import presets
from shoal.errors import DataError, ShoalError
from shoal.model.cost import parameters
from shoal.model.net import Net
from shoal.train import parallel
from shoal.train.fresh import meta
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks

CONFIG = presets.get("test").model
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
ALONE, SECOND = Ranks(0, 1, CPU), Ranks(1, 3, CPU)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told of threads."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(("world", "told"), [(1, []), (2, [1])])
def test_a_process_is_what_its_group_says_and_shares_the_cores_with_the_others(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], world: int, told: list[int]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: world - 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    assert Ranks.join() == Ranks(world - 1, world, CPU)
    assert threads == told
    assert Ranks.join().first == (world == 1)


@pytest.mark.parametrize(("local", "index"), [(None, 0), ("1", 1), ("5", 1)])
def test_a_gpu_is_taken_by_the_place_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], local: str | None, index: int
) -> None:
    told: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert Ranks.join() == Ranks(0, 1, torch.device("cuda", index))
    assert told == ["high", torch.device("cuda", index)] and threads == []


def test_a_network_is_moved_to_its_device() -> None:
    assert Ranks(0, 1, torch.device("meta")).place(torch.nn.Linear(2, 2)).weight.is_meta


def test_a_sum_leaves_what_it_was_given_and_a_world_of_one_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(10))
    mine = torch.tensor([1.0, 2.0])
    assert SECOND.sum(mine).tolist() == [11.0, 12.0] and mine.tolist() == [1.0, 2.0]
    assert ALONE.sum(mine) is mine and mine.tolist() == [1.0, 2.0]


def test_the_first_rank_s_value_is_everybody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def broadcast(box: list[str], **how: Any) -> None:
        asked.append({"box": list(box), **how})
        box[0] = "theirs"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert (ALONE.agree("mine"), asked) == ("mine", [])
    assert SECOND.agree("mine") == "theirs"
    assert asked == [{"box": ["mine"], "src": 0, "device": CPU}]


@contextmanager
def gathered(monkeypatch: pytest.MonkeyPatch, before: list[Any], after: list[Any]) -> Iterator[None]:
    """The others say these, by rank."""

    def gather(found: list[Any], value: Any) -> None:
        assert len(found) == SECOND.world
        found[:] = [*before, value, *after]

    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_gather_object", gather)
        yield


def test_everybody_s_values_come_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with gathered(monkeypatch, ["a"], ["c"]):
        assert SECOND.gather("b") == ["a", "b", "c"] and ALONE.gather("b") == ["b"]


def test_an_error_of_ours_is_raised_by_all_the_first_rank_s_first(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine = DataError("theirs"), DataError("mine")
    with gathered(monkeypatch, [None], [theirs]), pytest.raises(ShoalError, match="theirs"), SECOND.alike():
        pass
    with gathered(monkeypatch, [None], [theirs]), pytest.raises(ShoalError, match="mine"), SECOND.alike():
        raise mine
    with gathered(monkeypatch, [theirs], [None]), pytest.raises(ShoalError, match="theirs"), SECOND.alike():
        raise mine
    with gathered(monkeypatch, [None], [None]), SECOND.alike():
        pass
    with pytest.raises(ShoalError, match="mine"), ALONE.alike():
        raise mine
    with pytest.raises(ZeroDivisionError), ALONE.alike():
        _ = 1 / 0


def test_only_who_has_others_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(1))
    ALONE.wait()
    assert waited == []
    SECOND.wait()
    assert waited == [1]


def test_bf16_is_a_gpu_s_alone_and_gradients_add_up_in_fp32() -> None:
    low = parallel.mixed_precision(CUDA)
    assert (low.param_dtype, low.reduce_dtype) == (torch.bfloat16, torch.float32)
    for other in (parallel.mixed_precision(CUDA, low=False), parallel.mixed_precision(CPU)):
        assert (other.param_dtype, other.reduce_dtype) == (None, None)


@pytest.mark.parametrize(("more", "stays"), [(0, True), (1, True), (-1, False)])
def test_a_model_stays_gathered_up_to_a_number_of_parameters(
    monkeypatch: pytest.MonkeyPatch, more: int, stays: bool
) -> None:
    """Counted in the model itself; the last of several micro-batches frees what is gathered, a large model's do each."""
    net = Net(CONFIG)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert parameters(CONFIG).total == total
    monkeypatch.setattr(parallel, "STAYS_GATHERED", total + more)
    told: list[tuple[str, bool]] = []

    class Sharded(LossModel):
        def set_requires_gradient_sync(self, on: bool) -> None:
            told.append(("sync", on))

        def set_reshard_after_backward(self, on: bool) -> None:
            told.append(("reshard", on))

    monkeypatch.setattr(parallel, "FSDPModule", Sharded)
    parallel.sync_gradients(Sharded(net), True)
    parallel.sync_gradients(Sharded(net), False)
    parallel.sync_gradients(LossModel(net), True)  # of one process: there is nobody to exchange with
    assert told == [("sync", True), ("reshard", True), ("sync", False), ("reshard", not stays)]


def test_all_that_is_sharded_is_released_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[object] = []

    class Sharded(torch.nn.Linear):
        def reshard(self) -> None:
            freed.append(self)

    monkeypatch.setattr(parallel, "FSDPModule", Sharded)
    model = torch.nn.Sequential(Sharded(1, 1), torch.nn.Linear(1, 1), torch.nn.Sequential(Sharded(1, 1)))
    parallel.release(model)  # type: ignore[arg-type]
    assert freed == [model[0], model[2][0]]


@pytest.mark.parametrize(
    ("device", "low", "sharded", "on"),
    [
        (CUDA, True, False, True),
        (CUDA, False, False, False),
        (CUDA, True, True, False),
        (CPU, True, False, False),
    ],
)
def test_one_gpu_alone_computes_in_bf16_unless_fp32_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, low: bool, sharded: bool, on: bool
) -> None:
    asked: list[tuple[str, object, bool]] = []

    @contextmanager
    def autocast(kind: str, dtype: object, enabled: bool) -> Iterator[None]:
        asked.append((kind, dtype, enabled))
        yield

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(parallel, "FSDPModule", LossModel if sharded else torch.nn.Linear)
    model, ran = LossModel(Net(CONFIG)), []
    model.low = low
    with parallel.precision(model, Ranks(0, 1, device)):
        ran.append(1)
    assert asked == [(device.type, torch.bfloat16, on)] and ran == [1]


class Sharding:
    """Records what FSDP is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.meshes: list[tuple[object, ...]] = []
        self.parts: list[tuple[object, dict[str, Any]]] = []
        self.said: list[tuple[str, object]] = []
        monkeypatch.setattr(parallel, "init_device_mesh", self.mesh)
        monkeypatch.setattr(parallel, "fully_shard", self.shard)

    def mesh(self, kind: str, shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> str:
        self.meshes.append((kind, shape, mesh_dim_names))
        return "the mesh"

    def shard(self, part: object, **how: Any) -> object:
        self.parts.append((part, how))
        return SimpleNamespace(
            set_gradient_divide_factor=lambda by: self.said.append(("divide", by)),
            set_force_sum_reduction_for_comms=lambda on: self.said.append(("sum", on)),
        )


@pytest.mark.parametrize(("world", "replicas", "shape"), [(3, 1, (3,)), (2, 2, (2, 1)), (6, 2, (2, 3))])
@pytest.mark.parametrize("whole", [True, False])
def test_groups_are_sharded_one_by_one_the_teacher_s_too_and_the_rest_with_the_root(
    monkeypatch: pytest.MonkeyPatch, world: int, replicas: int, shape: tuple[int, ...], whole: bool
) -> None:
    asked = Sharding(monkeypatch)
    monkeypatch.setattr(parallel, "STAYS_GATHERED", 2**28 if whole else 0)
    model = LossModel(Net(CONFIG), teacher=Net(CONFIG))
    parallel.shard_(model, Ranks(0, world, CPU), replicas=replicas)
    names = ("shard",) if replicas == 1 else ("replicate", "shard")
    assert asked.meshes == [("cpu", shape, names)]
    assert model.teacher is not None
    assert [part for part, _ in asked.parts] == [*model.net.groups, *model.teacher.groups, model]
    policy = parallel.mixed_precision(CPU)
    how = {"mesh": "the mesh", "mp_policy": policy, "reshard_after_forward": not whole}
    assert all(given == how for _, given in asked.parts)
    assert asked.said == [("divide", 1.0), ("sum", True)] * len(asked.parts)


@pytest.mark.parametrize("low", [True, False])
def test_what_is_sharded_over_gpus_is_computed_in_bf16_unless_fp32_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, low: bool
) -> None:
    asked = Sharding(monkeypatch)
    with torch.device("meta"):
        model = LossModel(Net(CONFIG))
    model.low = low
    parallel.shard_(model, Ranks(0, 2, CUDA))  # what is nowhere yet is not moved there
    dtype = torch.bfloat16 if low else None
    assert asked.meshes == [("cuda", (2,), ("shard",))], "one copy of the model, unless more are asked for"
    assert {given["mp_policy"].param_dtype for _, given in asked.parts} == {dtype}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_alone_nothing_is_sharded_and_the_model_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, model = Sharding(monkeypatch), LossModel(Net(CONFIG))
    before = [block.forward for group in model.net.groups for block in group.blocks]  # type: ignore[union-attr]
    parallel.shard_(model, Ranks(0, 1, torch.device("meta")))
    assert (asked.meshes, asked.parts) == ([], []) and all(p.is_meta for p in model.parameters())
    after = [block.forward for group in model.net.groups for block in group.blocks]  # type: ignore[union-attr]
    assert after == before and not any("forward" in vars(b) for group in model.net.groups for b in group.blocks)  # type: ignore[union-attr]


def test_layers_are_compiled_and_run_again_in_backward_around_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph each, or not at all; of a teacher, too."""
    asked = list[dict[str, Any]]()

    def compile_(forward: Any, **how: Any) -> Any:
        asked.append(how)
        return lambda *given: ("compiled", forward, *given)

    def again(forward: Any, *given: Any, use_reentrant: bool) -> Any:
        assert not use_reentrant
        return ("again", forward, given) if inspect.ismethod(forward) else ("again", *forward(*given))

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("shoal.train.recompute.checkpoint", again)
    for recompute, compiled in ((False, True), (True, False), (True, True)):
        model = LossModel(Net(CONFIG), teacher=Net(CONFIG))
        assert model.teacher is not None
        blocks: list[Any] = [b for net in (model.net, model.teacher) for group in net.groups for b in group.blocks]  # type: ignore[union-attr]
        plain = [block.forward for block in blocks]
        parallel.shard_(model, ALONE, recompute=recompute, compiled=compiled)
        for block, before in zip(blocks, plain, strict=True):
            want = ("compiled", before, "x") if compiled else (before, ("x",))
            assert block.forward("x") == (("again", *want) if recompute else want)
        assert len(asked) == compiled * len(blocks) and all(how.pop("fullgraph") for how in asked)
        asked.clear()


def test_a_model_that_is_partly_nowhere_yet_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrices have no memory, its norms have."""
    model = LossModel(meta(CONFIG))
    assert {parameter.is_meta for parameter in model.parameters()} == {True, False}
    before = {name: parameter.device for name, parameter in model.named_parameters()}
    parallel.shard_(model, ALONE)
    assert {name: parameter.device for name, parameter in model.named_parameters()} == before


class Busy(Ranks):
    """With another rank that is done three exchanges after this one. Who exchanges is noted."""

    told: list[tuple[float, str, bool]]
    left: list[float]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        thread = threading.current_thread()
        self.told.append((float(values), thread.name, thread.daemon))
        if values.item():
            return values + 1
        time.sleep(0.01)  # who does not wait for it is past the block by then
        return values + self.left.pop(0)


def busy(world: int) -> Busy:
    ranks = Busy(0, world, CPU)
    object.__setattr__(ranks, "told", [])
    object.__setattr__(ranks, "left", [1.0, 1.0, 0.0])
    return ranks


def test_what_takes_one_of_them_long_ends_when_the_last_is_done() -> None:
    """In a thread that lets a process end which is interrupted meanwhile; alone there is nobody to wait for."""
    ranks = busy(2)
    with ranks.at_leisure():
        for _ in range(5000):
            if ranks.told:
                break
            time.sleep(0.001)
        assert ranks.told, "nobody exchanges"
    assert [value for value, *_ in ranks.told if value == 0] == [0.0] * 3 and ranks.left == []
    assert {(name, daemon) for _, name, daemon in ranks.told} == {("at-leisure", True)}
    ranks, ran = busy(1), []
    with ranks.at_leisure():
        ran.append(1)
    assert ran == [1] and ranks.told == []


def test_a_rank_that_is_gone_meanwhile_is_told_and_an_error_of_the_block_first() -> None:
    class Gone(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            raise ConnectionError("gone")

    ranks = Gone(0, 2, CPU)
    with pytest.raises(ConnectionError, match="gone"), ranks.at_leisure():
        pass
    with pytest.raises(DataError, match="mine"), ranks.at_leisure():
        raise DataError("mine")
    late = busy(2)
    with pytest.raises(DataError, match="mine"), late.at_leisure():
        raise DataError("mine")
    assert late.left == [], "the others are waited for all the same"


def test_two_are_enough_to_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, waited = Ranks(1, 2, CPU), list[int]()
    monkeypatch.setattr(dist, "all_reduce", lambda values: values.add_(10))
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(1))
    monkeypatch.setattr(dist, "all_gather_object", lambda found, value: found.__setitem__(0, "theirs"))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **how: box.__setitem__(0, "theirs"))
    pair.wait()
    assert pair.sum(torch.ones(1)).tolist() == [11.0] and waited == [1]
    assert pair.gather("mine") == ["theirs", "mine"] and pair.agree("mine") == "theirs"
