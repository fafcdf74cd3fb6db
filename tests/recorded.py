"""Graphs without a GPU: what a `torch.cuda.CUDAGraph` does with launches, done with the operators of a CPU.

`Again` runs the function itself once more, so that it may hold operators whose sizes follow from values. `Tape` is as strict as
a device: it keeps what the function called, on which memory, and replays that alone. No Python of the function runs again,
results lie where they lay, and an operator that waits for a value is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from shoal.engine.graphs import Run

_aten = torch.ops.aten
WAITS = {  # for the device: the host must know a value, or how many there are
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.unique_dim.default,
    _aten._unique2.default, _aten.repeat_interleave.Tensor, _aten.equal.default,
}  # fmt: skip


class Again:
    """`graphs.Record` that counts."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.made += 1
        run()  # as a device, which must compile

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def waits(function: Any, args: Any) -> bool:
    """Would a device be waited for? Also by an index of booleans."""
    if function in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        return any(isinstance(at, Tensor) and at.dtype == torch.bool for at in args[1])
    return function in WAITS


class Tape(TorchDispatchMode):
    """`graphs.Record`. Kernels that are not torch's are told to `took`."""

    now: Tape | None = None  # the one that is being recorded

    def __init__(self, counts: Again | None = None) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self._counts = counts

    def __call__(self, run: Run) -> Run:
        tape = Tape()
        run()
        Tape.now = tape
        try:
            with tape:
                run()
        finally:
            Tape.now = None
        if self._counts is not None:
            self._counts.made += 1

        def replay() -> None:
            if self._counts is not None:
                self._counts.replayed += 1
            for call in tape.calls:
                call()

        return replay

    def took(self, kernel: Callable[[], None]) -> None:
        self.calls.append(kernel)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if waits(function, args):
            raise RuntimeError(f"{function} waits for the device while a graph is recorded")
        was = function(*args, **named)
        kept = [leaf for leaf in tree_leaves(was) if isinstance(leaf, Tensor)]

        def call() -> None:
            found = [leaf for leaf in tree_leaves(function(*args, **named)) if isinstance(leaf, Tensor)]
            for old, new in zip(kept, found, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

        if "empty" not in function.name():  # what lies there is nobody's
            self.calls.append(call)
        return was


def kernels_on_tape(run: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the `run` of Triton's interpreter: it runs, and is kept by the tape that is being recorded."""

    def instead(self: Any, *args: Any, **named: Any) -> None:
        def call() -> None:
            with _disable_current_modes():
                run(self, *args, **named)

        if Tape.now is not None:
            Tape.now.took(call)
        call()

    return instead
