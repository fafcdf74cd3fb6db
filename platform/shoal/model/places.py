"""Adapters in memory that stays where it is, so that a graph (`engine/graphs.py`) can hold products with them: each has a
place, and which place a row has is read on the device.

An adapter that is asked for and has no place gets that of the one that was not asked for the longest, and its matrices are
written there, behind the launches that read what lay there before. Memory grows with what is asked for, and is then made
anew: graphs that hold the old one are to be ended (`Places.made`).

Letters: N rows, I input width, O output width, K places, r room of one in ranks, L linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shoal.model.adapters import NONE, Adapter, Beside
from shoal.model.gpu import launch
from shoal.model.sending import send

MOST = 8  # adapters of a step that graphs are for, and that have places at once


@dataclass(frozen=True, eq=False)
class Place:
    """All places beside one linear: place k has the rows bounds[0, k] up to bounds[1, k] of `a` and `b`, `room` at most."""

    a: Tensor  # [K r, I]
    b: Tensor  # [K r, O]
    bounds: Tensor  # int32 [2, K]
    room: int

    def add(self, x: Tensor, of: Tensor, out: Tensor) -> None:
        """Add to out [N, O] what stands beside the linear for the rows x [N, I] at the places `of` [N] [below 0: none]."""
        if launch.usable(x):
            launch.add_thin(x, self.a, self.b, self.bounds, self.room, of, out)
            return
        start, end = self.bounds[:, of.clamp(min=0)].long()
        ranks = start[:, None] + torch.arange(self.room, device=x.device)
        there = (ranks < end[:, None]) & (of >= 0)[:, None]
        ranks = torch.where(there, ranks, 0)
        # what lies at no place, or did before, counts for nothing, though it were no number
        thin = (self.a[ranks].to(x.dtype) @ x[:, :, None])[:, :, 0].masked_fill(~there, 0)
        out += (thin[:, None] @ self.b[ranks].to(x.dtype).masked_fill(~there[:, :, None], 0))[:, 0]


class Placed(Beside):
    """What is added in one forward to the outputs of linears, for rows at the places `of` [N], a tensor on the device."""

    def __init__(self, places: Mapping[nn.Module, Place], of: Tensor) -> None:
        self._places, self._rows = places, of

    def first(self, rows: int) -> Placed:
        return Placed(self._places, self._rows[:rows])

    def add(self, linear: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        place = self._places.get(linear)
        if place is not None:
            place.add(x.reshape(-1, x.shape[-1]), self._rows, y.view(-1, y.shape[-1]))
        return y


class Places:
    """Of one network."""

    def __init__(self, net: nn.Module) -> None:
        self._net = [net]  # in a list, or it would be a part of who holds this
        self.made = 0  # how often the memory was
        self.beside: dict[nn.Module, Place] = {}
        self._linears: dict[str, nn.Module] = {}
        self._count = self._room = 0
        self._held: dict[str, int] = {}  # identity -> place; who was not asked for the longest comes first
        self._bounds: Tensor  # int32 [L, 2, K]; `_host` is what it holds
        self._host: np.ndarray

    def of(self, adapters: Sequence[Adapter | None]) -> list[int]:
        """The place of each of `adapters`, at most `MOST` of which differ; `NONE` for None."""
        asked = {adapter.identity: adapter for adapter in adapters if adapter is not None}
        if not asked:
            return [NONE] * len(adapters)
        self._fit(asked)
        for identity, adapter in asked.items():
            place = self._held.pop(identity, None)
            if place is None:
                place = self._freed(asked)
                self._write(place, adapter)
            self._held[identity] = place
        return [NONE if adapter is None else self._held[adapter.identity] for adapter in adapters]

    def _fit(self, asked: Mapping[str, Adapter]) -> None:
        """Make the memory anew where it has not the linears, ranks or places of `asked`; nobody has a place in it then."""
        pairs = [(name, pair) for adapter in asked.values() for name, pair in adapter.pairs.items()]
        ranks = max(len(a) for _, (a, _) in pairs)  # who has no matrices is no adapter: it was refused
        new = sum(identity not in self._held for identity in asked)
        count = min(MOST, max(len(asked), len(self._held) + new))
        missing = {name: pair for name, pair in pairs if name not in self._linears}
        if ranks <= self._room and count <= self._count and not missing:
            return
        room, count = max(self._room, _power(ranks)), max(self._count, _power(count))
        modules = dict(self._net[0].named_modules())
        # what each linear's matrices are like: their widths, kind and device
        like = {
            name: (self.beside[linear].a, self.beside[linear].b) for name, linear in self._linears.items()
        } | missing
        device = next(iter(like.values()))[0].device
        bounds, beside = torch.zeros(len(like), 2, count, dtype=torch.int32, device=device), dict[nn.Module, Place]()
        for index, (name, pair) in enumerate(like.items()):
            a, b = (each.new_zeros(count * room, each.shape[1]) for each in pair)
            beside[modules[name]] = Place(a, b, bounds[index], room)
        self._linears = {name: modules[name] for name in like}
        self.beside, self._bounds, self._host = beside, bounds, np.zeros(bounds.shape, dtype=np.int32)
        self._count, self._room, self._held = count, room, {}
        self.made += 1

    def _freed(self, asked: Mapping[str, Adapter]) -> int:
        """A place that nobody has; if there is none, of who was not asked for the longest and is not now."""
        free = {*range(self._count)} - {*self._held.values()}
        return min(free) if free else self._held.pop(next(each for each in self._held if each not in asked))

    def _write(self, place: int, adapter: Adapter) -> None:
        for index, (name, linear) in enumerate(self._linears.items()):
            pair, to, start = adapter.pairs.get(name), self.beside[linear], place * self._room
            ranks = 0 if pair is None else len(pair[0])
            if pair is not None:
                to.a[start : start + ranks].copy_(pair[0])
                to.b[start : start + ranks].copy_(pair[1])
            self._host[index, :, place] = start, start + ranks
        send(self._host, self._bounds)


def _power(size: int) -> int:
    """The power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
