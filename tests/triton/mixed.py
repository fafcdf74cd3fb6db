"""A step of prompts beside requests that decode or verify drafts, in each kind of a layer, and what torch is left with."""

from __future__ import annotations

import torch

from shoal.model.reach import ALL, Reach
from tests.triton.stored import Stored, store

LENGTHS, NEW = [33, 46, 44, 9, 43, 30, 12], [1, 6, 6, 1, 10, 3, 5]
LONG = 4  # rows, in place of `launch.LONG`
GAMMA = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
REACHES = {
    "H": Reach(10, 3, 1, GAMMA),
    "H within its window": Reach(80, 20, 1, GAMMA),
    "S": Reach(10, 3, 1, None, torch.linspace(-1, 2, 4, dtype=torch.float64), 40),
    "L": Reach(10, 0, 0, None),
    "D": Reach(ALL, 0, 0, None, dense=ALL),
}
PROMPTS = [(1, 6), (2, 6), (4, 10), (6, 5)]
# of request 2 two rows stand before 40, and all of 1 behind it
SHARED = {"D": PROMPTS, "H within its window": PROMPTS, "S": [(4, 7), (6, 5)], "H": [], "L": []}


def mixed(dtype: torch.dtype = torch.float64) -> Stored:
    """One KV head of four query heads, pages of 8, blocks of 4, tables of 7 pages."""
    return store(11, LENGTHS, NEW, kv_heads=1, group=4, dtype=dtype)


def alone(kind: str) -> list[int]:
    """Rows of the step that are not left to torch."""
    starts = [sum(NEW[:r]) for r in range(len(NEW))]
    left = {starts[r] + i for r, count in SHARED[kind] for i in range(count)}
    return [row for row in range(sum(NEW)) if row not in left]
