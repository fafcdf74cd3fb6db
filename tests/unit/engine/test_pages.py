"""The pool of units: who owns what, what is shared, what is evicted, and that the books always balance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from shoal.engine.pages import PageKey, Pages, PatchRun


def chain(pages: Pages, *contents: tuple[int, ...], images: tuple[PatchRun, ...] = ()) -> list[PageKey]:
    keys: list[PageKey] = []
    for tokens in contents:
        keys.append(pages.key(keys[-1] if keys else None, tokens, images))
    return keys


def store(pages: Pages, group: int, keys: list[PageKey]) -> list[int]:
    units = pages.allocate(len(keys))
    for key, unit in zip(keys, units, strict=True):
        assert pages.register(group, key, unit) == unit
    return units


def test_the_null_unit_is_never_given_out() -> None:
    pages = Pages(5)
    assert sorted(pages.allocate(4)) == [1, 2, 3, 4]
    assert pages.available == 0
    with pytest.raises(ValueError, match="1 units asked of a pool with 0 available"):
        pages.allocate(1)


def test_a_released_page_is_found_again_until_it_is_evicted() -> None:
    pages = Pages(4)
    keys = chain(pages, (1, 2), (3, 4))
    units = store(pages, 0, keys)
    pages.release(units)
    assert pages.available == 3 and pages.cached == 2
    assert pages.match(0, keys) == units
    pages.release(units)
    taken = pages.allocate(2)  # one free unit, then the least recently used page: the later one
    assert pages.peek(0, keys) == (1, 1)
    pages.check_integrity([taken])


def test_what_nobody_uses_can_be_forgotten() -> None:
    pages = Pages(5)
    old, new = chain(pages, (1,), (2,)), chain(pages, (3,), (4,))
    pages.release(store(pages, 0, old))
    held = store(pages, 0, new)
    pages.forget()
    assert pages.peek(0, old) == (0, 0) and pages.peek(0, new) == (2, 0) and pages.available == 2
    pages.check_integrity([held])


def test_eviction_takes_the_least_recently_used_chain_from_its_end() -> None:
    pages = Pages(5)
    old, new = chain(pages, (1,), (2,)), chain(pages, (3,), (4,))
    pages.release(store(pages, 0, old))
    pages.release(store(pages, 0, new))
    pages.release(pages.match(0, old))  # now `new` is the older one
    pages.allocate(1)
    assert pages.peek(0, new)[0] == 1 and pages.peek(0, old)[0] == 2


def test_two_requests_share_and_the_unit_lives_as_long_as_either() -> None:
    pages = Pages(4)
    keys = chain(pages, (1, 2))
    first = store(pages, 0, keys)
    second = pages.match(0, keys)
    assert first == second
    pages.release(first)
    pages.check_integrity([second])
    assert pages.cached == 0
    pages.release(second)
    assert pages.cached == 1
    with pytest.raises(ValueError, match="released more often"):
        pages.release(second)


def test_equal_pages_computed_twice_are_kept_once() -> None:
    pages = Pages(4)
    (key,) = chain(pages, (7, 8))
    (mine,) = store(pages, 0, [key])
    (other,) = pages.allocate(1)
    assert pages.register(0, key, other) == mine
    pages.check_integrity([[mine], [mine]])
    assert pages.available == 2


def test_groups_tokens_images_and_weights_keep_pages_apart() -> None:
    pages = Pages(9, weights="a")
    plain = chain(pages, (1, 2), (3, 4))
    store(pages, 0, plain)
    assert pages.peek(1, plain)[0] == 0
    assert pages.peek(0, chain(pages, (1, 2), (3, 5)))[0] == 1
    assert pages.peek(0, chain(pages, (9, 2), (3, 4)))[0] == 0
    assert pages.peek(0, chain(pages, (1, 2), images=(("cat", 0),)))[0] == 0
    other = Pages(9, weights="b")
    assert other.key(None, (1, 2)).digest != plain[0].digest


def test_a_digest_collision_is_a_miss_and_never_shares() -> None:
    pages = Pages(9, digest=lambda data: b"same for all")
    (a,) = chain(pages, (1, 2))
    (b,) = chain(pages, (3, 4))
    assert a.digest == b.digest
    store(pages, 0, [a])
    assert pages.match(0, [b]) == []
    (unit,) = pages.allocate(1)
    assert pages.register(0, b, unit) is None


def test_notes_live_as_long_as_the_page_can_be_found() -> None:
    pages = Pages(3)
    keys = chain(pages, (1,), (2,))
    units = store(pages, 0, keys)
    pages.note(units[0], "sums")
    pages.release(units)
    assert pages.noted(units[0]) == "sums"
    pages.allocate(2)
    assert pages.noted(units[0]) is None
    (private,) = Pages(3).allocate(1)
    pages.note(private, "x")
    assert pages.noted(private) is None or private in units


class PoolMachine(RuleBasedStateMachine):
    """Requests come, grow page by page, register, and leave, over a tiny pool and a tiny alphabet (so that prefixes meet).
    A model of what each unit holds proves that a match never gives a unit of other content."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(9)
        self.holds: dict[int, tuple[int, tuple[int, ...]]] = {}  # unit -> (group, all tokens up to its end)
        self.live: list[dict] = []  # type: ignore[type-arg]

    requests = Bundle("requests")

    @rule(target=requests, group=st.integers(0, 1), want=st.lists(st.integers(0, 1), max_size=4))
    def arrive(self, group: int, want: list[int]) -> dict:  # type: ignore[type-arg]
        keys = chain(self.pages, *[(t,) for t in want])
        units = self.pages.match(group, keys)
        for index, unit in enumerate(units):
            assert self.holds[unit] == (group, tuple(want[: index + 1]))
        request = {"group": group, "tokens": want[: len(units)], "keys": keys[: len(units)], "units": units, "ok": True}
        self.live.append(request)
        return request

    @precondition(lambda self: self.pages.available > 0)
    @rule(request=requests, token=st.integers(0, 1), full=st.booleans())
    def grow(self, request: dict, token: int, full: bool) -> None:  # type: ignore[type-arg]
        (unit,) = self.pages.allocate(1)
        request["tokens"].append(token)
        request["keys"].append(self.pages.key(request["keys"][-1] if request["keys"] else None, (token,)))
        self.holds[unit] = (request["group"], tuple(request["tokens"]))
        request["ok"] = request["ok"] and full
        if request["ok"]:
            kept = self.pages.register(request["group"], request["keys"][-1], unit)
            assert kept is not None and self.holds[kept] == self.holds[unit]
            unit = kept
        request["units"].append(unit)

    @rule(request=consumes(requests))
    def leave(self, request: dict) -> None:  # type: ignore[type-arg]
        self.live = [r for r in self.live if r is not request]
        self.pages.release(request["units"])

    @rule()
    def forget(self) -> None:
        self.pages.forget()
        assert self.pages.cached == 0

    @invariant()
    def balanced(self) -> None:
        self.pages.check_integrity(r["units"] for r in self.live)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_unit_that_nobody_can_find_keeps_no_note() -> None:
    pages = Pages(4)
    (private,) = pages.allocate(1)
    pages.note(private, "sums")
    assert pages.noted(private) is None
    (found,) = store(pages, 0, chain(pages, (1, 2)))
    pages.note(found, "sums")
    assert pages.noted(found) == "sums"
    pages.check_integrity([[private], [found]])


