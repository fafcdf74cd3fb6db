"""How well a model knows how sure it may be: its own probability of each answer against how often such answers are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.recipe import Recipe, Row
from shoal.evaluate.intervals import Figure, of_sums

BINS = 10  # of the probability, equally wide


def calibration(recipe: Recipe, rows: Sequence[Row], answers: Sequence[str], sure: Sequence[float]) -> Figure:
    """Expected calibration error: in each bin the difference between mean probability and share of right answers, weighted by
    the bin's answers (Naeini et al. 2015); a share, the less the better."""
    places = {group: at for at, group in enumerate(dict.fromkeys(row["group"] for row in rows))}
    sums = np.zeros((len(places), BINS + 1))
    for row, right, probability in zip(rows, recipe.rights(rows, answers), sure, strict=True):
        at = places[row["group"]]
        sums[at, min(BINS - 1, int(probability * BINS))] += probability - right
        sums[at, BINS] += 1
    totals = sums.sum(0)
    value = float(np.abs(totals[:BINS]).sum() / max(1.0, totals[BINS]))
    interval = of_sums(sums, lambda some: np.abs(some[:, :BINS]).sum(1) / np.maximum(1.0, some[:, BINS]), sums[:, BINS])
    return Figure(value, interval, len(rows), len(places))
