"""Adapters at places of a memory that stays: who has which, what stands there, and when the memory is made anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shoal.model.adapters import NONE, Adapter
from shoal.model.cpu import fused
from shoal.model.places import MOST, Placed, Places

WIDTHS = {"0": (6, 4), "1": (4, 5)}  # inputs and outputs


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*each, bias=False, dtype=torch.float64) for each in WIDTHS.values()))


def adapter(name: str, ranks: int = 2, linears: str = "01") -> Adapter:
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    pairs = {
        each: tuple(torch.randn(ranks, width, generator=draw, dtype=torch.float64) for width in WIDTHS[each])
        for each in linears
    }
    return Adapter(name, pairs)  # type: ignore[arg-type]


def added(places: Places, net: nn.Sequential, linear: str, of: list[int], x: Tensor) -> Tensor:
    y = torch.zeros(len(x), WIDTHS[linear][1], dtype=torch.float64)
    return Placed(places.beside, torch.tensor(of)).add(net[int(linear)], x, y)


def check(places: Places, net: nn.Sequential, rows: list[Adapter | None]) -> None:
    """Every row gets what its adapter adds, beside every linear."""
    with torch.no_grad():
        of = places.of(rows)
        for linear, (inputs, _) in WIDTHS.items():
            x = torch.randn(len(rows), inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            got = added(places, net, linear, of, x)
            for n, row in enumerate(rows):
                a, b = row.pairs.get(linear, (x[:0], got[:0])) if row is not None else (x[:0], got[:0])
                torch.testing.assert_close(got[n], x[n] @ a.T @ b, rtol=0, atol=1e-12)


def test_rows_get_what_their_own_adapter_adds(net: nn.Sequential) -> None:
    """Of several ranks, beside some linears or all, and none."""
    places, one, two = Places(net), adapter("one"), adapter("two", 5, "1")
    check(places, net, [two, None, one, one, two])
    assert places.of([None, None]) == [NONE, NONE] and Places(net).of([None]) == [NONE]


def test_memory_is_made_anew_where_something_does_not_fit_and_at_no_other_time(net: nn.Sequential) -> None:
    places = Places(net)
    steps = [
        ([adapter("one", 2, "0")], 1), ([adapter("one", 2, "0"), None], 1), ([adapter("two", 1, "0")], 2),  # a place more
        ([adapter("one", 2, "0"), adapter("two", 1, "0")], 2), ([adapter("one", 2, "0")], 2),
        ([adapter("wide", 3, "0")], 3),  # a place more, and room for ranks
        ([adapter("other", 4, "0")], 3), ([adapter("all", 4, "01")], 4),  # a linear more
    ]  # fmt: skip
    for rows, made in steps:
        check(places, net, rows)  # type: ignore[arg-type]
        assert places.made == made
    for i in range(MOST + 3):
        check(places, net, [adapter(str(i)), None, adapter(str(i // 2))])
    made, lies = places.made, [(place.a.data_ptr(), place.bounds.data_ptr()) for place in places.beside.values()]
    for i in range(20):
        check(places, net, [adapter(str(i % (MOST + 3))), None, adapter(str(i % 7))])
    assert places.made == made <= 4 + 2, "twice as many places each time"
    assert lies == [(place.a.data_ptr(), place.bounds.data_ptr()) for place in places.beside.values()]


def test_who_was_not_asked_for_the_longest_gives_its_place_and_nobody_of_a_step_does(net: nn.Sequential) -> None:
    """Another adapter at its place is not left with what lay there: it has fewer ranks, and one linear."""
    places = Places(net)
    held = [adapter(str(i), 4) for i in range(MOST)]
    check(places, net, [*held])
    of = places.of([*held])
    check(places, net, [held[0]])  # the last to be used; 1 is now the first to go
    check(places, net, [adapter("new", 1, "1"), held[1], None])
    assert places.of([adapter("new", 1, "1")]) == [of[2]], "1 was asked for in the same step"
    check(places, net, [held[2]])
    check(places, net, [*held])
    assert sorted(places.of([*held])) == [*range(MOST)]


def test_what_was_not_a_number_at_a_place_is_gone_with_it(net: nn.Sequential) -> None:
    places, broken = Places(net), adapter("broken", 4)
    for pair in broken.pairs.values():
        for each in pair:
            each.fill_(torch.nan)
    assert places.of([broken, adapter("beside", 2, "0")]) == [0, 1]
    check(places, net, [adapter("beside", 2, "0"), None])  # its rows are fewer than there is room for
    places._held.clear()
    assert places.of([adapter("thin", 1, "1")]) == [0]
    check(places, net, [adapter("thin", 1, "1"), None])


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "usable", lambda x: False)
