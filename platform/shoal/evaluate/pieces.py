"""Measuring in pieces, which any process can do: this one, one after the other, some beside it, or workers on Ray
(`on_ray.measure`).

A piece is a function of a module and its plain arguments; where it needs a model it asks `Models` for that by its place. What
comes of all pieces together does not depend on how many processes did them: they are cut without regard to that, and put
together in their order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from shoal.data import models
from shoal.data.sources.s3 import is_remote
from shoal.errors import ResourceError
from shoal.machine import cores
from shoal.model import cost, described
from shoal.model.model import Model

HALVED = 2  # bytes of a parameter on a GPU, where fp32 weights become bfloat16
BESIDE = 1.25  # memory that a forward pass takes, over that of the weights


@dataclass(frozen=True)
class Piece:
    """What a process is to do: ``do(models, *args)``."""

    do: Callable[..., Any]
    args: tuple[Any, ...] = ()


Run = Callable[[Sequence[Piece]], Iterator[Any]]  # what comes of pieces, in their order


class Models:
    """The models of one process: a piece gets those that it asks for, and those that it does not ask for are let go."""

    def __init__(self, gpu: bool = False) -> None:
        self.gpu = gpu
        self._held: dict[str, Model] = {}

    def __call__(self, *places: str | Path) -> list[Model]:
        """The models at `places`, directories or s3://, on the GPU where this process has one. Raises CheckpointError, and
        ResourceError for a GPU that is too small."""
        names = [str(place) for place in places]
        self._held = {name: model for name, model in self._held.items() if name in names}
        for name in names:
            if name not in self._held:
                self._held[name] = self.placed(self.read(name))
        return [self._held[name] for name in names]

    def read(self, place: str | Path) -> Model:
        """A model on the CPU, which is not kept."""
        folder = models.here(place)
        if self.gpu:
            need_gpu_memory(folder, torch.cuda.mem_get_info()[0])
        return Model.load(folder)

    def placed(self, model: Model) -> Model:
        """`model`, on the GPU where this process has one."""
        return model.on_gpu() if self.gpu else model


def here(pieces: Sequence[Piece]) -> Iterator[Any]:
    """All in this process, on its CPUs."""
    held = Models()
    for piece in pieces:
        yield piece.do(held, *piece.args)


def beside(count: int) -> Run:
    """In so many processes beside this one, which share the cores; in this one where there are no two of both. Where a piece
    fails or nobody waits any longer, as after Ctrl-C, they end at once. Raises what it raises, ResourceError where one dies."""

    def run(some: Sequence[Piece]) -> Iterator[Any]:
        if min(count, cores(), len(some)) < 2:
            yield from here(some)
            return
        context, threads = _once_imported(some), max(1, cores() // count)
        ending, end = context.Pipe(duplex=False)
        try:
            with ProcessPoolExecutor(count, mp_context=context, initializer=_begun, initargs=(threads, ending)) as pool:
                try:
                    yield from _in_order([pool.submit(_done, piece) for piece in some])
                except BaseException:
                    end.close()  # the pool waits for what was begun, and begins what lies in its queue
                    raise
        except BrokenProcessPool as error:
            do = "see whether the system was out of memory (dmesg)"
            raise ResourceError("a process that measures died", do=do) from error
        finally:
            end.close()
            ending.close()

    return run


def _once_imported(some: Sequence[Piece]) -> Any:
    """What starts processes as copies of one that computes nothing, and has imported what `some` pieces need: each that did so
    by itself would take seconds of a processor for torch alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({__name__, *(piece.do.__module__ for piece in some)}))
    return context


def _in_order(asked: Sequence[Future[Any]]) -> Iterator[Any]:
    """What comes of each, the first first; raises as soon as any has failed."""
    left = set(asked)
    for each in asked:
        while each in left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for one in done:
                one.result()
        yield each.result()


_HELD = Models()  # of a process of `beside`


def _begun(threads: int, ending: Connection) -> None:
    """A process of `beside` ends with the one that began it, however that ends, or when that lets go of its end of `ending`."""
    torch.set_num_threads(min(torch.get_num_threads(), threads))  # what OMP_NUM_THREADS allows is never exceeded
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; a pool takes it for what a piece raised

    def follow() -> None:
        ending.poll(None)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _done(piece: Piece) -> Any:
    return piece.do(_HELD, *piece.args)


def wherever(place: str | Path) -> str:
    """A place as a process with another folder finds it too."""
    return str(place) if is_remote(place) else str(Path(place).absolute())


def need_gpu_memory(folder: Path, free: int) -> None:
    """Raises ResourceError, with the arithmetic, where a model directory does not fit `free` bytes of one GPU."""
    _, config = described.read_config(folder)
    count = cost.parameters(config).total
    need = int(count * (1 if config.quantization == "w8a8" else HALVED) * BESIDE)
    if need > free:
        raise ResourceError(
            f"a model of {count / 1e9:.1f} billion parameters does not fit one GPU to be measured on it",
            got=f"{free / 1e9:.1f} GB that are free",
            allowed=f"at least {need / 1e9:.1f} GB",
            do="give --no-gpu, whose tasks need memory of machines, or machines whose GPUs have more",
        )
