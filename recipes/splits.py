"""What is learned from, fitted to and asked, apart by construction: of each matter's wordings the last two are asked alone, the
one before them is what the router is fitted to, and the rest is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
TRAIN, DEV, SUITE = "train", "dev", "suite"  # learned from; what the router is fitted to; what is asked
SPLITS = (TRAIN, DEV, SUITE)
LANGUAGES = ("en", "zh")


def of_split(wordings: Sequence[T], split: str) -> Sequence[T]:
    """Those of a matter's wordings that are of a split."""
    return wordings[-2:] if split == SUITE else wordings[-3:-2] if split == DEV else wordings[:-3]
