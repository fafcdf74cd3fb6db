"""What a request holds, in numbers: units that it needs, where it begins, what it gives back. Four tokens a page."""

from __future__ import annotations

import pytest

from shoal.engine.holding import NEVER, Holding
from shoal.engine.pages import Pages

PAGE = 4
TEN = list(range(50, 60))  # two full pages and half of one


def held(tokens: list[int]) -> Holding:
    return Holding.nothing(tokens, None, PAGE, longest=40)


def stored(pages: Pages, tokens: list[int], groups: int) -> Holding:
    """All of `tokens` stand in the first `groups` groups."""
    one = held(tokens)
    one.needed(pages, groups)
    one.enter(pages, groups, scoring=False)
    one.take(pages, len(tokens), groups)
    one.advance(pages, len(tokens), 0, groups)
    return one


def entered(pages: Pages, tokens: list[int], groups: int | None, scoring: bool = False) -> Holding:
    one = held(tokens)
    one.needed(pages, groups or 1)
    one.enter(pages, groups, scoring)
    return one


@pytest.mark.parametrize(
    ("tokens", "groups", "lacking"), [(9, 1, 1), (9, 2, 3), (9, 4, 9), (8, 2, 1), (4, 4, 2), (5, 1, 0), (0, 4, 0)]
)
def test_it_lacks_what_each_of_its_groups_has_too_few(tokens: int, groups: int, lacking: int) -> None:
    one = held(TEN)
    one.owned = [2, 1, 0, 0]
    assert one.lacking(tokens, groups) == lacking


def test_pages_that_others_hold_need_no_unit_and_cached_ones_are_taken_from_what_is_available() -> None:
    pages = Pages(41)
    assert [held(TEN).needed(pages, groups) for groups in (1, 2, 4)] == [3, 6, 12]
    first = stored(pages, TEN, 2)
    assert [held(TEN).needed(pages, groups) for groups in (1, 2, 4)] == [1, 2, 8], (
        "two full pages in each of two groups"
    )
    assert held(TEN[:8]).needed(pages, 2) == 0 and held(TEN[:7]).needed(pages, 2) == 2
    first.release(pages)
    assert [held(TEN).needed(pages, groups) for groups in (1, 2, 4)] == [3, 6, 12]
    before = pages.available
    entered(pages, TEN, 2).take(pages, 10, 2)
    assert before - pages.available == 6


@pytest.mark.parametrize(
    ("tokens", "groups", "at"),
    [
        (10, 1, 8),
        (10, 2, 8),
        (10, 3, 0),  # the third group has nothing of it
        (8, 2, 7),  # the last row always runs: it gives the next token
        (7, 2, 4),
        (3, 2, 0),
    ],
)
def test_it_begins_after_what_all_of_its_groups_have(tokens: int, groups: int, at: int) -> None:
    pages = Pages(41)
    stored(pages, TEN, 2)
    one = entered(pages, TEN[:tokens], groups)
    full = tokens // PAGE * PAGE
    assert (one.at, one.states_from) == (at, None)
    assert one.found == one.computed == [full if group < min(groups, 2) else 0 for group in range(4)]
    scored = entered(pages, TEN[:tokens], groups, scoring=True)
    assert (scored.at, scored.found) == (0, one.found), "all rows run, whatever is cached"


