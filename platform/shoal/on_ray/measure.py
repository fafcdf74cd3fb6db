"""Where what is measured of a model runs: on workers of the cluster, with a GPU each where it has some, or in this process.

A worker loads the models that its pieces ask for, once; one that is lost is started again, and its pieces are done again
(`each.TRIES`). The process that asks holds neither rows of a corpus nor weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from shoal.data.models import here
from shoal.errors import ResourceError, UsageError
from shoal.evaluate import pieces
from shoal.evaluate.pieces import Models, Piece, Run
from shoal.model import cost, described
from shoal.on_ray.each import each, quiet_data
from shoal.on_ray.resources import NODE_GROUP, local_ray

BYTES = 4  # of a parameter on a CPU, which computes in fp32
OWN = 2**30  # bytes that a worker takes without any


def said(line: str) -> None:
    """Says it to who runs the command, beside its result."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def measuring(*places: str | Path, gpus: bool | None = None, whole: bool = False) -> Iterator[Run]:
    """What does pieces of the models at `places`: workers of the cluster that RAY_ADDRESS names, or of this machine where it
    has a GPU; else this process, as more of them would only hold the weights more often. `gpus`: a GPU each [where the cluster
    has some]; `whole`: else all CPUs of a machine each, for a piece that is large. Raises ResourceError."""
    if _here_alone() and (gpus is False or not torch.cuda.is_available()):
        yield pieces.here
        return
    with local_ray(), quiet_data():
        yield workers([_parameters(place) for place in places], gpus, whole=whole)


def need_gpus(gpus: bool | None) -> None:
    """Raises UsageError where GPUs are asked for on this machine, which has none."""
    if gpus and _here_alone() and not torch.cuda.is_available():
        raise UsageError("--gpu", got="a machine without one", do="leave it out, or set RAY_ADDRESS to a cluster's")


def _here_alone() -> bool:
    return "RAY_ADDRESS" not in os.environ


def workers(
    parameters: Sequence[int], gpus: bool | None = None, *, whole: bool = False, say: Callable[[str], None] = said
) -> Run:
    """What does pieces on Ray, which must be running, where models of so many `parameters` are held together. `say` is told
    where they go to CPUs though an autoscaler may start GPUs, which end when they are idle. Raises ResourceError, with the
    arithmetic, where no machine can hold them."""
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    on_gpu = have.get("GPU", 0) >= 1 if gpus is None else gpus
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    may_grow = any(node["Labels"].get(NODE_GROUP) for node in nodes)  # an autoscaler may start what is not there
    if on_gpu:
        asked = {"num_cpus": 1.0, "num_gpus": 1.0}
        if have.get("GPU", 0) < 1 and not may_grow:
            raise ResourceError("1 GPU to measure on", got="none in the cluster", do="give --no-gpu, or add one")
    else:
        if gpus is None and may_grow:
            say("no GPU is in the cluster now: measured on CPUs, in fp32; --gpu waits for the autoscaler to start one")
        memory = float(OWN + int(BYTES * pieces.BESIDE * sum(parameters)))
        found = [node["Resources"] for node in nodes if node["Resources"].get("CPU", 0.0) >= 1]  # a head may have none
        if not may_grow:
            need_machine(memory, [of.get("memory", 0.0) for of in found])
        # one machine is to have both, or the piece would wait for ever
        cpus = [of["CPU"] for of in found if of.get("memory", 0.0) >= memory] or [of["CPU"] for of in found]
        asked = {"num_cpus": max(cpus, default=1.0) if whole else 1.0, "memory": memory}

    def run(some: Sequence[Piece]) -> Iterator[Any]:
        jobs = [(_Whole(piece),) for piece in some]
        found = each(_Worker(on_gpu), jobs, [1] * len(jobs), "measure", lambda *_: None, **asked)
        yield from (result.value for result in found)

    return run


def need_machine(need: float, machines: Sequence[float]) -> None:
    """Raises ResourceError where none of `machines` with a CPU, by their bytes of memory, has as many as a worker needs."""
    if need > max(machines, default=0.0):
        raise ResourceError(
            f"a worker that measures needs {need / 2**30:.1f} GiB of memory",
            got=f"{max(machines, default=0.0) / 2**30:.1f} GiB on the largest machine",
            do="add a machine with more, or one with a GPU, which holds weights in half of it",
        )


@dataclass(frozen=True)
class _Whole:
    """What Ray Data carries as it is: of arrays and of tuples it would make columns."""

    value: Any


class _Worker:
    """Does pieces; its models are loaded where it runs, and stay there."""

    holds_state = True

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._models: Models | None = None

    def __call__(self, whole: _Whole) -> _Whole:
        self._models = self._models or Models(self._gpu)
        piece: Piece = whole.value
        return _Whole(piece.do(self._models, *piece.args))


def _parameters(place: str | Path) -> int:
    return cost.parameters(described.read_config(here(place, weights=False))[1]).total
