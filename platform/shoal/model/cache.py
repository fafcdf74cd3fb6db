"""What the model asks of whoever owns the K/V memory: one `GroupCache` per pool, one `PagedStep` per forward.

Shapes: U units, P slots a page, S tokens a block, Lg layers in a group, Hk KV heads, d head dim; N new tokens of R
requests in one step; M units in the longest block table.

Layer j of a group sees ``kv[j]`` [U, Hk, P, 2d] (keys in the first half of the last axis), the layout that vLLM uses, so
one operation can serve both engines. Unit 0 is the null unit: it pads tables and is never allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shoal.config import ModelConfig


@dataclass
class GroupCache:
    """`kv` [Lg, U, Hk, P, 2d] and the block means of the stored keys, `means` [Lg, U, Hk, P/S, d] (fp32 or better).

    A unit belongs to one layer group at a time; which one is the allocator's knowledge, not the memory's.
    """

    kv: Tensor
    means: Tensor

    @classmethod
    def zeros(
        cls, config: ModelConfig, units: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> GroupCache:
        lead = (config.group_layers, units, config.kv_heads)
        exact = torch.promote_types(dtype, torch.float32)
        return cls(
            torch.zeros(*lead, config.page, 2 * config.head_dim, dtype=dtype, device=device),
            torch.zeros(*lead, config.page // config.block, config.head_dim, dtype=exact, device=device),
        )


@dataclass
class PagedStep:
    """Where the N new tokens of one forward stand. The rows of a request are contiguous and in order.

    positions [N]  absolute position of each new token, from 0
    slots [N]      unit * P + offset that its K/V are written to (-1: padding, written to the null unit)
    tables [R, M]  units of each request's pages in order, padded with 0
    starts [R+1]   request r owns rows starts[r] .. starts[r+1]-1
    """

    positions: Tensor
    slots: Tensor
    tables: Tensor
    starts: list[int]
    page: int
    block: int

    @cached_property
    def units(self) -> Tensor:
        """Unit that each new token is written to, [N]."""
        return self.slots.clamp(min=0) // self.page

    @cached_property
    def offsets(self) -> Tensor:
        """Slot within that unit, [N]."""
        return self.slots.clamp(min=0) % self.page

    @cached_property
    def block_ends(self) -> Tensor:
        """Rows whose token completes a block, so that the block's mean is written, [E]."""
        complete = ((self.positions + 1) % self.block == 0) & (self.slots >= 0)
        return complete.nonzero().flatten()

    @cached_property
    def singles(self) -> list[int]:
        """Requests with one new token: they decode together."""
        return [r for r in range(len(self.starts) - 1) if self.starts[r + 1] - self.starts[r] == 1]

    @cached_property
    def chunks(self) -> list[int]:
        """Requests with several new tokens (prefill, verification): each is attended for itself."""
        return [r for r in range(len(self.starts) - 1) if self.starts[r + 1] - self.starts[r] > 1]

    @cached_property
    def single_rows(self) -> Tensor:
        """Row of each of `singles`, [len(singles)]."""
        return torch.tensor([self.starts[r] for r in self.singles], device=self.positions.device)

    @cached_property
    def single_tables(self) -> Tensor:
        """Block tables of `singles`."""
        if len(self.singles) == self.tables.shape[0]:
            return self.tables
        return self.tables[torch.tensor(self.singles, device=self.tables.device)]
