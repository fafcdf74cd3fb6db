"""How sure the model was of what it says: the NLL of a sample of an answer's tokens, taken from logits that are there anyway.

Notable: every 16th token of a request whose signals are asked for, its first among them, by position and not by time: so they
are the same in any batch. They come from the model's own logits, before penalties, grammars and filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.engine.events import Signals
from shoal.model.cpu import fused

EVERY = 16  # tokens of an answer: at 4 it cost a model of a million parameters 3 % of its time


class Watched(Protocol):
    """What is needed of a request here."""

    tokens: list[int]
    prompt_len: int
    watched: bool  # its signals are asked for


def looked_at(draw: Watched) -> bool:
    """Is the next token of `draw` one of the sample?"""
    return draw.watched and not (len(draw.tokens) - draw.prompt_len) % EVERY


class Logits:
    """Rows [D] of a step that are watched: a copy of each as the model gave it [D, V], and its log-sum [D]."""

    def __init__(self, rows: Sequence[int], kept: np.ndarray, totals: Sequence[float]) -> None:
        self._rows, self._kept, self._totals = rows, kept, totals

    @classmethod
    def of(cls, logits: Tensor, draws: Sequence[Watched]) -> Logits | None:
        """Those of `logits` [R, V] whose token is to be looked at; None for none."""
        rows = [r for r, draw in enumerate(draws) if looked_at(draw)]
        if not rows:
            return None
        if fused.usable(logits):
            return cls(rows, *fused.log_sums(logits, rows))
        some = logits[rows]
        some = some if some.dtype in (torch.float32, torch.float64) else some.float()
        return cls(rows, some.cpu().numpy(), some.logsumexp(-1).tolist())

    def nll(self, tokens: Sequence[int]) -> dict[int, float]:
        """Row -> nats that its token costs, for the tokens [R] that were chosen. None where the model gave no number."""
        places = zip(self._rows, self._kept, self._totals, strict=True)
        found = {r: total - float(row[tokens[r]]) for r, row, total in places if tokens[r] >= 0}
        return {r: nats for r, nats in found.items() if math.isfinite(nats)}


@dataclass
class Heard:
    """What has been heard of one request so far."""

    decided: Signals | None = None  # by its router
    total: float = 0.0  # nats of `count` tokens
    count: int = 0
    most: float = 0.0
    drafts_accepted: int = 0
    gaps: tuple[float, ...] = ()  # [A] sums over `places`
    places: int = 0

    def token(self, nats: float | None) -> None:
        """One more token of the answer, and its NLL where it was looked at."""
        if nats is not None:
            self.total, self.count, self.most = self.total + nats, self.count + 1, max(self.most, nats)

    def compared(self, gaps: tuple[float, ...]) -> None:
        """What each early exit loses at one more place of the answer; nothing where it was not looked at."""
        if gaps:
            self.gaps = tuple(a + b for a, b in zip(self.gaps or (0.0,) * len(gaps), gaps, strict=True))
            self.places += 1

    def all(self) -> Signals:
        """It as the event of the request's end tells it."""
        known = self.count > 0
        return replace(
            self.decided or Signals(),
            answer_nll=self.total / self.count if known else None,
            answer_nll_max=self.most if known else None,
            drafts_accepted=self.drafts_accepted,
            gaps=tuple(total / self.places for total in self.gaps),
        )
