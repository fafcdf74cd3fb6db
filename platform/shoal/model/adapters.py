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
IN_LOOPS = 64  # rows up to which the compiled loop is used
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
    within: tuple[Tensor, int, int] | None = None  # on a CPU the memory of the layer, and where the two begin there

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """On the CPU, as the compiled loops take them: the numbers (of bfloat16, which numpy has not, the bits), and for each
        adapter where its A and its B begin there, and their rank, int64 [K, 3]."""
        memory, a, b = self.within or (torch.cat([self.a.flatten(), self.b.flatten()]), 0, self.a.numel())
        begin = a + self.first * self.a.shape[1], b + self.first * self.b.shape[1]
        return _array(memory), np.stack([*begin, self.last - self.first], axis=1)

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
        layers: dict[str, dict[str, nn.Module]] = {}
        for name, module in net.named_modules():
            if name in held:
                layers.setdefault(_layer(name), {})[name] = module
        self.stacks: dict[nn.Module, Stack] = {}
        for linears in layers.values():
            self.stacks |= zip(linears.values(), _stacks([*linears], adapters), strict=True)
        self._layers: dict[nn.Module, tuple[np.ndarray, ...]] = {}

    def beside(self, adapters: Sequence[Adapter | None], counts: Sequence[int]) -> Beside:
        """For so many rows in a row of each of `adapters`, which must be of this bank; None: of no adapter."""
        places = [NONE if adapter is None else self.places[adapter.identity] for adapter in adapters]
        return Beside(self.stacks, np.repeat(np.array(places, dtype=np.int64), counts), self._layers)


class Beside:
    """What is added to the outputs of linears in one forward."""

    def __init__(
        self, stacks: Mapping[nn.Module, Stack], of: np.ndarray, layers: dict[nn.Module, tuple[np.ndarray, ...]]
    ) -> None:
        """`of` [N]: the adapter of each row, `NONE` for none; `layers`: what `layer` keeps of the same stacks."""
        self._stacks, self._of, self._layers = stacks, of, layers

    def first(self, rows: int) -> Beside:
        """Of the first `rows` rows."""
        return self if rows == len(self._of) else Beside(self._stacks, self._of[:rows], self._layers)

    def layer(self, linears: Sequence[nn.Module]) -> tuple[np.ndarray, ...]:
        """What `cpu.decode.layer` takes for a layer that has these `linears`."""
        if (found := self._layers.get(linears[0])) is None:
            found = self._layers[linears[0]] = self._of_layer([self._stacks.get(linear) for linear in linears])
        return (*found, self._of)

    def _of_layer(self, stacks: Sequence[Stack | None]) -> tuple[np.ndarray, ...]:
        """The numbers of a layer, and their places beside each of its linears, int64 [L, K, 3]."""
        some = next((stack for stack in stacks if stack is not None), None)
        none = next(iter(self._stacks.values())).arrays
        numbers = np.zeros(0, none[0].dtype) if some is None else some.arrays[0]
        places = [np.zeros_like(none[1]) if stack is None else stack.arrays[1] for stack in stacks]
        return numbers, np.stack(places)

    def add(self, linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y` [..., O], what `linear` gave for x [..., I], with what stands beside it; `y` itself is changed."""
        stack = self._stacks.get(linear)
        if stack is None:
            return y
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if len(rows) <= IN_LOOPS and fused.usable(x) and stack.reads(x.dtype):
            fused.beside(rows, *stack.arrays, self._of, out)
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


def _layer(name: str) -> str:
    """Of the linear that is named so in a network."""
    return name.removesuffix(next((each for each in LINEARS if name.endswith(each)), ""))


def _array(matrix: Tensor) -> np.ndarray:
    if matrix.dtype != torch.bfloat16:
        return matrix.numpy()
    bits: np.ndarray = matrix.view(torch.int16).numpy().view(np.uint16)
    return bits


def _stacks(names: Sequence[str], adapters: Sequence[Adapter]) -> list[Stack]:
    """Of the linears of a layer. On a CPU all matrices lie one after the other in one memory: its loops are given it whole, as
    each array that they are given takes two tenths of a microsecond (decision 0011)."""
    held = [[adapter.pairs.get(name) for adapter in adapters] for name in names]
    sides = [[[pair[side] for pair in pairs if pair is not None] for side in (0, 1)] for pairs in held]
    on_cpu = sides[0][0][0].device.type == "cpu"
    memory = torch.cat([matrix.flatten() for both in sides for side in both for matrix in side]) if on_cpu else None
    found, at = list[Stack](), 0
    for pairs, (narrow, wide) in zip(held, sides, strict=True):
        ranks = np.array([0 if pair is None else len(pair[0]) for pair in pairs], dtype=np.int64)
        last = ranks.cumsum()
        if memory is None:
            found.append(Stack(torch.cat(narrow), torch.cat(wide), last - ranks, last))
            continue
        rows, inputs, outputs = int(last[-1]), narrow[0].shape[1], wide[0].shape[1]
        begin, between, at = at, at + rows * inputs, at + rows * (inputs + outputs)
        a, b = memory[begin:between].view(rows, inputs), memory[between:at].view(rows, outputs)
        found.append(Stack(a, b, last - ranks, last, (memory, begin, between)))
    return found
