"""Which depth each workload of a recipe needs: the shallowest at which the served model is as good as at full depth,
unless the recipe says that it is always full; none where the model does not do it at any depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.recipe import Recipe, Row
from shoal.config import AUTO, FULL
from shoal.evaluate.intervals import Figure

MARGIN = 0.02  # by which a shallower depth may be worse
SERVES = 0.05  # what a depth must be shown to reach: below it next to no answer is right


class Picks:
    """What the served model answered at each depth, by workload."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._seen: dict[str, dict[str, tuple[list[Row], list[str]]]] = {}  # workload -> depth, the shallowest first
        self._ran: dict[str, list[tuple[float, int]]] = {}  # workload -> of its answers at "auto"

    def saw(self, rows: Sequence[Row], answers: Sequence[str], depth: str, ran: Sequence[tuple[float, int]]) -> None:
        """Take the answers of a suite; `ran`: of each the share of the layers that its tokens ran, and how many these were."""
        for row, answer, one in zip(rows, answers, ran, strict=True):
            workload = self._recipe.workload(row)
            some = self._seen.setdefault(workload, {}).setdefault(depth, ([], []))
            some[0].append(row)
            some[1].append(answer)
            if depth == AUTO:
                self._ran.setdefault(workload, []).append(one)

    def all(self) -> list[dict[str, Any]]:
        """Of each workload: its rows, the figure at each depth with its interval, and which depth is picked, None where none
        serves. One that the measure is not of is left out."""
        found = []
        for workload, by in self._seen.items():
            figures = {depth: self._recipe.score(*some).get(self._recipe.served) for depth, some in by.items()}
            known = {depth: figure for depth, figure in figures.items() if figure is not None}
            if FULL not in known:
                continue
            found.append(
                {
                    "workload": workload, "measure": self._recipe.served, "rows": known[FULL].rows,
                    "depths": {depth: figure.value for depth, figure in known.items()},
                    "intervals": {depth: figure.ends for depth, figure in known.items()},
                    "pick": self._pick(workload, known),
                    "auto_layers": layers_of(self._ran.get(workload, ())),
                }
            )  # fmt: skip
        return found

    def _pick(self, workload: str, known: dict[str, Figure]) -> str | None:
        if workload in self._recipe.always_full:
            return FULL
        least_is_best = self._recipe.served in self._recipe.least_is_best
        sign = -1 if least_is_best else 1
        if not any(
            1 - one.interval[1] > SERVES if least_is_best else one.interval[0] > SERVES for one in known.values()
        ):
            return None
        least = sign * known[FULL].value - MARGIN
        return next(depth for depth, figure in known.items() if depth != AUTO and sign * figure.value >= least)


def layers_of(ran: Sequence[tuple[float, int]]) -> float:
    """The share of the layers that ran, mean over all tokens of some answers: of each its share, and how many it has."""
    return sum(share * tokens for share, tokens in ran) / max(1, sum(tokens for _, tokens in ran))
