"""How far a layer looks, and in which of three ways a decoding row then reads its keys: the cheapest that the length allows.

    whole    length <= min(w, K S)        both branches see every token, so they are one, and the gate has no effect
    masked   length <= 2 (w + (K+1) S)    all stored tokens are read, under masks
    chosen   longer                       a decoding row reads its window, its chosen blocks and its tail only

A layer of local attention alone counts as K = 0.

Letters: H query heads, w window, K blocks read, s sinks, S block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Way = Literal["whole", "masked", "chosen"]
ALL = 1 << 40  # tokens of a window that is all of the context


@dataclass(frozen=True)
class Reach:
    """How far a layer looks: w tokens of window, K blocks of which s are sinks, and gamma [H] between the branches (None:
    the window only)."""

    window: int
    top_k: int
    sinks: int
    gamma: Tensor | None

    def way(self, keys: int, block: int) -> Way:
        """How a decoding row reads `keys` token slots."""
        return way(keys, window=self.window, block=block, top_k=self.top_k, hybrid=self.gamma is not None)


def way(keys: int, *, window: int, block: int, top_k: int, hybrid: bool) -> Way:
    """How a decoding row reads the `keys` token slots of its pages, in a `hybrid` layer or in a local one. Reading only what
    was chosen pays once the slots are well beyond what that sums up to."""
    if keys <= window and (not hybrid or keys <= top_k * block):
        return "whole"
    return "chosen" if keys > 2 * (window + (top_k + 1) * block * hybrid) else "masked"
