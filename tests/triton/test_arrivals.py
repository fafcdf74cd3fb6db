"""The last of a team to arrive goes on, and the last of a row's pieces joins them: in whatever order that is."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from shoal.model.gpu import launch
from shoal.model.reach import Reach
from tests.triton.seen import KINDS, Seen, attended
from tests.triton.stored import store

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Shuffled:
    """Programs run in an order that is drawn anew for each launch; of the interpreter's loops the last one alone is left."""
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    made = Shuffled(random.Random(0))
    place = interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *at: place(*made.at(*at)))
    run = InterpretedFunction.run

    def ordered(self: Any, *args: Any, grid: Any, **named: Any) -> Any:
        made.begin(grid)
        return run(self, *args, grid=grid, **named)

    monkeypatch.setattr(InterpretedFunction, "run", ordered)
    return made


class Shuffled:
    """Which program runs in the place of another; the piece that comes last is another one in each launch."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.order = draw, list[tuple[int, ...]]()
        self.last = list[tuple[int, ...]]()  # of each launch

    def begin(self, grid: tuple[int, ...]) -> None:
        self.order = [*itertools.product(*map(range, (*grid, 1, 1)[:3]))]
        self.draw.shuffle(self.order)
        piece = len(self.last) % (1 + max(at[2] for at in self.order))
        self.order.sort(key=lambda at: at[2] != piece)  # who is first here runs last; among equals the order stays
        self.last.append(self.order[0])

    def at(self, *_: int) -> tuple[int, ...]:
        return self.order.pop()


def with_teams(monkeypatch: pytest.MonkeyPatch, far: int, crew: int) -> None:
    """Of so many programs, for each of `far` pieces; of one: each scores for itself."""
    if crew > 1:
        monkeypatch.setattr(launch, "FEW_NUMBERS", 0)
        monkeypatch.setattr(launch, "_teams", lambda *given: (far, crew))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "crew"), [*((kind, 1) for kind in KINDS), ("H", 2), ("S", 3)])
def test_who_comes_last_changes_no_bit(
    kind: str, crew: int, dtype: torch.dtype, shuffled: Shuffled, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the programs, of rows of which some have no key for some pieces, and some no scores. What they
    count with is as it was found, so the launches after it count right."""
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (2, 3 * (far > 0)))
    monkeypatch.setattr(launch, "_tile", lambda q: 4)
    with_teams(monkeypatch, 3, crew)
    case = store(9, [70, 9], [1, 1], kv_heads=1, group=4, dtype=dtype)
    found = [attended(case, KINDS[kind]) for _ in range(3)]
    assert all(torch.equal(each, found[0]) for each in found) and found[0].isfinite().all()
    assert len({last[2] for last in shuffled.last}) > 1, "another piece is the last"
    places = {given["arrived"].data_ptr() for given in seen.given}
    assert len(places) == 1 and not any(given["arrived"].any() for given in seen.given)


@pytest.mark.parametrize(("far", "crew"), [(2, 1), (1, 2)])
def test_pieces_are_joined_in_their_order_and_not_in_that_of_their_coming(
    far: int, crew: int, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order of the programs of a row, where sums in another order have other bits; and whoever goes on for a team, it
    chooses by the scores of all."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(launch, "_pieces", lambda programs, *lengths: (2, far))
    monkeypatch.setattr(launch, "_tile", lambda q: 4)
    case, reach = store(2, [60], [1], kv_heads=1, dtype=torch.float32), Reach(10, 3, 1, torch.full((2,), 0.3))
    alike, place = attended(case, reach), interpreter_builder.set_grid_idx
    with_teams(monkeypatch, far, crew)
    want = attended(case, reach)
    assert torch.equal(want, alike), "as where each scores for itself"
    for order in itertools.permutations(range(2 + far * crew)):
        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, to=order: place(x, y, to[z]))
            assert torch.equal(attended(case, reach), want)
    assert [given["SHARED"] for given in seen.given] == [False, *[crew > 1] * (len(seen.given) - 1)]
    part = seen.given[-1]["part"].view(2 + far, 2, 16)
    assert not torch.equal(part[0] + part[1] + part[2], part[2] + part[1] + part[0])
    assert not any(given["arrived"].any() for given in seen.given)


def test_a_team_scores_each_block_once(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.model.gpu import attention

    spans, fill = list[tuple[int, int]](), attention._fill

    def filled(*given: Any) -> None:
        spans.append((int(given[4].handle.data.item()), int(given[5].handle.data.item())))
        fill(*given)

    monkeypatch.setattr(attention, "_fill", filled)
    monkeypatch.setattr(launch, "_pieces", lambda programs, *lengths: (1, 1))
    monkeypatch.setattr(launch, "ALONE_BLOCKS", 0)
    monkeypatch.setattr(launch, "_tile", lambda q: 4)
    with_teams(monkeypatch, 1, 4)
    attended(store(2, [60], [1], kv_heads=1, dtype=torch.float32), Reach(10, 3, 1, torch.full((2,), 0.3)))
    assert spans == [(0, 4), (4, 8), (8, 12), (12, 15)]
