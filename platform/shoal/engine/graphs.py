"""Decoding steps as graphs: the launches of a layer group over so many rows, recorded once and replayed with one call.

    group j, b rows    states[j][:b] = the layers of group j over states[j - 1][:b]; the first one embeds, and makes rope
    exit e, b rows     normed[:b], of those rows alone that go as deep as e; a deeper exit comes after, and overwrites its own
    head, b rows       logits[:b] = normed[:b] times the head

A step of depths "full" and "shallow" replays group 1 over the bucket of all rows, the deeper groups over the bucket of those
that go on, an exit for each depth, and the head. A graph holds addresses and no Python, so whatever differs between two steps
lies in memory that stays where it is (`told.py`). A bucket's rows beyond the step's have slot -1: they store nothing, and
nobody reads what they give. Weights may be replaced or changed, which ends all graphs; prompts take the other way (`takes`).
Grammars and penalties change logits, which are the sampler's: they end no graph.

Where somebody drafts, a step is several: group 1, the first exit and the head over one row of each that drafts on, again and
again, the first time over all others' rows, too; then the deeper groups over all rows that this gave, each by itself: it reads
the keys up to its own, which rows of the same request wrote before in the same layer. As they do so in one launch, what a
block is scored by is written in a launch of its own, and each row has its request's table, picked from the tables in the graph.

Where somebody has an adapter, groups are others, recorded when that is first so: what stands beside the linears lies in places
(`model/places.py`), and which one a row has is told with it.

Letters: N rows of a step, b rows of a bucket, B of the largest, R requests, G layer groups, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from shoal.config import GROUPS
from shoal.engine.device import RECORDING, give_back
from shoal.engine.events import MAX_DRAFTS
from shoal.engine.plan import Work
from shoal.engine.told import ADAPTERS, IDS, POSITIONS, REQUESTS, SLOTS, Told
from shoal.errors import first_line
from shoal.model.block import rope_rates, rope_tables
from shoal.model.cache import GroupCache, PagedStep, Rows
from shoal.model.gpu import launch
from shoal.model.linears import Held
from shoal.model.net import Net
from shoal.model.places import MOST as MOST_ADAPTERS
from shoal.model.places import Placed, Places
from shoal.model.sending import sent

log = logging.getLogger(__name__)
T = TypeVar("T")
Run = Callable[[], None]
Record = Callable[[Run], Run]  # what is given runs once or more, and what comes back does the same again

MOST_ROWS = 512  # of a step: more rows are so much work that their launches do not count
LEAST_TOKENS = 1024  # of the narrowest table
_FULL = (
    "the GPU's memory is not enough for graphs of %d %s, so steps of more than %d are launched one by one, slower;"
    " lower gpu_share or max_batch: %s"
)


class Kind(NamedTuple):
    """Of steps that replay the same graphs of groups."""

    drafts: bool = False  # somebody drafts
    adapted: bool = False  # somebody has an adapter

    @classmethod
    def of(cls, works: Sequence[Work], drafts: bool) -> Kind:
        return cls(drafts, any(work.running.adapter is not None for work in works))

    @property
    def rows(self) -> str:
        """What the log calls them."""
        return ("rows with drafts" if self.drafts else "requests") + " and adapters" * self.adapted


PLAIN, DRAFTS, ADAPTED, BOTH = Kind(), Kind(drafts=True), Kind(adapted=True), Kind(drafts=True, adapted=True)


def buckets(most: int) -> list[int]:
    """Rows that graphs are made for, up to `most` and it itself: 1, 2, 4, 8, and from there powers of two and what lies between
    two of them, so that less than a third of a bucket is too many."""
    sizes = [1, 2, 4, *(size for k in range(3, most.bit_length()) for size in (2**k, 3 * 2 ** (k - 1)))]
    return [*(size for size in sizes if size < most), most]


class Graphs:
    """Of one engine, whose K/V memory is `cache`. Used within `torch.inference_mode`."""

    def __init__(self, net: Net, cache: GroupCache, most: int, record: Record) -> None:
        """For steps of up to `most` requests. `record`: on a device `Recorder`."""
        c, device = net.config, net.device
        self._net, self._cache, self._record = net, cache, record
        self._pages, self._most = -(-c.context // c.page), min(most, MOST_ROWS)
        plain = buckets(self._most)
        # of drafts one for each request, or as many as one may ask for: many requests that draft much are busy with products
        rows = min(MOST_ROWS, max(2 * self._most, MAX_DRAFTS + 1)) if len(c.exits) > 1 else self._most
        more = [*plain, *(size for size in buckets(rows) if size > self._most)]
        more = more if len(c.exits) > 1 else []
        self._buckets = {PLAIN: plain, DRAFTS: more, ADAPTED: plain, BOTH: more}
        self._weights = Held(net)
        self._seen: list[object] = []
        self._made: dict[tuple[Any, ...], Run] = {}  # of what, rows, and what else it is of
        self._places, self._placed = Places(net), 0
        self._told = Told(c, self._most, rows, device)
        self._states = torch.zeros(GROUPS, rows, c.width, dtype=net.dtype, device=device)
        self._normed = torch.zeros(rows, c.width, dtype=net.dtype, device=device)
        exact = launch.fp(net.dtype) if device.type in launch.ON else net.dtype
        self._logits = torch.zeros(rows, c.vocab, dtype=exact, device=device)
        self._rope = torch.zeros(2, rows, 1, c.head_dim, dtype=exact, device=device)
        self._rates = rope_rates(c, device)
        self._numbered = torch.arange(rows, dtype=torch.int32, device=device)

    def takes(self, works: Sequence[Work]) -> bool:
        """Is a planned step of `works` one that graphs are for: one row a request, which gives a token, with drafts or not, and
        nothing else?"""
        kind, rows = Kind.of(works, any(work.drafts for work in works)), sum(1 + work.drafts for work in works)
        if not 0 < len(works) <= self._most or rows > max(self._buckets[kind], default=0):
            return False
        if len({work.running.adapter for work in works} - {None}) > MOST_ADAPTERS:
            return False
        return all(
            work.count == 1 and work.sample and work.first == 0
            and not (work.hold or work.decide or work.score or work.verify) for work in works
        )  # fmt: skip

    def first(
        self,
        planned: Sequence[Work],
        works: Sequence[Work],
        requests: Sequence[int],
        going: int,
        newest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Of a step of `planned` that drafts: states after group 1 [N, D] of `works`, one row each of the requests numbered
        `requests` there, whose tokens are `newest` [N] [those that the host knows]; and logits [going, V] of the first `going`
        at the first exit, None of none. Logits stay until the next call. None and errors: as of `run`."""
        kind = Kind.of(planned, drafts=True)
        return self._tried(kind, len(works), lambda: self._first(planned, works, requests, going, newest, kind))

    def run(self, works: Sequence[Work]) -> Tensor | None:
        """Logits [N, V] of all rows of `works`, a planned step which `takes` allows, or what became of its drafts: then the
        states of all rows after group 1 are with the requests. K/V are written. They stay until the next call. None where the
        memory lacks for a graph: nor are there any for as many rows from then on. Raises what recording raises."""
        kind = Kind.of(works, drafts=works[0].first > 0)
        return self._tried(kind, sum(work.count for work in works), lambda: self._run(works, kind))

    def exits(self, rows: Sequence[int]) -> list[Tensor]:
        """Of each early exit what the head reads there [R, D], of the `rows` [R] of the last `run`, which went through all
        groups. In launches of their own: nearly nobody asks."""
        c, at = self._net.config, sent(rows, self._net.device)
        return [self._net.exit(self._states[j].index_select(0, at), c.ends[j]) for j in map(c.ends.index, c.exits[:-1])]

    def prepare(self) -> None:
        """Record what a step over short contexts replays, of each bucket, so that no request waits; of the smaller ones alone
        where the memory is not enough for more, and with drafts last. Those with adapters are recorded when one is first asked
        for. No slot is written."""
        self._seen = self._state()
        for kind in (PLAIN, DRAFTS):
            for rows in self._buckets[kind]:
                if self._tried(kind, rows, lambda k=kind, b=rows: self._prepare(k, b)) is None:  # type: ignore[misc]
                    break

    def _tried(self, kind: Kind, rows: int, call: Callable[[], T]) -> T | None:
        """What `call` gives for so many rows; None where there are no graphs for them, or no memory."""
        if rows > max(self._buckets[kind], default=0):
            return None
        try:
            return call()
        except RuntimeError as error:
            self._fewer(kind, self._bucket(kind, rows), error)
            return None

    def _first(
        self,
        planned: Sequence[Work],
        works: Sequence[Work],
        requests: Sequence[int],
        going: int,
        newest: Tensor | None,
        kind: Kind,
    ) -> tuple[Tensor, Tensor | None]:
        (width, places), count = self._begin(planned), len(works)
        self._told.fill(works, requests, [places[request] for request in requests])
        if newest is not None:
            self._told.rows[IDS, :count].copy_(newest)
        self._play_group(0, self._bucket(kind, count), width, kind)
        states = self._states[0, :count].clone()  # they wait for the deeper groups, and the next row comes here
        if not going:
            return states, None
        rows = self._bucket(kind, going)
        self._play_exit(0, rows)
        self._play_head(rows)
        return states, self._logits[:going]

    def _run(self, works: Sequence[Work], kind: Kind) -> Tensor:
        (width, places), count = self._begin(works), sum(work.count for work in works)
        through = self._told.fill(works, range(len(works)), places)
        if kind.drafts:
            self._states[0, :count].copy_(torch.cat([rows for work in works for rows in work.running.holding.states]))
        for j in range(works[0].last):
            rows = self._bucket(kind, through[j])
            if j or not kind.drafts:
                self._play_group(j, rows, width, kind)
            if j + 1 == GROUPS or through[j] > through[j + 1]:
                self._play_exit(j, rows)
        self._play_head(self._bucket(kind, count))
        return self._logits[:count]

    def _begin(self, works: Sequence[Work]) -> tuple[int, list[int]]:
        """See whether weights, or the memory of adapters, are others than were recorded, and fill the tables of `works`.
        Returns their width, and the place of each adapter."""
        state = self._state()
        if state != self._seen:
            self._seen = state
            self._made.clear()
        places = self._places.of([work.running.adapter for work in works])
        if self._places.made != self._placed:
            self._placed = self._places.made
            self._made = {key: run for key, run in self._made.items() if key[0] != "group" or not key[-1].adapted}
        return self._width(self._told.fill_tables(works)), places

    def _prepare(self, kind: Kind, b: int) -> bool:
        width, ends = self._width(1), self._net.config.ends
        for j in range(GROUPS):
            if j or b <= self._most:  # the first group has one row of each request
                self._play_group(j, b, width, kind)
            if ends[j] in self._net.config.exits:
                self._play_exit(j, b)
        self._play_head(b)
        return True

    def _fewer(self, kind: Kind, rows: int, error: RuntimeError) -> None:
        """Let go of the graphs of `kind` for `rows` and more, for which the memory was not enough, and of those that have
        drafts or adapters beside; raises any other `error`."""
        if not _of_memory(error):
            raise error
        for each, sizes in self._buckets.items():
            if each.drafts >= kind.drafts and each.adapted >= kind.adapted:
                self._buckets[each] = [size for size in sizes if size < rows]
        self._made = {key: run for key, run in self._made.items() if self._needs(key)}
        give_back()
        log.warning(_FULL, rows, kind.rows, max(self._buckets[kind], default=0), first_line(error))

    def _needs(self, key: tuple[Any, ...]) -> bool:
        """Is there a bucket left for what was made for `key`?"""
        return any(key[1] in sizes for kind, sizes in self._buckets.items() if key[0] != "group" or key[-1] == kind)

    def _state(self) -> list[object]:
        """What a graph was made of, beside memory that stays: weights, and what else may be set at a layer."""
        layers = [block.attention for group in self._net.groups for block in group.blocks]  # type: ignore[union-attr]
        return [*self._weights.state(), *(layer.mix_local for layer in layers)]

    def _play_group(self, j: int, rows: int, width: int, kind: Kind) -> None:
        self._play(("group", rows, j, width, kind), lambda: self._group(j, rows, width, kind))

    def _play_exit(self, j: int, rows: int) -> None:
        self._play(("exit", rows, j), lambda: self._exit(j, rows, self._net.config.ends[j]))

    def _play_head(self, rows: int) -> None:
        self._play(("head", rows), lambda: self._head(rows))

    def _play(self, key: tuple[Any, ...], run: Run) -> None:
        if key not in self._made:
            self._made[key] = self._record(run)
        self._made[key]()

    def _bucket(self, kind: Kind, rows: int) -> int:
        return self._buckets[kind][bisect_left(self._buckets[kind], rows)]

    def _width(self, pages: int) -> int:
        """Pages of a table that holds `pages`: a power of two of them, so that few widths are recorded."""
        return min(self._pages, max(LEAST_TOKENS // self._net.config.page, 1 << (pages - 1).bit_length()))

    # --- what is recorded: it reads and writes memory that stays, and has its sizes from its arguments alone ------------------

    def _group(self, j: int, b: int, width: int, kind: Kind) -> None:
        net, c, told = self._net, self._net.config, self._told
        positions, tables = told.rows[POSITIONS, :b], told.tables[j, :, :width]
        tables = tables.index_select(0, told.rows[REQUESTS, :b]) if kind.drafts else tables[:b]
        shared = Rows(positions, list(range(b + 1)), c.page, c.block, apart=kind.drafts and j > 0)
        shared.once("requests", lambda: self._numbered[:b])
        rope = self._rope[:, :b].unbind()
        shared.once(("rope", self._rope.dtype), lambda: rope)
        if j <= kind.drafts:  # with drafts, rows are others from the second group on
            for kept, made in zip(rope, rope_tables(positions, c, self._rope.dtype, self._rates), strict=True):
                kept.copy_(made)
        x = self._states[j - 1, :b] if j else net.embed_inputs(told.rows[IDS, :b])
        slots, beside = told.rows[SLOTS + j, :b], None
        if kind.adapted:
            beside = Placed(self._places.beside, told.rows[ADAPTERS, :b])
        step = PagedStep(positions, slots, tables, shared.starts, c.page, c.block, shared=shared, beside=beside)
        out: Tensor = net.groups[j].stepped(x, step, self._cache)  # type: ignore[operator]
        self._states[j, :b].copy_(out)

    def _exit(self, j: int, b: int, layers: int) -> None:
        normed = self._net.exit(self._states[j, :b], layers)
        leaves = (self._numbered[:b] < self._told.going[j])[:, None]
        self._normed[:b].copy_(torch.where(leaves, normed, self._normed[:b]))

    def _head(self, b: int) -> None:
        self._logits[:b].copy_(self._net.logits(self._normed[:b]))


def _of_memory(error: BaseException | None) -> bool:
    """Does it say that memory was not enough? A recording that ends for it may fail to end, and says that instead."""
    if error is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or _of_memory(error.__context__)


class Recorder:
    """`Record` on a CUDA device: the launches of each graph into a `torch.cuda.CUDAGraph`. All share their memory, as none is
    replayed beside another, and nothing of it is read after a graph. Engines of a process record one after the other."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, run: Run) -> Run:
        with RECORDING:
            now = torch.cuda.current_stream()
            self._stream.wait_stream(now)
            try:
                # kernels are compiled, and workspaces made, before anything is recorded
                with torch.cuda.stream(self._stream):
                    run()
                    run()
            finally:  # also of half of it: whoever takes the other way writes the same memory
                now.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            how: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
            try:
                # of this thread alone: another one may load the weights of a version at this moment
                with torch.cuda.graph(graph, **how, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                torch.cuda.set_stream(now)  # one that cannot begin or end leaves its own to this thread
                raise
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
        log.warning(_FULL, most, PLAIN.rows, 0, first_line(error))
        return None
