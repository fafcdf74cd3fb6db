"""A decoding step's small operators in one call each, for the CPU: the torch side of `decode`.

`usable` says where they can stand in for the torch operators: on the CPU, in inference mode, in fp32 or fp64, with numba
installed (the extra ``cpu``). Everything works without them, and to the same results within rounding.

Letters: as in `decode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from shoal.model.cache import GroupCache, PagedStep
from shoal.model.cpu.parts import Form, Layer, Matrix, Rows, Sight
from shoal.model.reach import Reach

Rope = tuple[Tensor, Tensor]
PLAIN = torch.empty(0, dtype=torch.int32), torch.empty(0)  # shift and scale of a matrix in fp
FEW = {1: 128, 2: 8}  # threads: rows up to which `product` in fp is faster than oneDNN
# new tokens of a request that are attended one by one; longer chunks share what they read (`paged.py`). A token and as many
# drafts as one may ask for are no more (`events.MAX_DRAFTS`): the other way rounds otherwise, and in INT8 that moves roundings
SHORT = 17
FEW_NUMBERS = 65_536  # logits whose sums are made before the interpreter's lock would come back from another thread
_TYPES = (torch.float32, torch.float64)


def usable(x: Tensor) -> bool:
    """May the functions below be used on `x`? Not under a dispatch mode, which could not see what they do, and never under
    torch.compile, whose graph would end at each question below. Only in inference mode: FSDP, which evaluates without it, frees
    memory that numpy would still hold."""
    if torch.compiler.is_compiling():
        return False
    plain = x.device.type == "cpu" and x.dtype in _TYPES and torch.is_inference_mode_enabled()
    return plain and not is_in_torch_dispatch_mode() and _kernels() is not None


@cache
def none(dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """In place of what a layer does not have."""
    return torch.empty(0, dtype=dtype, device=device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    out = torch.empty(x.shape, dtype=x.dtype)
    width = x.shape[-1]
    _call("rms_norm", x.reshape(-1, width), weight, eps, out.view(-1, width))
    return out


def few(rows: int) -> bool:
    """Is `product` there, and faster than oneDNN for so many rows? It uses one thread, so oneDNN is faster where it has
    several."""
    if torch.compiler.is_compiling():
        return False
    return rows <= FEW.get(torch.get_num_threads(), 0) and _kernels() is not None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] times the transpose of weight [O, D], for `few` rows."""
    out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # tiles read rows that lie one after the other
    _call("product", rows, weight.contiguous(), out.view(-1, len(weight)))
    return out


def beside(x: Tensor, numbers: Any, places: Any, of: Any, out: Tensor) -> None:
    """Add to out [N, O] what stands beside x [N, I], which lies in `numbers` at `places`, as of `adapters.Stack`; `of`: the
    adapter of each row."""
    _call("beside", x.contiguous(), numbers, places, of, out)


def swiglu(up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F] for [..., 2F], gate first."""
    inner = up.shape[-1] // 2
    out = torch.empty(*up.shape[:-1], inner, dtype=up.dtype)
    _call("swiglu", up.reshape(-1, 2 * inner), out.view(-1, inner))
    return out


def scale_rows(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x / s and s [N, 1] = max |x| / top of each row of x [N, D]; above 0 for a row of zeros as well."""
    out, scale = torch.empty(x.shape, dtype=x.dtype), torch.empty(len(x), 1, dtype=x.dtype)
    _call("scale_rows", x.contiguous(), top, torch.finfo(x.dtype).tiny, out, scale)
    return out, scale


