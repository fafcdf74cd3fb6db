"""Where the rows of a step stand, for every layer group.

Letters: N rows, R works (one request each), G layer groups, M pages of the longest request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shoal.config import GROUPS, ModelConfig
from shoal.engine.plan import Work
from shoal.model.adapters import Beside
from shoal.model.cache import PagedStep, Rows, read_rows, write_rows
from shoal.model.sending import sent


class StepLayout:
    """Of the rows of `works`: built once a step, in numpy, and sliced for each group."""

    def __init__(
        self,
        works: Sequence[Work],
        config: ModelConfig,
        device: torch.device,
        beside: Callable[[Sequence[Work]], Beside | None],
    ) -> None:
        self._config, self._device, page = config, device, config.page
        self._adapted, self._beside = beside, beside(works)
        counts = [work.count for work in works]
        self.starts = [0, *np.cumsum(counts).tolist()]
        row_of = np.repeat(np.arange(len(works)), counts)
        begin = np.array([work.start for work in works])
        positions = np.arange(self.starts[-1]) + (begin - self.starts[:-1])[row_of]
        self._ends = [work.end - 1 for work in works]
        holdings = [work.running.holding for work in works]
        longest = max(holding.pages_for(work.end) for holding, work in zip(holdings, works, strict=True))
        tables = np.zeros((GROUPS, len(works), longest), dtype=np.int64)
        for r, holding in enumerate(holdings):
            own = holding.tables[:, :longest]
            tables[:, r, : own.shape[1]] = own
        computed = np.array([holding.computed for holding in holdings]).T  # [G, R]
        # numpy may interleave the rows of its result, and the compiled loops take only arrays whose rows lie in order
        slots = np.ascontiguousarray(tables[:, row_of, positions // page]) * page + positions % page
        slots[positions < computed[:, row_of]] = -1  # stored already: run for its state, not written again
        self._tables, self._slots, self._positions = (sent(array, device) for array in (tables, slots, positions))
        self._rows: dict[int, Rows] = {}

    @cached_property
    def _writes(self) -> Tensor:
        return write_rows(self._slots, self._config.kv_heads, self._config.page)

    @cached_property
    def _reads(self) -> Tensor:
        return read_rows(self._tables, self._config.kv_heads)

    def of(self, works: Sequence[Work]) -> StepLayout:
        """The layout of some of the works only."""
        return StepLayout(works, self._config, self._device, self._adapted)

    def step(self, group: int, rows: int) -> PagedStep:
        """The first `rows` rows as `group` sees them; they end where a request ends."""
        count = self.starts.index(rows)
        starts = self.starts[: count + 1]
        if rows not in self._rows:
            whole = self._rows.get(self.starts[-1])
            self._rows[rows] = Rows(
                self._positions[:rows], starts, self._config.page, self._config.block, whole, self._ends
            )
        return PagedStep(
            positions=self._positions[:rows],
            slots=self._slots[group, :rows],
            tables=self._tables[group, :count],
            starts=starts,
            page=self._config.page,
            block=self._config.block,
            shared=self._rows[rows],
            writes=lambda: self._writes[group, : rows * self._config.kv_heads],
            reads=lambda: self._reads[group, :count],
            beside=self._beside and self._beside.first(rows),
        )
