"""What graphs are told of a step (`graphs.py`): all that differs between two steps, in memory that stays where it is. It is
filled by one copy, and a second where tables changed; the host waits for neither (`model/sending.py`).

Letters: N rows of a step, B of the memory, R requests, G layer groups, M pages of a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.config import GROUPS, ModelConfig
from shoal.engine.plan import Work
from shoal.model.sending import send

IDS, POSITIONS, REQUESTS, ADAPTERS, SLOTS = range(5)  # from SLOTS on those of each group
_NOBODY = np.array([0, 0, 0, -1, *[-1] * GROUPS])[:, None]  # what rows beyond a step's are told: they store nothing


class Told:
    """Of steps of up to R requests and B rows.

    going [G]       how many rows go through each group
    rows [4 + G, B] of each row token, position, the request whose table it has, its adapter's place [-1: none], and the slot
                    that it writes to in each group [-1: none]
    tables [G, R, M] units of the requests' pages
    """

    def __init__(self, config: ModelConfig, requests: int, rows: int, device: torch.device) -> None:
        self._page, pages = config.page, -(-config.context // config.page)
        self._host = np.zeros(GROUPS + len(_NOBODY) * rows, dtype=np.int64)
        self._parts(self._host)[1][:] = _NOBODY
        self._numbers = torch.from_numpy(self._host).to(device, copy=True)
        self.going, self.rows = self._parts(self._numbers)
        self.tables = torch.zeros(GROUPS, requests, pages, dtype=torch.long, device=device)
        self._filled = np.zeros((GROUPS, 0, 0), dtype=np.int64)  # what of them was copied last

    def _parts(self, numbers: Any) -> tuple[Any, Any]:
        return numbers[:GROUPS], numbers[GROUPS:].reshape(len(_NOBODY), -1)  # of what lies in order: views

    def fill_tables(self, works: Sequence[Work]) -> int:
        """Those of the requests of `works`, in their order, up to where they write. Returns how many pages the longest has."""
        longest = max(-(-work.reach // self._page) for work in works)
        tables = np.zeros((GROUPS, len(works), longest), dtype=np.int64)
        for r, work in enumerate(works):
            own = work.running.holding.tables[:, :longest]
            tables[:, r, : own.shape[1]] = own
        # drafts that were given up leave fewer pages than were copied, and the same units in these
        if not np.array_equal(tables, self._filled[:, : len(works), :longest]):
            send(tables, self.tables[:, : len(works), :longest])
            self._filled = tables
        return longest

    def fill(self, works: Sequence[Work], requests: Sequence[int], adapters: Sequence[int]) -> list[int]:
        """The rows of `works`, in their order, whose tables are those of `requests` and whose adapters are at the places
        `adapters`. Returns how many rows go through each group."""
        going, rows = self._parts(self._host)
        counts = np.array([work.count for work in works])
        of, ends = np.repeat(np.arange(len(works)), counts), np.cumsum(counts)
        positions = np.arange(ends[-1]) + (np.array([work.start for work in works]) - (ends - counts))[of]
        last = np.array([work.last for work in works])[of]
        computed = np.array([work.running.holding.computed for work in works]).T[:, of]  # [G, N]
        tables = np.array(requests)[of]
        units = self._filled[:, tables, positions // self._page]
        count = len(positions)
        rows[:, count:] = _NOBODY
        rows[IDS, :count] = [token for work in works for token in work.running.tokens[work.start : work.end]]
        rows[POSITIONS, :count], rows[REQUESTS, :count], rows[ADAPTERS, :count] = (
            positions,
            tables,
            np.array(adapters)[of],
        )
        written = (computed <= positions) & (last > np.arange(GROUPS)[:, None])
        rows[SLOTS:, :count] = np.where(written, units * self._page + positions % self._page, -1)
        going[:] = found = [int((last > j).sum()) for j in range(GROUPS)]
        send(self._host, self._numbers)
        return found