def project_and_store(
    qkv: Tensor,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    form: Form,
    rope: Rope,
    kv: Tensor,
    summaries: Tensor,
    step: PagedStep,
) -> Tensor:
    """q [N, H, d] of `qkv` [N, (H + 2 Hk) d], normed and turned; k and v are written as `paged.write_kv` writes them. `qkv`
    itself may be changed; `bias` and weights are as in `parts.Layer`."""
    dim = rope[0].shape[-1]
    q = torch.empty(len(qkv), qkv.shape[-1] // dim - 2 * kv.shape[1], dim, dtype=qkv.dtype)
    keep, cross = (table.view(-1, dim) for table in rope)
    _call(
        "project_and_store", qkv.contiguous(), bias, q_weight, k_weight, form.eps, form.half, keep, cross, step.positions,
        step.slots, step.block, kv, summaries, q,
    )  # fmt: skip
    return q


def race(
    logits: Tensor, rows: Sequence[int], likeliest: Tensor, heat: Tensor, lowest: Tensor, ids: Tensor, keys: Any
) -> tuple[Tensor, list[int]]:
    """The token [D] that comes first in each of the `rows` [D] of `logits` [R, V], and the places of those that rounding
    decides; all as of `draw.race`. `lowest` is fp64, and may be what no number of the logits' type is."""
    least = lowest.to(logits.dtype)
    least = torch.where(least < lowest, torch.nextafter(least, torch.full_like(least, torch.inf)), least)
    found, ties = torch.empty(len(rows), dtype=torch.long), torch.empty(len(rows), dtype=torch.bool)
    at, likely, ids = np.array(rows), likeliest[rows], ids.view(torch.uint32)
    _call("race", logits.contiguous(), at, likely, heat, least, ids, keys.view(np.uint32), found, ties)
    return found, ties.nonzero()[:, 0].tolist()


def log_sums(logits: Tensor, rows: Sequence[int]) -> tuple[Any, list[float]]:
    """A copy [D, V] of the `rows` [D] of `logits` [R, V] as numpy has it, and the log of each one's sum of exponentials, as of
    `draw.log_sums`."""
    numbers = _array(logits)
    kept, totals = np.empty((len(rows), numbers.shape[1]), numbers.dtype), np.empty(len(rows))
    _call("few_log_sums" if kept.size <= FEW_NUMBERS else "log_sums", numbers, np.array(rows), kept, totals)
    return kept, totals.tolist()


def thresholds(
    logits: Tensor, rows: Sequence[int], likeliest: Tensor, heat: Tensor, top_k: Tensor, top_p: Tensor, floor: Tensor
) -> Tensor:
    """The least z [D], fp64, that each of the `rows` [D] of `logits` [R, V] keeps; all as of `draw.thresholds`."""
    lowest = torch.empty(len(rows), dtype=torch.double)
    at, likely = np.array(rows), likeliest[rows]
    _call("thresholds", logits.contiguous(), at, likely, heat, top_k, top_p, floor, lowest)
    return lowest


def attend(q: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep, reach: Reach, out: Tensor) -> None:
    """Fill the rows of `out` [N, H, d] that belong to requests of at most `SHORT` new tokens: each row reads its window, its
    chosen blocks and its tail only, what is in two of them once. q [N, H, d]."""
    rows, requests = step.rows.once("short", lambda: _short(step.starts))
    _call(
        "attend", q.contiguous(), kv, summaries, step.tables.contiguous(), rows, requests, step.positions, step.block,
        *_sight(reach, step.tables.shape[1] * step.page, q.dtype), out,
    )  # fmt: skip


class Views:
    """The tensors of a layer as numpy arrays, kept: to make the 17 takes 15 us, and its products in INT8 some 300. They are
    made anew when one of the tensors lies elsewhere; what is changed in place is seen through them."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._arrays: tuple[Any, ...] = ()

    def of(self, layer: Layer) -> tuple[Any, ...]:
        """The arrays of `layer`, as plain tuples."""
        places = [tensor.data_ptr() for tensor in layer.flat()]
        if places != self._places:
            self._places, self._arrays = places, _arrays(layer)
        return self._arrays


def layers(
    x: Tensor,
    parts: Sequence[tuple[tuple[Any, ...], Form, Reach]],
    rope: Rope,
    cache: GroupCache,
    step: PagedStep,
    beside: Sequence[tuple[Any, ...]],
) -> Tensor:
    """x [N, D] after the layers of a group, for requests of at most `SHORT` rows each. `parts`: the weights of each layer as
    `Views` gives them, its form, and how far it looks; `beside`: what adapters add in each, as `decode.layer` takes it, or
    empty. K/V and summaries are written to `cache`."""
    run = _kernels().layer  # type: ignore[union-attr]

    def shared() -> tuple[Any, ...]:  # of every row, since no request has more than `SHORT`
        rows, requests = step.rows.once("short", lambda: _short(step.starts))
        return tuple(
            _array(part) for part in (*(table.flatten(0, -2) for table in rope), step.positions, rows, requests)
        )

    keep, cross, positions, rows, requests = step.rows.by_row("arrays", shared)
    kv, summaries, slots, tables = map(_array, (cache.kv, cache.summaries, step.slots, step.tables.contiguous()))
    state = _array(x.contiguous())
    those = tuple(Rows(keep, cross, positions, slots, tables, rows, requests, step.block))
    most = step.tables.shape[1] * step.page
    for j, (weights, form, reach) in enumerate(parts):
        added = beside[j] if beside else no_adapters(weights)
        state = run(state, weights, tuple(form), those, kv[j], summaries[j], _seen(reach, most, x.dtype), added)
    return torch.from_numpy(state)


class Stretch:
    """The layers of a group, for one row of each of R requests at a time and K times, at places that are known before the rows
    are: so all else that `layers` is given is made once. Letters: K times, of which the last may be left out."""

    def __init__(
        self,
        parts: Sequence[tuple[tuple[Any, ...], Form, Reach]],
        rope: Rope,
        cache: GroupCache,
        positions: np.ndarray,
        slots: np.ndarray,
        tables: np.ndarray,
    ) -> None:
        """Rows stand at `positions` [K, R], and their K/V are written to `slots` [K, R] of `cache`, -1 where they are stored
        already; `tables` [R, M]: the pages of each request; `rope` of the K R positions, in order."""
        page, blocks = cache.kv.shape[3], cache.summaries.shape[3]
        kv, summaries = _array(cache.kv), _array(cache.summaries)
        most, kind = tables.shape[1] * page, rope[0].dtype
        self._keep, self._cross = (_array(table).reshape(*positions.shape, -1) for table in rope)
        self._positions, self._slots, self._tables = positions, slots, tables
        self._each, self._block = np.arange(positions.shape[1]), page // blocks
        self._layers = [
            (weights, tuple(form), kv[j], summaries[j], _seen(reach, most, kind), no_adapters(weights))
            for j, (weights, form, reach) in enumerate(parts)
        ]
        self._run = _kernels().layer  # type: ignore[union-attr]

    def after(self, x: np.ndarray, time: int) -> np.ndarray:
        """x [r, D] after the layers, for the rows that the first r requests have at this `time` of the K."""
        count, state = len(x), x
        each = self._each[:count]
        rows = (
            self._keep[time, :count], self._cross[time, :count], self._positions[time, :count], self._slots[time, :count],
            self._tables[:count], each, each, self._block,
        )  # fmt: skip
        for weights, form, kv, summaries, sight, added in self._layers:
            state = self._run(state, weights, form, rows, kv, summaries, sight, added)
        return state


class Head:
    """What tokens are drawn from at an exit, for rows that follow each other: what does not change from row to row is looked up
    once."""

    def __init__(self, norm: Tensor, eps: float, matrix: Matrix) -> None:
        """`norm` [D] and `eps` of the exit; the head's `matrix` [V, D]."""
        self._norm, self._eps, self._matrix = _array(norm), eps, tuple(map(_array, matrix))

    def logits(self, x: np.ndarray) -> np.ndarray:
        """[r, V] of x [r, D], the states at the exit."""
        normed, (weight, shift, scale) = np.empty_like(x), self._matrix
        kernels: Any = _kernels()
        kernels.rms_norm(x, self._norm, self._eps, normed)
        out = np.empty((len(x), len(weight)), x.dtype)
        if weight.dtype == np.int8:
            kernels.integers.linear(normed, weight, shift, scale, out)
        else:
            kernels.product(normed, weight, out)
        return out


# What `decode.layer` takes as `beside` where no row has an adapter, by the type of the layer's weights. Of the types that it
# has with one (`adapters.kept`), or all loops of a layer would be compiled for both.
_NO_ADAPTERS = {
    np.dtype(kind): (np.zeros(0, held), np.zeros((4, 0, 3), np.int64), np.zeros(0, np.int64))
    for kind, held in ((np.float32, np.float32), (np.float64, np.float64), (np.int8, np.uint16))
}


def no_adapters(weights: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    """For a layer with these `weights`, as `parts.Layer` names them."""
    return _NO_ADAPTERS[weights[1][0].dtype]


def _arrays(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_arrays(part) if isinstance(part, tuple) else _array(part) for part in tensors)


def _seen(reach: Reach, most: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """`_sight` as the loops are given it."""
    return tuple(_array(part) if isinstance(part, Tensor) else part for part in _sight(reach, most, dtype))


def _sight(reach: Reach, most: int, dtype: torch.dtype) -> Sight:
    """How far a layer looks, over `most` token slots of its pages at most: the loops make room for as much."""
    gamma, bias = (none(dtype) if each is None else each for each in (reach.gamma, reach.bias))
    return Sight(min(reach.window, most), reach.top_k, reach.sinks, gamma, bias, min(reach.dense, most))


def _short(starts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of the requests with at most `SHORT` rows, and the request of each."""
    pairs = [(n, r) for r, (a, b) in enumerate(pairwise(starts)) if b - a <= SHORT for n in range(a, b)]
    rows = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T.contiguous()
    return rows[0], rows[1]


@contextmanager
def compiling() -> Iterator[None]:
    """A block in which the loops may be compiled: `compiled.alone`, or nothing without numba."""
    if _kernels() is None:
        yield
        return
    from shoal.model.cpu import compiled

    with compiled.alone():
        yield


@cache
def _kernels() -> ModuleType | None:
    try:
        from shoal.model.cpu import decode
    except ImportError:  # no numba
        return None
    return decode


def _call(name: str, *args: Any) -> Any:
    return getattr(_kernels(), name)(*[_array(arg) if isinstance(arg, Tensor) else arg for arg in args])


def _array(x: Tensor) -> Any:
    return x.detach().numpy() if x.requires_grad else x.numpy()
