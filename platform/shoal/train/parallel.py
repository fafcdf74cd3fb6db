"""Many processes as one: who this process is, and FSDP2 over the layer groups.

Training code asks `Ranks` and never torch.distributed, so the same loop runs alone, under torchrun and under Ray Train
(which makes the process group; nothing here imports ray).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shoal.errors import ShoalError
from shoal.model.cost import parameters
from shoal.train.compiled import Compiler
from shoal.train.loss import LossModel
from shoal.train.recompute import Recompute, again

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

STAYS_GATHERED = 2**28  # parameters (1 GiB in fp32): a smaller model is gathered once an update, not at each use
PULSE = 5.0  # seconds between two exchanges of ranks that wait for one which reads or writes for long


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> Ranks:
        """From the process group, if there is one; else a world of one. A GPU is used where there is one."""
        grouped = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return cls(rank, world, device)
        if world > 1:
            torch.set_num_threads(1)  # workers share the cores, and two threads on one core stall each other
        return cls(rank, world, torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Is this the process that writes files and speaks?"""
        return self.rank == 0

    def place(self, network: M) -> M:
        """`network`, which is no part of a model yet, moved to this rank's device whole, before it is sharded."""
        return network.to(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, on every rank."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's `value` (numbers, text, plain containers, errors of ours) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (as of `agree`), in the order of the ranks, on every rank."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """An error of ours that one rank meets in this block is raised on all of them: those that went on would wait for it."""
        problem: ShoalError | None = None
        try:
            yield
        except ShoalError as error:
            problem = error
        problem = next((met for met in self.gather(problem) if met is not None), None)
        if problem is not None:
            raise problem

    @contextlib.contextmanager
    def at_leisure(self) -> Iterator[None]:
        """What ranks do in this block, by themselves and without an exchange, may take any of them long: it ends on all of them
        together, when the last is done. Meanwhile a thread of each exchanges a number every `PULSE` seconds, since one exchange
        that waited for the slowest would be given up (`on_ray.train.COLLECTIVE_TIMEOUT`). All ranks enter it."""
        if self.world == 1:
            yield
            return
        over, met = threading.Event(), list[BaseException]()

        def exchange() -> None:
            try:
                while int(self.sum(torch.tensor([float(not over.is_set())]))):
                    over.wait(PULSE)
            except BaseException as error:  # of a rank that is gone; told where somebody hears it
                met.append(error)

        thread = threading.Thread(target=exchange, name="at-leisure", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if met:
            raise met[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


def shard_(
    model: LossModel, ranks: Ranks, *, replicas: int = 1, recompute: Recompute = False, compiled: bool = False
) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, one layer group at a time (ZeRO-3), in place.

    A model below STAYS_GATHERED is whole on every rank from the first use to the end of an update (ZeRO-2), which saves
    three quarters of the gathering; a larger one is gathered a group at a time, forward and backward. Every rank must hold
    the same full weights, or none yet (`fresh.meta`). Gradients are summed, not averaged: the loss is already divided by the
    counts of the whole batch.

    `replicas`: that many groups of ranks each hold the whole model (HSDP), so that only gradients cross between them;
    `recompute`: layers keep their inputs alone and run again in backward, or what is cheap of them (`recompute`); `compiled`:
    each layer by torch.compile, as long as that works (`compiled.Compiler`).
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(ranks.device)
    groups = [group for net in (model.net, model.teacher) if net is not None for group in net.groups]
    compiler = Compiler() if compiled else None
    for group in groups:
        for block in group.blocks:  # type: ignore[union-attr]
            if recompute or compiled:
                block.forward = again(block.forward, recompute, model.net.config.width, compiler=compiler)
    if ranks.world == 1:
        return
    shape, names = ((ranks.world,), ("shard",))
    if replicas > 1:
        shape, names = (replicas, ranks.world // replicas), ("replicate", "shard")  # type: ignore[assignment]
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    policy, whole = mixed_precision(ranks.device, low=model.low), _stays_gathered(model)
    for part in (*groups, model):
        sharded = fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not whole)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no pre-scaled sum


def mixed_precision(device: torch.device, *, low: bool = True) -> MixedPrecisionPolicy:
    """What FSDP gathers and computes in, and what it adds gradients up in; weights and moments stay fp32. `low`: bf16 on a
    GPU."""
    if device.type == "cuda" and low:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()  # bf16 on a CPU without AVX512 is 3 to 11 times slower than fp32


def sync_gradients(model: LossModel, on: bool) -> None:
    """Shall the next backward exchange gradients? Off for all but the last micro-batch of an update."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        model.set_reshard_after_backward(on or not _stays_gathered(model))


def release(model: LossModel) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _stays_gathered(model: LossModel) -> bool:
    return parameters(model.net.config).total <= STAYS_GATHERED


@contextlib.contextmanager
def precision(model: LossModel, ranks: Ranks) -> Iterator[None]:
    """bf16 arithmetic on a GPU that trains alone, unless fp32 was asked for; FSDP's own policy does it for many."""
    alone = ranks.device.type == "cuda" and model.low and not isinstance(model, FSDPModule)
    with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=alone):
        yield
