"""Decoding steps as graphs: the launches of a layer group over so many rows, recorded once and replayed with one call.

    group j, b rows    states[j][:b] = the layers of group j over states[j - 1][:b]; the first one embeds, and makes rope
    exit e, b rows     normed[:b], of those rows alone that go as deep as e; a deeper exit comes after, and overwrites its own
    head, b rows       logits[:b] = normed[:b] times the head

A step of depths "full" and "shallow" replays group 1 over the bucket of all rows, the deeper groups over the bucket of those
that go on, an exit for each depth, and the head. A graph holds addresses and no Python, so whatever differs between two steps
lies in memory that stays where it is. A bucket's rows beyond the step's have slot -1: they store nothing, and nobody reads what
they give. Weights may be replaced or changed, which ends all graphs; prompts, drafts, rows of adapters and those whose exits
are compared take the other way (`takes`). Grammars and penalties change logits, which are the sampler's: they end no graph.

Letters: N rows of a step, b rows of a bucket, B of the largest, G layer groups, M pages of a context, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import GROUPS
from shoal.engine.device import sent
from shoal.engine.plan import Work
from shoal.errors import first_line
from shoal.model.block import rope_rates, rope_tables
from shoal.model.cache import GroupCache, PagedStep, Rows
from shoal.model.gpu import launch
from shoal.model.linears import Held
from shoal.model.net import Net

log = logging.getLogger(__name__)
Run = Callable[[], None]
Record = Callable[[Run], Run]  # what is given runs once or more, and what comes back does the same again

MOST_ROWS = 512  # of a step: more rows are so much work that their launches do not count
LEAST_TOKENS = 1024  # of the narrowest table
_FULL = (
    "the GPU's memory is not enough for graphs of %d requests, so steps of more than %d are launched one by one, slower;"
    " lower gpu_share or max_batch: %s"
)


def buckets(most: int) -> list[int]:
    """Rows that graphs are made for, up to `most` and it itself: 1, 2, 4, 8, and from there powers of two and what lies between
    two of them, so that less than a third of a bucket is too many."""
    sizes = [1, 2, 4, *(size for k in range(3, most.bit_length()) for size in (2**k, 3 * 2 ** (k - 1)))]
    return [*(size for size in sizes if size < most), most]


class Graphs:
    """Of one engine, whose K/V memory is `cache`. Used within `torch.inference_mode`."""

    def __init__(self, net: Net, cache: GroupCache, most: int, record: Record) -> None:
        """For steps of up to `most` rows. `record`: on a device `Recorder`."""
        c, device = net.config, net.device
        self._net, self._cache, self._record = net, cache, record
        self._buckets, self._pages = buckets(min(most, MOST_ROWS)), -(-c.context // c.page)
        rows = self._buckets[-1]
        self._weights = Held(net)
        self._seen: list[object] = []
        self._made: dict[tuple[Any, ...], Run] = {}  # of what, rows, and what else it is of
        # of each group how many rows go through it; ids, positions, and slots of each group; made in one memory, to be one copy
        pinned = device.type == "cuda" and torch.cuda.is_available()
        self._host = torch.zeros(GROUPS + (2 + GROUPS) * rows, dtype=torch.long, pin_memory=pinned)
        self._numbers = self._host.to(device)
        self._going, self._rows = self._parts(self._numbers)
        going, numbers = self._parts(self._host)
        self._host_going, self._host_rows = going.numpy(), numbers.numpy()
        self._host_rows[2:] = -1
        self._numbers.copy_(self._host)
        self._tables = torch.zeros(GROUPS, rows, self._pages, dtype=torch.long, device=device)
        self._filled: np.ndarray = np.empty(())  # what of them was copied last
        self._states = torch.zeros(GROUPS, rows, c.width, dtype=net.dtype, device=device)
        self._normed = torch.zeros(rows, c.width, dtype=net.dtype, device=device)
        exact = launch.fp(net.dtype) if device.type in launch.ON else net.dtype
        self._logits = torch.zeros(rows, c.vocab, dtype=exact, device=device)
        self._rope = torch.zeros(2, rows, 1, c.head_dim, dtype=exact, device=device)
        self._rates = rope_rates(c, device)
        self._requests = torch.arange(rows, dtype=torch.int32, device=device)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return numbers[:GROUPS], numbers[GROUPS:].view(2 + GROUPS, -1)

    def takes(self, works: Sequence[Work]) -> bool:
        """Is a step of `works` one that graphs are for: one row a request, which gives a token, and nothing else?"""
        return 0 < len(works) <= max(self._buckets, default=0) and all(
            work.count == 1 and work.sample and work.first == 0 and work.running.adapter is None
            and not (work.hold or work.decide or work.score or work.drafts or work.verify or work.running.request.gaps)
            for work in works
        )  # fmt: skip

    def run(self, works: Sequence[Work]) -> Tensor | None:
        """Logits [N, V] of `works`, which `takes` allows; their K/V are written. They stay until the next call. None where the
        memory lacks for a graph: nor are there any for as many rows from then on. Raises what recording raises."""
        try:
            return self._run(works)
        except RuntimeError as error:
            self._fewer(self._bucket(len(works)), error)
            return None

    def _run(self, works: Sequence[Work]) -> Tensor:
        state = self._state()
        if state != self._seen:
            self._seen = state
            self._made.clear()
        width, ends = self._fill(works), self._net.config.ends
        for j in range(works[0].last):
            going = int(self._host_going[j])
            rows = self._bucket(going)
            self._play(("group", rows, j, width), lambda j=j, b=rows: self._group(j, b, width))  # type: ignore[misc]
            if j + 1 == GROUPS or going > self._host_going[j + 1]:
                self._play(("exit", rows, j), lambda j=j, b=rows: self._exit(j, b, ends[j]))  # type: ignore[misc]
        rows = self._bucket(len(works))
        self._play(("head", rows), lambda: self._head(rows))
        return self._logits[: len(works)]

    def prepare(self) -> None:
        """Record what a step over short contexts replays, of each bucket, so that no request waits; of the smaller ones alone
        where the memory is not enough for more. No slot is written."""
        self._seen = self._state()
        for rows in self._buckets:
            try:
                self._prepare(rows)
            except RuntimeError as error:
                self._fewer(rows, error)
                return

    def _prepare(self, b: int) -> None:
        width, ends = self._width(1), self._net.config.ends
        for j in range(GROUPS):
            self._play(("group", b, j, width), lambda j=j: self._group(j, b, width))  # type: ignore[misc]
            if ends[j] in self._net.config.exits:
                self._play(("exit", b, j), lambda j=j: self._exit(j, b, ends[j]))  # type: ignore[misc]
        self._play(("head", b), lambda: self._head(b))

    def _fewer(self, rows: int, error: RuntimeError) -> None:
        """Let go of the graphs for `rows` and more, for which the memory was not enough; raises any other `error`."""
        if not _of_memory(error):
            raise error
        self._buckets = [size for size in self._buckets if size < rows]
        self._made = {key: run for key, run in self._made.items() if key[1] < rows}
        torch.cuda.empty_cache()  # which does nothing where there is none
        log.warning(_FULL, rows, max(self._buckets, default=0), first_line(error))

    def _state(self) -> list[object]:
        """What a graph was made of, beside memory that stays: weights, and what else may be set at a layer."""
        layers = [block.attention for group in self._net.groups for block in group.blocks]  # type: ignore[union-attr]
        return [*self._weights.state(), *(layer.mix_local for layer in layers)]

    def _play(self, key: tuple[Any, ...], run: Run) -> None:
        if key not in self._made:
            self._made[key] = self._record(run)
        self._made[key]()

    def _bucket(self, rows: int) -> int:
        return self._buckets[bisect_left(self._buckets, rows)]

    def _width(self, pages: int) -> int:
        """Pages of a table that holds `pages`: a power of two of them, so that few widths are recorded."""
        return min(self._pages, max(LEAST_TOKENS // self._net.config.page, 1 << (pages - 1).bit_length()))

    def _fill(self, works: Sequence[Work]) -> int:
        """Copy to the device what it must know of `works`, in one copy, and their tables, if they have changed, in another.
        Returns the tables' width."""
        page, count, rows = self._net.config.page, len(works), self._host_rows
        longest = max(work.start for work in works) // page + 1
        width = self._width(longest)
        tables = np.zeros((GROUPS, count, longest), dtype=np.int64)
        for r, work in enumerate(works):
            own = work.running.holding.tables[:, :longest]
            tables[:, r, : own.shape[1]] = own
        positions = np.array([work.start for work in works])
        rows[0, :count] = [work.running.tokens[work.start] for work in works]
        rows[1, :count], rows[:2, count:], rows[2:] = positions, 0, -1
        last = np.array([work.last for work in works])
        self._host_going[:] = [(last > j).sum() for j in range(GROUPS)]
        computed = np.array([work.running.holding.computed for work in works]).T  # [G, N]
        slots = tables[:, np.arange(count), positions // page] * page + positions % page
        written = (computed <= positions) & (last > np.arange(GROUPS)[:, None])
        rows[2:, :count] = np.where(written, slots, -1)
        self._numbers.copy_(self._host, non_blocking=True)
        if not np.array_equal(tables, self._filled):
            self._tables[:, :count, :longest].copy_(sent(tables, self._tables.device))
            self._filled = tables
        return width

    # --- what is recorded: it reads and writes memory that stays, and has its sizes from its arguments alone ------------------

    def _group(self, j: int, b: int, width: int) -> None:
        net, c, positions = self._net, self._net.config, self._rows[1, :b]
        shared = Rows(positions, list(range(b + 1)), c.page, c.block)
        shared.once("requests", lambda: self._requests[:b])
        rope = self._rope[:, :b].unbind()
        shared.once(("rope", self._rope.dtype), lambda: rope)
        if j:
            x = self._states[j - 1, :b]
        else:
            x = net.embed_inputs(self._rows[0, :b])
            for kept, made in zip(rope, rope_tables(positions, c, self._rope.dtype, self._rates), strict=True):
                kept.copy_(made)
        tables = self._tables[j, :b, :width]
        step = PagedStep(positions, self._rows[2 + j, :b], tables, shared.starts, c.page, c.block, shared=shared)
        out: Tensor = net.groups[j].stepped(x, step, self._cache)  # type: ignore[operator]
        self._states[j, :b].copy_(out)

    def _exit(self, j: int, b: int, layers: int) -> None:
        normed = self._net.exit(self._states[j, :b], layers)
        leaves = (self._requests[:b] < self._going[j])[:, None]
        self._normed[:b].copy_(torch.where(leaves, normed, self._normed[:b]))

    def _head(self, b: int) -> None:
        self._logits[:b].copy_(self._net.logits(self._normed[:b]))


def _of_memory(error: BaseException | None) -> bool:
    """Does it say that memory was not enough? A recording that ends for it may fail to end, and says that instead."""
    if error is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or _of_memory(error.__context__)


_RECORDING = Lock()  # of the process: a recording begins with a wait for all of a device, which would end another one


class Recorder:
    """`Record` on a CUDA device: the launches of each graph into a `torch.cuda.CUDAGraph`. All share their memory, as none is
    replayed beside another, and nothing of it is read after a graph. Engines of a process record one after the other."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Run) -> Run:
        with _RECORDING:
            self._stream.wait_stream(torch.cuda.current_stream())
            # kernels are compiled, and workspaces made, before anything is recorded
            with torch.cuda.stream(self._stream):
                run()
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            how: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
            # of this thread alone: another one may load the weights of a version at this moment
            with torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                run()
        return graph.replay


def of_device(net: Net, cache: GroupCache, most: int) -> Graphs | None:
    """On a CUDA device with Triton, whose kernels wait for nothing; None elsewhere, and where contexts are so long that a row's
    blocks are not chosen by them."""
    c = net.config
    if net.device.type != "cuda" or not torch.cuda.is_available() or not launch.able(net.device):
        return None
    if c.context // c.block > launch.MOST_BLOCKS:
        return None
    try:
        return Graphs(net, cache, most, Recorder())
    except torch.OutOfMemoryError as error:
        log.warning(_FULL, most, 0, first_line(error))
        return None