@pytest.mark.parametrize(("noted", "tokens", "at"), [(0, 10, 0), (1, 10, 4), (2, 10, 8), (2, 8, 7), (2, 3, 0)])
def test_before_its_depth_is_known_it_begins_after_the_pages_whose_sums_are_kept(
    noted: int, tokens: int, at: int
) -> None:
    pages = Pages(41)
    first = stored(pages, TEN, 2)
    for index in range(noted):
        pages.note(int(first.tables[0, index]), index)
    one = entered(pages, TEN[:tokens], None)
    assert one.at == one.states_from == at
    assert one.notes == [*range(min(noted, tokens // PAGE))]
    assert entered(pages, TEN[:tokens], None, scoring=True).states_from == 0


@pytest.mark.parametrize(("groups", "at"), [(1, 9), (2, 8), (3, 4), (4, 0)])
def test_once_its_depth_is_known_it_goes_back_to_where_its_deeper_groups_are(groups: int, at: int) -> None:
    pages = Pages(41)
    first, shorter = stored(pages, TEN, 2), stored(pages, TEN[:4], 3)
    assert (first.owned, shorter.owned) == ([3, 3, 0, 0], [1, 1, 1, 0])
    first.release(pages)
    one = entered(pages, TEN, None)
    one.take(pages, 10, 1)
    one.advance(pages, 10, 0, 1)
    one.deepen(pages, groups, scoring=False, notes=["a", "b", "c"])
    assert (one.at, one.computed[0]) == (at, 10)
    assert [pages.noted(int(unit)) for unit in one.tables[0, :3]] == ["a", "b", None], "half a page is nobody else's"
    one.deepen(pages, 1, scoring=True, notes=[])
    assert one.at == 0


def test_who_looks_again_keeps_what_it_has_and_looks_for_the_deeper_groups_alone() -> None:
    """Of three pages that others have in four groups it has computed its own in two."""
    pages = Pages(81)
    one = stored(pages, [*TEN], 2)
    tokens = [*TEN, *range(60, 66)]
    stored(pages, tokens, 4).release(pages)
    one.tokens += tokens[10:]
    one.take(pages, 16, 2)
    one.advance(pages, 15, 0, 2)
    one.states, one.notes = ["left"], ["left"]
    for index in range(2):
        pages.note(int(one.tables[0, index]), index)
    one.look(pages)
    assert (one.states, one.notes, one.at, one.states_from) == ([], [0, 1], 8, 8)
    assert (one.computed, one.owned) == ([15, 15, 0, 0], [4, 4, 0, 0]), "what is computed stays"
    before = one.units()
    one.extend_keys(pages)
    one.deepen(pages, 4, scoring=False, notes=["c"])
    assert one.units()[:2] == before[:2] and one.owned == [4, 4, 4, 4]
    assert (one.computed, one.found, one.at) == ([15, 15, 16, 16], [0, 0, 16, 16], 15)
    assert pages.noted(int(one.tables[0, 2])) == "c", "behind those that it had"


def test_ahead_of_itself_it_holds_the_same_units_and_waits_for_the_newest_token_s_states() -> None:
    pages = Pages(41)
    one = stored(pages, TEN, 2)
    one.states, one.states_from = ["a"], 3
    ahead = one.ahead([*TEN, 1, 2])
    assert (ahead.tokens, ahead.states, ahead.states_from) == ([*TEN, 1, 2], [], 9)
    assert (one.tokens, one.states, one.states_from) == (TEN, ["a"], 3), "stays as it is"
    assert ahead.tables is one.tables and (ahead.owned, ahead.at) == ([3, 3, 0, 0], 10)


def test_what_is_released_leaves_nothing_of_a_request_that_may_enter_again() -> None:
    pages = Pages(41)
    one = stored(pages, TEN, 2)
    one.states, one.notes, one.states_from = ["a"], ["b"], 4
    one.release(pages)
    assert one.owned == one.computed == one.offered == [0] * 4
    assert (one.at, one.states_from, one.states, one.notes) == (0, None, [], [])
    assert not one.tables.any() and pages.available == pages.total
    one.enter(pages, 2, scoring=False)
    assert (one.at, one.computed, one.found) == (8, [8, 8, 0, 0], [8, 8, 0, 0]), "its own pages, as those of another"


def test_pages_are_offered_as_they_become_full_in_the_groups_that_ran_and_never_twice() -> None:
    pages = Pages(41)
    one = held(TEN)
    one.take(pages, 10, 2)
    for end, first, last, computed, offered in (
        (3, 0, 1, [3, 0, 0, 0], [0, 0, 0, 0]),
        (4, 0, 1, [4, 0, 0, 0], [1, 0, 0, 0]),
        (9, 0, 1, [9, 0, 0, 0], [2, 0, 0, 0]),
        (10, 0, 1, [10, 0, 0, 0], [2, 0, 0, 0]),
    ):
        one.advance(pages, end, first, last)
        assert (one.at, one.computed, one.offered) == (end, computed, offered)
    one.at = 0
    one.advance(pages, 8, 1, 2)  # its deeper group runs behind
    assert (one.at, one.computed, one.offered) == (8, [10, 8, 0, 0], [2, 2, 0, 0])
    one.at = 2
    one.advance(pages, 6, 0, 1)  # rows that stand are run again: nothing falls
    assert (one.at, one.computed[0]) == (6, 10)
    assert pages.match(0, one.keys) == one.units()[0][:2] and pages.match(2, one.keys) == []


def test_of_a_page_that_others_have_the_same_unit_is_used() -> None:
    """Both computed it at the same time: who is later gives its own unit back."""
    pages = Pages(41)
    one, other = held(TEN), held(TEN)
    for each in (one, other):
        each.take(pages, 10, 1)
    before = pages.available
    for each in (one, other):
        each.advance(pages, 10, 0, 1)
    assert other.units()[0][:2] == one.units()[0][:2] and other.units()[0][2] != one.units()[0][2]
    assert pages.available == before + 2
    pages.check_integrity([*one.units(), *other.units()])


def test_behind_a_page_that_is_another_s_by_its_digest_none_is_offered() -> None:
    pages = Pages(41, digest=lambda data: b"the same")
    one = stored(pages, [*TEN, 1, 2], 1)  # its second page, too, has the digest of its first
    assert one.offered == [NEVER, 0, 0, 0]
    own = one.units()
    one.tokens += [3, 4, 5, 6]
    one.take(pages, 16, 1)
    one.advance(pages, 16, 0, 1)
    assert one.offered[0] == NEVER > 2**40 and one.units()[0][:3] == own[0]
    pages.check_integrity(one.units())
    one.release(pages)
    assert pages.cached == 1


def test_sums_of_a_prompt_s_later_pages_are_kept_behind_those_that_were_found() -> None:
    pages = Pages(41)
    first = stored(pages, TEN, 2)
    pages.note(int(first.tables[0, 0]), "found")
    one = entered(pages, TEN, None)
    assert (one.notes, one.at) == (["found"], 4)
    one.take(pages, 10, 1)
    one.advance(pages, 10, 0, 1)
    one.deepen(pages, 1, scoring=False, notes=["b", "c"])
    assert [pages.noted(int(unit)) for unit in one.tables[0, :3]] == ["found", "b", None]


def test_what_wrong_drafts_were_written_to_is_given_back_and_no_longer_in_its_table() -> None:
    pages = Pages(41)
    one = stored(pages, TEN, 2)
    one.take(pages, 17, 2)
    taken, before = one.units(), pages.available
    assert one.owned == [5, 5, 0, 0]
    with pytest.raises(RuntimeError, match=r"request x owns \[5, 5, 0, 0\] units for pages \[3, 3, 0, 0\]"):
        one.check("x")
    one.trim(pages, 2)
    one.check("x")
    assert (one.owned, pages.available) == ([3, 3, 0, 0], before + 4)
    assert one.tables.tolist() == [[*taken[group][:3], *[0] * 7] for group in (0, 1)] + [[0] * 10] * 2
    pages.check_integrity(one.units())
    one.release(pages)
    assert not one.tables.any() and pages.available == pages.total


@pytest.mark.parametrize(("count", "full"), [(3, 0), (4, 1), (7, 1), (8, 2), (10, 2)])
def test_a_page_has_a_key_once_it_is_full(count: int, full: int) -> None:
    one, pages = held(TEN[:count]), Pages(41)
    for _ in range(2):
        one.extend_keys(pages)
        assert [key.tokens for key in one.keys] == [tuple(TEN[PAGE * i : PAGE * (i + 1)]) for i in range(full)]


def test_a_page_s_key_is_of_what_it_holds_of_images_of_its_adapter_and_of_the_pages_before_it() -> None:
    class Images:
        def runs(self, start: int, end: int) -> list[tuple[str, int]]:
            return [(f"up to {end}", start)]

    pages = Pages(41)
    one = Holding.nothing(TEN, Images(), PAGE, longest=40, adapter="l")  # type: ignore[arg-type]
    one.extend_keys(pages)
    first = pages.key(None, TEN[:4], [("up to 4", 0)], "l")
    assert one.keys == [first, pages.key(first, TEN[4:8], [("up to 8", 4)], "l")]
    salted = Holding.nothing(TEN, Images(), PAGE, longest=40, adapter="l", salt="s")  # type: ignore[arg-type]
    salted.extend_keys(pages)
    assert salted.keys[0] == pages.key(None, TEN[:4], [("up to 4", 0)], "l", "s")
    assert len({key.digest for key in (*one.keys, *salted.keys)}) == 4
    assert one.tables.shape == (4, 10) and Holding.nothing(TEN, None, PAGE, longest=41).tables.shape == (4, 11)
