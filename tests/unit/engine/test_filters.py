"""What filters keep, by hand: whole rows of few tokens, ties among them, at the bounds of each filter."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.engine import filters
from shoal.engine.events import Sampling
from shoal.engine.filters import heat, lowest, thresholds

SHARES = [0.4, 0.2, 0.2, 0.1, 0.06, 0.04]
ALL = tuple(range(6))


def z_of(*rows: list[float]) -> torch.Tensor:
    """Logarithms of `rows` of shares, the largest at 0."""
    z = torch.tensor(rows, dtype=torch.double).log()
    return z - z.amax(-1, keepdim=True)


def kept(z: torch.Tensor, *samplings: Sampling) -> list[tuple[int, ...]]:
    at_least = thresholds(z, samplings)[:, None]
    return [tuple(torch.nonzero(row).flatten().tolist()) for row in z >= at_least]


KEPT = [
    (Sampling(), ALL),
    (Sampling(top_k=1), (0,)),
    (Sampling(top_k=2), (0, 1, 2)),  # the second and the third are as likely
    (Sampling(top_k=3), (0, 1, 2)),
    (Sampling(top_k=4), (0, 1, 2, 3)),
    (Sampling(top_k=6), ALL),
    (Sampling(top_k=7), ALL),
    (Sampling(top_p=0.0), (0,)),
    (Sampling(top_p=0.39), (0,)),
    (Sampling(top_p=0.41), (0, 1, 2)),
    (Sampling(top_p=0.79), (0, 1, 2)),
    (Sampling(top_p=0.81), (0, 1, 2, 3)),
    (Sampling(top_p=0.99), ALL),
    (Sampling(min_p=0.51), (0,)),
    (Sampling(min_p=0.49), (0, 1, 2)),
    (Sampling(min_p=0.11), (0, 1, 2, 3, 4)),
    (Sampling(min_p=1.0), (0,)),
    # top-p is of what top-k leaves: 0.49 of 0.8 is 0.39, and 0.51 of it 0.41
    (Sampling(top_k=3, top_p=0.49), (0,)),
    (Sampling(top_k=3, top_p=0.51), (0, 1, 2)),
    (Sampling(top_k=4, top_p=0.88), (0, 1, 2)),  # 0.79 of 0.9; of all it would be one more
    (Sampling(top_k=5, top_p=0.99, min_p=0.2), (0, 1, 2, 3)),
]


@pytest.mark.parametrize("candidates", [1, 2, 4, 128])
def test_each_row_keeps_what_its_filters_keep_alone_and_among_others(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of the likeliest are looked at first."""
    monkeypatch.setattr(filters, "CANDIDATES", candidates)
    z = z_of(*[SHARES] * len(KEPT))
    assert kept(z, *(sampling for sampling, _ in KEPT)) == [wanted for _, wanted in KEPT]
    for sampling, wanted in KEPT:
        assert kept(z_of(SHARES), sampling) == [wanted], sampling


def test_a_row_says_whether_the_tokens_looked_at_tell_what_it_keeps() -> None:
    z = z_of([0.4, 0.3, 0.2, 0.1], [0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])
    some = [Sampling(top_p=0.69), Sampling(top_p=0.69), Sampling(top_p=0.71), Sampling(top_k=2), Sampling(min_p=0.3)]
    found, enough = lowest(z, some, [2] * 5)
    assert enough.tolist() == [True, False, False, True, True]
    wanted = [math.log(0.75), math.log(0.75), math.log(0.3)]
    assert found[[0, 3, 4]].tolist() == pytest.approx(wanted)
    assert lowest(z, some, [4] * 5)[1].all()


def test_what_a_row_keeps_depends_on_no_other_though_too_few_are_looked_at() -> None:
    """Another's top-k looks at more; and each has as many candidates as it is said to have."""
    z = z_of([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])
    some = [Sampling(top_p=0.95), Sampling(top_k=3), Sampling(top_p=0.95), Sampling(top_p=0.95, top_k=3)]
    found, enough = lowest(z, some, [2, 2, 4, 2])
    assert found.tolist() == pytest.approx([math.log(0.75), math.log(0.5), math.log(0.25), math.log(0.5)])
    assert enough.tolist() == [False, True, True, True], "top-p is of what top-k leaves"


def test_a_top_k_of_all_tokens_is_none_and_looks_at_no_more() -> None:
    z = z_of(*[[0.4, 0.3, 0.2, 0.1]] * 3)
    found, enough = lowest(z, [Sampling(top_p=0.95, top_k=k) for k in (0, 4, 5)], [2, 2, 2])
    assert enough.tolist() == [False] * 3 and found.tolist() == pytest.approx([math.log(0.75)] * 3)


def test_a_share_that_is_reached_exactly_is_enough() -> None:
    """The second token is below the first by less than its weight tells: each is half of all."""
    z = torch.tensor([[0.0, -1e-300]], dtype=torch.double)
    assert kept(z, Sampling(top_p=0.5)) == [(0,)] and kept(z, Sampling(top_p=math.nextafter(0.5, 1))) == [(0, 1)]
    assert lowest(z, [Sampling(top_p=0.5)], [1])[1].tolist() == [True]
    assert lowest(z, [Sampling(top_p=math.nextafter(0.5, 1))], [1])[1].tolist() == [False]


def test_all_tokens_are_always_enough_and_fewer_only_by_their_share() -> None:
    z = z_of([0.4, 0.3, 0.2, 0.1])
    for top_p, candidates, enough in (
        (0.69, 1, False),
        (0.39, 1, True),
        (0.95, 3, False),
        (0.89, 3, True),
        (0.95, 9, True),
    ):
        assert lowest(z, [Sampling(top_p=top_p)], [candidates])[1].tolist() == [enough], (top_p, candidates)
    assert lowest(z, [Sampling(top_p=0.69, top_k=4)], [1])[1].tolist() == [False], "a top-k of all looks at no more"
    nothing = torch.full((1, 4), math.nan, dtype=torch.double)
    assert [lowest(nothing, [Sampling(top_p=0.5)], [some])[1].item() for some in (3, 4)] == [False, True]


def test_a_temperature_is_as_it_is_said_and_never_0() -> None:
    for dtype, held in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        found = heat(torch.zeros(3, 4, dtype=dtype), [Sampling(temperature=t) for t in (0.0, 0.7, 100.0)])
        assert found.dtype == held and found.tolist() == pytest.approx([0.0, 0.7, 100.0]) and float(found[0]) > 0


def test_a_filter_is_one_that_leaves_something_out() -> None:
    none = [Sampling(), Sampling(temperature=0.0), Sampling(top_k=0, top_p=1.0, min_p=0.0)]
    some = [Sampling(top_k=1), Sampling(top_p=0.999), Sampling(min_p=1e-9)]
    assert [filters.filtered(sampling) for sampling in (*none, *some)] == [False] * 3 + [True] * 3
