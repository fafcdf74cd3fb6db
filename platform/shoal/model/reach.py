"""How far a layer looks, and in which of three ways a decoding row then reads its keys: the cheapest that the length allows.

    whole    length <= min(w, K S)        both branches see every token, so they are one, and the gate has no effect;
             or up to the length that a sparse layer is dense to, which a dense layer has without end
    masked   length <= 2 (w + (K+1) S)    all stored tokens are read, under masks
    chosen   longer                       a decoding row reads its window, its chosen blocks and its tail only

A layer of local attention alone counts as K = 0. A sparse layer has one softmax over both branches in place of a gated sum of
two.

Letters: H query heads, w window, K blocks read, s sinks, S block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Way = Literal["whole", "masked", "chosen"]
ALL = 1 << 40  # tokens that are all of any context


@dataclass(frozen=True)
class Reach:
    """How far a layer looks: w tokens of window, K blocks of which s are sinks, and gamma [H] between the branches (None:
    the window only). With `bias` [H] there is one softmax over both, in which it is added to the scores of the window. A query
    before position `dense` reads all before it."""

    window: int
    top_k: int
    sinks: int
    gamma: Tensor | None
    bias: Tensor | None = None
    dense: int = 0

    @property
    def chooses(self) -> bool:
        """Is anything read but the window?"""
        return self.gamma is not None or self.bias is not None

    def way(self, keys: int, block: int) -> Way:
        """How a decoding row reads `keys` token slots."""
        return way(keys, window=self.window, block=block, top_k=self.top_k, chooses=self.chooses, dense=self.dense)


def way(keys: int, *, window: int, block: int, top_k: int, chooses: bool, dense: int = 0) -> Way:
    """How a decoding row reads the `keys` token slots of its pages, in a layer that `chooses` blocks or in a local one. Reading
    only what was chosen pays once the slots are well beyond what that sums up to."""
    if keys <= dense or (keys <= window and (not chooses or keys <= top_k * block)):
        return "whole"
    return "chosen" if keys > 2 * (window + (top_k + 1) * block * chooses) else "masked"
