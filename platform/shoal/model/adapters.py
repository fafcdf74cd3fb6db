"""LoRA adapters beside the linears of a network's layers: what one is, and products of rows that have different ones.

    y [N, O] = what the linear gives, in INT8 as well  +  (x A^T) B      A, B: of the row's adapter

A and B are kept in the network's own float, and in bfloat16 beside an INT8 linear, whose rounding is coarser: they are read for
every token. Products and sums are in the network's float either way.

A few rows, such as a decoding step has, are computed in one compiled loop over all adapters, on a GPU in two kernels; more of
them in two products for each run of rows of one adapter. Graphs have a memory of their own for them (`places.py`).

Letters: N rows, I input width, O output width, r rank, R ranks of all adapters together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.sending import sent

if TYPE_CHECKING:
    from shoal.model.net import Net

Pair = tuple[Tensor, Tensor]  # A [r, I] and B [r, O]; the scale is in B
IN_LOOPS = 64  # rows up to which the compiled loop is used (docs/log.md)
NONE = -1  # of a row without an adapter
LINEARS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")  # of a layer


@dataclass(frozen=True, eq=False)
class Adapter:
    """`pairs`: of the linears that it changes, by their names in the network; `identity`: equal for equal weights."""

    identity: str
    pairs: Mapping[str, Pair]


def kept(linear: nn.Module, a: Tensor, b: Tensor) -> Pair:
    """The matrices that stand beside `linear` in the form that they are kept in, where they are."""
    weight = linear.weight
    dtype = torch.bfloat16 if weight.dtype == torch.int8 else weight.dtype
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stack:
    """The matrices of all adapters beside one linear; those of adapter k are the rows first[k] .. last[k] - 1."""

    a: Tensor  # [R, I]
    b: Tensor  # [R, O]
    first: np.ndarray  # int64
    last: np.ndarray

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """On the CPU, as the compiled loops take them: of bfloat16, which numpy has not, the bits."""
        return (*(_array(matrix) for matrix in (self.a, self.b)), self.first, self.last)

    @cached_property
    def bounds(self) -> tuple[Tensor, int]:
        """`first` and `last` where the matrices lie, int32 [2, K], and the most ranks of an adapter."""
        both = np.stack([self.first, self.last]).astype(np.int32)
        return sent(both, self.a.device), int((self.last - self.first).max(initial=0))

    def reads(self, dtype: torch.dtype) -> bool:
        """Do the compiled loops take these matrices beside rows in `dtype`?"""
        return self.a.dtype == dtype or (self.a.dtype == torch.bfloat16 and dtype == torch.float32)


class Bank:
    """Adapters of one network, side by side."""

    def __init__(self, net: nn.Module, adapters: Sequence[Adapter]) -> None:
        self.places = {adapter.identity: k for k, adapter in enumerate(adapters)}
        held = {name for adapter in adapters for name in adapter.pairs}
        self.stacks = {module: _stack(name, adapters) for name, module in net.named_modules() if name in held}

    def beside(self, adapters: Sequence[Adapter | None], counts: Sequence[int]) -> Beside:
        """For so many rows in a row of each of `adapters`, which must be of this bank; None: of no adapter."""
        places = [NONE if adapter is None else self.places[adapter.identity] for adapter in adapters]
        return Beside(self.stacks, np.repeat(np.array(places, dtype=np.int64), counts))


class Beside:
    """What is added to the outputs of linears in one forward."""

    def __init__(self, stacks: Mapping[nn.Module, Stack], of: np.ndarray) -> None:
        """`of` [N]: the adapter of each row, `NONE` for none."""
        self._stacks, self._of = stacks, of

    def first(self, rows: int) -> Beside:
        """Of the first `rows` rows."""
        return self if rows == len(self._of) else Beside(self._stacks, self._of[:rows])

    def arrays(self, linear: nn.Module) -> tuple[np.ndarray, ...]:
        """What `cpu.floats.beside` takes for `linear`, without x and out."""
        stack = self._stacks.get(linear)
        return (*(self._none if stack is None else stack.arrays), self._of)

    @cached_property
    def _none(self) -> tuple[np.ndarray, ...]:
        """Of a linear that no adapter changes."""
        return nothing_beside(next(iter(self._stacks.values())))

    def add(self, linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y` [..., O], what `linear` gave for x [..., I], with what stands beside it; `y` itself is changed."""
        stack = self._stacks.get(linear)
        if stack is None:
            return y
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if len(rows) <= IN_LOOPS and fused.usable(x) and stack.reads(x.dtype):
            a, b, first, last = stack.arrays
            fused.beside(rows, a, b, first, last, self._of, out)
            return y
        if len(rows) <= IN_LOOPS and launch.usable(x):
            launch.add_thin(rows, stack.a, stack.b, *stack.bounds, self._there, out)
            return y
        for start, end, k in self._runs:
            ranks = slice(stack.first[k], stack.last[k])
            if stack.first[k] < stack.last[k]:
                thin = rows[start:end] @ stack.a[ranks].to(x.dtype).T
                out[start:end].addmm_(thin, stack.b[ranks].to(x.dtype))
        return y

    @cached_property
    def _there(self) -> Tensor:
        """The adapter of each row where the matrices lie."""
        return sent(self._of, next(iter(self._stacks.values())).a.device)

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """Start, end and adapter of each run of rows that have the same one."""
        bounds = [0, *(np.flatnonzero(np.diff(self._of)) + 1).tolist(), len(self._of)]
        runs = [(start, end, int(self._of[start])) for start, end in pairwise(bounds)]
        return [run for run in runs if run[2] != NONE]


def product(linear: nn.Module, x: Tensor, beside: Beside | None) -> Tensor:
    """What `linear` gives for x [..., I], with what is beside it."""
    y: Tensor = linear(x)
    return y if beside is None else beside.add(linear, x, y)


def nothing(net: Net) -> Adapter:
    """An adapter that adds nothing, beside each linear of the first layer."""
    pairs = {}
    for name, linear in net.named_modules():
        if name.startswith("groups.0.blocks.0.") and name.endswith(LINEARS):
            outputs, inputs = linear.weight.shape
            pairs[name] = kept(linear, *(torch.zeros(1, width, device=net.device) for width in (inputs, outputs)))
    return Adapter("", pairs)


def alone(net: nn.Module, adapter: Adapter | None, rows: int) -> Beside | None:
    """For `rows` rows, all of `adapter`."""
    return None if adapter is None else Bank(net, [adapter]).beside([adapter], [rows])


def nothing_beside(stack: Stack) -> tuple[np.ndarray, ...]:
    """As `Stack.arrays`, of so many adapters as `stack` has, none of which changes anything."""
    a, none = stack.arrays[0], np.zeros_like(stack.first)
    return np.zeros((1, 1), a.dtype), np.zeros((1, 1), a.dtype), none, none


def _array(matrix: Tensor) -> np.ndarray:
    if matrix.dtype != torch.bfloat16:
        return matrix.numpy()
    bits: np.ndarray = matrix.view(torch.int16).numpy().view(np.uint16)
    return bits


def _stack(name: str, adapters: Sequence[Adapter]) -> Stack:
    pairs = [adapter.pairs.get(name) for adapter in adapters]
    ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
    last = np.cumsum(ranks, dtype=np.int64)
    a, b = (torch.cat([pair[side] for pair in pairs if pair is not None]) for side in (0, 1))
    return Stack(a, b, last - ranks, last)
