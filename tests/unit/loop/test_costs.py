"""What a candidate may cost beside a stable version that breaks its promise: figures made up, verdicts by hand and by drawing.

A model of four layers with exits at 1, 2 and 4, whose router promises 0.05 nats a token.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from shoal.loop import costs
from shoal.loop.paired import FAIL, INCONCLUSIVE, PASS, Check

EXITS, PROMISED, COUNT, DRAWS = (1, 2, 4), 0.05, 200, 400


def routed(depths: Sequence[int], gaps: np.ndarray) -> costs._Routed:
    """Questions that run `depths`, with what the two early exits lose, [n, 2]."""
    rows = np.concatenate([gaps, np.zeros((len(gaps), 1))], axis=1)
    lost = [float(row[EXITS.index(depth)]) for row, depth in zip(rows, depths, strict=True)]
    return costs._Routed([depth / EXITS[-1] for depth in depths], lost, list(range(len(depths))), rows.tolist())


def of(*mean: float, scatter: float = 0.01, count: int = COUNT) -> np.ndarray:
    """Gaps of these means, give or take `scatter`."""
    return np.array(mean) + scatter * np.linspace(-1, 1, count)[:, None]


def some(share: float, deep: int = 4, shallow: int = 2, count: int = COUNT) -> list[int]:
    """Depths of which a `share` is deep."""
    return [deep] * round(share * count) + [shallow] * (count - round(share * count))


def layers(mine: Sequence[int], gaps: np.ndarray, its: np.ndarray, stable: Sequence[int] | None = None) -> Check:
    known = routed([1] * len(its) if stable is None else stable, its)
    return costs._layers(routed(mine, gaps), known, EXITS, PROMISED, PROMISED)[0]


@pytest.mark.parametrize(
    ("mine", "gaps", "its", "status", "says"),
    [
        # the second exit keeps what the first, which the stable version takes, does not: a half of the layers, and a tenth
        (some(0.0), of(0.12, 0.02), of(0.12, 0.02), PASS, "at 2 of 4 layers for all it does not: at most 55%"),
        (some(0.09), of(0.12, 0.02), of(0.12, 0.02), INCONCLUSIVE, "55%"),
        (some(0.2), of(0.12, 0.02), of(0.12, 0.02), FAIL, "55%"),
        # by its own exits, which it spoilt, the candidate would have had all layers
        (some(0.5), of(0.4, 0.09), of(0.12, 0.02), FAIL, "55%"),
        # the second exit loses 0.045, give or take 0.012: it may keep the promise
        (
            some(0.0),
            of(0.12, 0.02),
            of(0.12, 0.045, scatter=0.15),
            PASS,
            "at 2 of 4 layers for all it may not, at full",
        ),
        (some(0.5), of(0.12, 0.02), of(0.12, 0.045, scatter=0.15), INCONCLUSIVE, "55%"),
        # no depth but full keeps it: all layers are the bound, and one more
        (
            some(0.9),
            of(0.12, 0.07),
            of(0.12, 0.07),
            PASS,
            "at full depth alone it does not: at most 100% of the layers",
        ),
        (some(1.0), of(0.12, 0.07), of(0.12, 0.07), FAIL, "full depth for every question"),
        (some(0.995), of(0.12, 0.07), of(0.12, 0.07), INCONCLUSIVE, "at most 100%"),
        # who does not keep the promise has no more layers than the stable version
        (some(0.0), of(0.12, 0.07), of(0.12, 0.07), FAIL, "of a candidate that is shown to keep its promise"),
        (some(0.0), of(0.12, 0.045, scatter=0.15), of(0.12, 0.02), INCONCLUSIVE, "of a candidate that is shown"),
    ],
)
def test_what_mends_a_promise_runs_no_deeper_than_the_shallowest_depth_that_keeps_it(
    mine: list[int], gaps: np.ndarray, its: np.ndarray, status: str, says: str
) -> None:
    found = layers(mine, gaps, its)
    assert (found.status, found.items) == (status, COUNT) and says in found.told, found.told
    assert found.value == pytest.approx(np.mean(mine)), "beside the stable version, which takes the first exit"


def test_what_the_stable_version_runs_is_not_too_much_for_another() -> None:
    """It takes the first exit where that loses, and the second where it would not: the first for all would keep its promise."""
    its = np.where(np.arange(COUNT)[:, None] < 60, [0.3, 0.0], [-0.1, 0.0]) + of(0.0, 0.0)
    stable = [1] * 60 + [2] * 140
    assert costs._shallowest(routed(stable, its), EXITS, PROMISED)[0] == 1
    for deep, status in ((140, PASS), (160, PASS), (200, FAIL)):
        found = layers([1] * (COUNT - deep) + [2] * deep, of(0.1, 0.02), its, stable)
        assert found.status == status and found.limit == pytest.approx(costs.MOST_MORE)


def drawn(draw: Callable[[np.random.Generator], Check]) -> dict[str, float]:
    """How often each status came of `DRAWS` draws."""
    rng = np.random.default_rng(0)
    found = [draw(rng).status for _ in range(DRAWS)]
    return {status: found.count(status) / DRAWS for status in (PASS, INCONCLUSIVE, FAIL)}


def test_one_in_forty_is_judged_by_a_depth_that_does_not_keep_the_promise_or_not_by_one_that_does() -> None:
    """Losses that scatter by 0.1 from question to question; where a depth loses just what is promised 2.5 % are judged wrongly
    in either direction (of 400 draws at most 4.5 %, two and a half standard errors above)."""

    def gaps(rng: np.random.Generator, second: float) -> np.ndarray:
        return np.array([0.15, second]) + 0.1 * rng.standard_normal((COUNT, 2))

    def case(second: float, share: float) -> dict[str, float]:
        return drawn(lambda rng: layers(some(share), of(0.12, 0.02), gaps(rng, second)))

    assert case(PROMISED, 0.5)[PASS] <= 0.045 and case(PROMISED, 0.5)[FAIL] <= 0.045
    assert case(0.02, 0.5)[FAIL] >= 0.9 and case(0.09, 0.5)[PASS] >= 0.9

    def deeper(rng: np.random.Generator) -> Check:
        """A tenth of its questions at full depth are just what is allowed: of so few the normal interval is a little narrow."""
        mine = np.where(rng.random(COUNT) < 0.1, 4, 2).tolist()
        return layers(mine, of(0.12, 0.02), gaps(rng, 0.0))

    assert drawn(deeper)[PASS] <= 0.085
