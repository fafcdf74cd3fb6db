"""What tokens cost under the logits that they are of, with the likeliest beside them: `engine.sampler` reports it.

Notable: most ask for the chosen token's alone, and of a vocabulary of fifty thousand that took as long as a fifth of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.engine.device import viewed
from shoal.engine.events import TokenLogprob
from shoal.model.sending import sent


def entries(logits: Tensor, targets: Sequence[int], wanted: Sequence[int]) -> list[TokenLogprob]:
    """Logprob of each of `targets` [R] under its row of `logits` [R, V], with the `wanted` [R] best; of its row alone, whoever
    else is there."""
    found = dict[int, TokenLogprob]()
    alone = [i for i, count in enumerate(wanted) if not count]
    if alone and (numbers := viewed(logits)) is not None:
        found = dict(zip(alone, _alone(numbers[alone], [targets[i] for i in alone]), strict=True))
    if rest := [i for i in range(len(targets)) if i not in found]:
        logprobs = torch.log_softmax((logits[rest] if found else logits).double(), -1)
        best = logprobs.topk(max([1, *(wanted[i] for i in rest)]), dim=-1)
        some = sent([targets[i] for i in rest], logits.device, torch.long)[:, None]
        parts = logprobs.gather(-1, some).flatten().tolist(), best.values.tolist(), best.indices.tolist()
        for i, chosen, values, ids in zip(rest, *parts, strict=True):
            top = tuple(zip(ids[: wanted[i]], values[: wanted[i]], strict=True))
            found[i] = TokenLogprob(targets[i], chosen, top)
    return [found[i] for i in range(len(targets))]


def _alone(rows: np.ndarray, targets: Sequence[int]) -> list[TokenLogprob]:
    """As `entries`, without alternatives, of `rows` [R, V], which are changed: exponentials in their own type, summed in fp64,
    take a fifth of the time of all logarithms in fp64."""
    with np.errstate(invalid="ignore"):  # of a row that is no number neither is the logprob
        rows -= rows.max(-1, keepdims=True)
        chosen = rows[np.arange(len(rows)), list(targets)].astype(np.float64)
        totals = np.log(np.exp(rows, out=rows).sum(-1, dtype=np.float64))
    return [TokenLogprob(target, value) for target, value in zip(targets, (chosen - totals).tolist(), strict=True)]
