"""What the host asks of a device, so that it waits for it once a step: all comes in one copy. What it sends is not waited for
(`model/sending.py`). On a CPU nothing is copied, and numpy sees what torch has."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from torch import Tensor

Then = Callable[[list[list[float]]], None]
RECORDING = Lock()  # of the process: a recording begins with a wait for all of a device, which would end another one


def give_back() -> None:
    """Give a GPU what torch keeps of memory that nothing in this process holds any more: else it is nobody's. Waits for the
    device, and for a graph that is recorded: torch refuses it until then."""
    with RECORDING:
        torch.cuda.empty_cache()  # which does nothing where there is none


def fetched(*tensors: Tensor) -> list[list[float]]:
    """The numbers of each of `tensors`, in order and without their shapes, in one copy. fp64 holds each of them as it is: fp32,
    and whole numbers up to 2^53."""
    numbers = torch.cat([each.flatten().double() for each in tensors]).tolist()
    found, at = [], 0
    for each in tensors:
        found.append(numbers[at : at + each.numel()])
        at += each.numel()
    return found


class Unread:
    """Tensors on a device whose numbers the host needs, though not yet: they come with the next copy that it waits for anyway
    (`Sampler.sample`), or in one of their own."""

    def __init__(self) -> None:
        self._parts: list[tuple[list[Tensor], Then]] = []

    def add(self, tensors: list[Tensor], then: Then) -> None:
        """`then` gets the numbers of each of `tensors`, when they have come."""
        self._parts.append((tensors, then))

    @property
    def tensors(self) -> list[Tensor]:
        """All that have not been read."""
        return [each for tensors, _ in self._parts for each in tensors]

    def came(self, numbers: list[list[float]]) -> None:
        """Those of each of `tensors`, in their order."""
        parts, self._parts = self._parts, []
        for tensors, then in parts:
            then(numbers[: len(tensors)])
            numbers = numbers[len(tensors) :]

    def read(self) -> None:
        """Wait for them, unless all have come."""
        if self._parts:
            self.came(fetched(*self.tensors))


def viewed(x: Tensor) -> np.ndarray | None:
    """`x` on a CPU in fp32 or fp64 as numpy has it, the same memory; None for others. To find the largest of a row, or to fill
    a part of it, takes numpy a tenth of torch's time, which is a few per cent of a small model's step."""
    return x.detach().numpy() if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) else None


def picked(x: Tensor, columns: Tensor) -> list[float]:
    """The number of each row of x [R, V] in its column of `columns` [R]."""
    numbers = viewed(x)
    if numbers is None:
        found: list[float] = x.gather(-1, columns[:, None])[:, 0].tolist()
    else:
        found = numbers[np.arange(len(numbers)), columns.numpy()].tolist()
    return found