def _orphan(pages: Pages, held: int, cached: int) -> None:
    pages.register(0, pages.key(pages.key(None, [9] * 4), [8] * 4), held)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda pages, held, cached: pages._free.append(pages._free[0]), "a unit is free twice"),
        (lambda pages, held, cached: pages._free.append(cached), "a unit is in two states"),
        (lambda pages, held, cached: pages._free.pop(), r"free \+ cached \+ owned != total"),
        (
            lambda pages, held, cached: pages._key.update({pages._free[0]: pages._key[cached]}),
            "a free unit is registered",
        ),
        (lambda pages, held, cached: pages._key.pop(cached), "a cached unit is not registered"),
        (_orphan, "a page outlived the page before it"),
        (lambda pages, held, cached: pages._notes.update({held: "sums"}), "a note outlived its page"),
        (lambda pages, held, cached: pages._unit.clear(), "the two indexes disagree"),
    ],
)
def test_whatever_is_wrong_with_the_books_is_found(broken: Callable[[Pages, int, int], object], says: str) -> None:
    pages = Pages(6)
    cached, held = pages.allocate(2)
    assert pages.register(0, pages.key(None, [7] * 4), cached) == cached
    pages.release([cached])
    pages.check_integrity([[held]])
    broken(pages, held, cached)
    with pytest.raises(RuntimeError, match=f"page pool: {says}"):
        pages.check_integrity([[held]])


@pytest.mark.parametrize("state", ["free", "cached"])
def test_a_unit_that_is_owned_is_nothing_else(state: str) -> None:
    pages = Pages(6)
    (unit,) = pages.allocate(1)
    pages.register(0, pages.key(None, [7] * 4), unit)
    pages.release([unit])
    wrong = unit if state == "cached" else pages._free[0]
    pages._refs[wrong] = 1
    with pytest.raises(RuntimeError, match="a unit is in two states"):
        pages.check_integrity([[wrong]])
    with pytest.raises(RuntimeError, match="are not the live requests'"):
        pages.check_integrity()
