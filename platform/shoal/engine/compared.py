"""What early exits would have lost along an answer of full depth, for requests that want to know (`Request.gaps`).

In the step that draws the token anyway: an early exit's state at a place is the one that full depth went through, since a
request of depth e *is* the model cut off after e layers. Scored on full depth's answer and never on an exit's own, on which an
exit always looks better than it is. An answer that an exit has given (`audits.py`) is scored by what full depth would have said
after the same words, place by place, which is the same number there.

Letters: S sampled rows, D width, V vocabulary, A early exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoal.config import GROUPS, ModelConfig
from shoal.engine.device import Unread
from shoal.engine.plan import Work
from shoal.model.net import Net
from shoal.model.sending import sent


@dataclass
class Compared:
    """Rows at which full depth gives a token of a request that wants to know what early exits would have lost there."""

    rows: list[int]  # of the step's
    samples: list[int]  # their places among what the step samples
    at: list[int]  # and among the rows of logits
    exits: list[Tensor] = field(default_factory=list)  # [A] of [rows, D]: states at the exits, normed

    @classmethod
    def of(cls, works: Sequence[Work], starts: list[int], config: ModelConfig) -> Compared | None:
        """None where nobody wants to know."""
        found, sample, logit = cls([], [], []), 0, 0
        for r, work in enumerate(works):
            if not work.sample:
                continue
            if work.running.request.gaps and work.last == GROUPS and not work.verify:
                found.rows.append(starts[r + 1] - 1)
                found.samples.append(sample)
                found.at.append(logit)
            sample, logit = sample + 1, logit + (work.count if work.verify else 1)
        return found if found.rows else None

    def gaps(self, logits: Tensor, net: Net, unread: Unread) -> dict[int, tuple[float, ...]]:
        """Place among the samples -> what each early exit loses there, by full depth's `logits` [S, V] of the step: filled in
        when what is `unread` comes."""
        lost = _lost(logits[sent(self.at, logits.device)], [net.logits(states) for states in self.exits])
        found = dict[int, tuple[float, ...]]()
        unread.add([lost], lambda numbers: found.update(zip(self.samples, _rows(numbers[0], len(lost)), strict=True)))
        return found


@dataclass
class Audited:
    """Rows of an answer that exits have given, and the states there at those exits and at full depth."""

    spans: list[tuple[int, slice]]  # layers of an exit, and rows of the step
    full: int  # layers
    given: dict[int, Tensor] = field(default_factory=dict)  # of each span, [rows, D]
    deep: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, works: Sequence[Work], starts: list[int], config: ModelConfig) -> Audited | None:
        """None where no row is looked at."""
        found = [
            (layers, slice(starts[r] + begin - work.start, starts[r] + end - work.start))
            for r, work in enumerate(works)
            for layers, begin, end in work.spans
        ]
        return cls(found, config.layers) if found else None

    def see(self, layers: int, x: Tensor) -> None:
        """Keep what is needed of the states `x` [N, D] of the step's rows after so many `layers`."""
        for at, (exit_, rows) in enumerate(self.spans):
            for wanted, kept in ((exit_, self.given), (self.full, self.deep)):
                if wanted == layers:
                    kept[at] = x[rows].clone()

    def lost(self, net: Net, rows: int) -> list[float]:
        """Nats that each row of the spans lost; NaN where the model gave no number. Logits of so many `rows` exist at once."""
        found: list[float] = []
        for at, (exit_, _) in enumerate(self.spans):
            for start in range(0, len(self.given[at]), rows):
                some = slice(start, start + rows)
                full, given = net.head(self.deep[at][some], self.full), net.head(self.given[at][some], exit_)
                found += [row[0] if row else math.nan for row in divergences(full, [given])]
        return found


def divergences(full: Tensor, exits: Sequence[Tensor]) -> list[tuple[float, ...]]:
    """Of each row of full depth's logits `full` [R, V] what each of the early `exits` [A] of [R, V] loses there, in nats: KL of
    the exit's law from full depth's, 0 or more. Nothing of a row that has no such number."""
    return _rows(_lost(full, exits).flatten().tolist(), len(full)) if exits else []


def _lost(full: Tensor, exits: Sequence[Tensor]) -> Tensor:
    """[R, A], where a number may be none."""
    p = full.double().log_softmax(-1)
    lost = [(p.exp() * (p - logits.double().log_softmax(-1))).sum(-1).clamp_min(0) for logits in exits]
    return torch.stack(lost, -1)


def _rows(numbers: list[float], count: int) -> list[tuple[float, ...]]:
    """`count` rows of `numbers`, without those that hold one that is not finite."""
    wide = len(numbers) // count
    rows = [tuple(numbers[start : start + wide]) for start in range(0, len(numbers), wide)]
    return [row if all(map(math.isfinite, row)) else () for row in rows]
