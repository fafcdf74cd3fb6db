"""Where requests go: a beginning to the replica that has it, nobody past the bound, and nobody unreachable."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shoal import Request, presets
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.on_ray.calls import Wanted
from shoal.on_ray.pulse import Pulse
from shoal.on_ray.routing import SHARE, SPARE, Affinity, AffinityRouter, beginnings, eligible

PAGE = 8
CONFIG = presets.get("test").model
NAMES = [f"replica-{i}" for i in range(5)]
LOADS = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 40), min_size=1)
IDS = st.lists(st.integers(20, 259), min_size=1, max_size=60)


def picture(value: int) -> Encoded:
    image = to_patches(Image.fromarray(np.full((24, 24, 3), value, dtype=np.uint8)), CONFIG)
    return Encoded([*image.tokens(), 65, 66, 67], [image])


@given(IDS, IDS, IDS)
def test_prompts_share_hashes_as_far_as_they_share_pages(common: list[int], one: list[int], two: list[int]) -> None:
    first, second = common + one, common + two
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    keys = [beginnings(Request(ids), PAGE) for ids in (first, second)]
    shared = sum(a == b for a, b in zip(*keys, strict=False))
    if min(len(first), len(second)) >= PAGE:
        assert shared == same // PAGE
    else:
        assert shared == (first == second)


def test_two_images_never_share_a_beginning() -> None:
    dark, bright = picture(0), picture(200)
    assert dark.ids == bright.ids
    assert not set(beginnings(Request(dark), PAGE)) & set(beginnings(Request(bright), PAGE))
    assert beginnings(Request(dark), PAGE) == beginnings(Request(picture(0)), PAGE)


def test_the_same_prompt_begins_otherwise_with_each_adapter_and_cache_salt() -> None:
    """As in the prefix cache, where nothing of one is found by another."""
    ids = list(range(20, 60))
    asked = [Request(ids, adapter=name, cache_salt=salt) for name in ("", "a", "b") for salt in ("", "a", "b")]
    keys = [beginnings(request, PAGE) for request in asked]
    assert len({key for each in keys for key in each}) == len(asked) * len(keys[0])


@given(IDS, LOADS)
def test_every_replica_is_reachable_and_those_past_the_bound_are_last(ids: list[int], loads: dict[str, int]) -> None:
    affinity, keys = Affinity(), beginnings(Request(ids), PAGE)
    affinity.remember(keys, max(loads, key=lambda name: loads[name]))  # the busiest one has it
    ranked = affinity.ranked(keys, loads)
    assert sorted(ranked) == sorted(loads)
    bound = max(SPARE, SHARE * (sum(loads.values()) + 1) / len(loads))
    assert loads[ranked[0]] <= bound  # there always is one below it: the mean is
    assert sorted(ranked, key=lambda name: loads[name] >= bound) == ranked


def test_a_conversation_stays_where_it_was() -> None:
    affinity, idle = Affinity(), dict.fromkeys(NAMES, 0)
    system = list(range(20, 60))
    for user in range(20):
        turns = [*system, *[100 + user] * 20]
        home = NAMES[user % 5]
        affinity.remember(beginnings(Request(turns), PAGE), home)
    for user in range(20):
        longer = [*system, *[100 + user] * 20, *range(200, 230)]
        assert affinity.ranked(beginnings(Request(longer), PAGE), idle)[0] == NAMES[user % 5]


def test_new_beginnings_spread_and_a_replica_that_goes_moves_only_its_own() -> None:
    prompts = [beginnings(Request([20 + i % 200, i // 200, *range(30, 60)]), PAGE) for i in range(1000)]
    everywhere = [Affinity().ranked(keys, dict.fromkeys(NAMES, 0))[0] for keys in prompts]
    assert all(140 < count < 260 for count in Counter(everywhere).values())
    fewer = [Affinity().ranked(keys, dict.fromkeys(NAMES[:-1], 0))[0] for keys in prompts]
    moved = [before for before, after in zip(everywhere, fewer, strict=True) if before != after]
    assert set(moved) == {NAMES[-1]}


def test_a_popular_beginning_overflows_to_others() -> None:
    """All requests begin alike; with a bound, none of the replicas has much more than its part."""
    affinity, loads = Affinity(), dict.fromkeys(NAMES, 0)
    keys = beginnings(Request(list(range(20, 100))), PAGE)
    for _ in range(200):
        name = affinity.ranked(keys, loads)[0]
        affinity.remember(keys, name)
        loads[name] += 1
    assert max(loads.values()) <= SHARE * 200 / 5 + 2


def test_pictures_of_one_page_in_another_order_are_another_beginning() -> None:
    dark, bright = picture(0), picture(200)
    ids, page = [*dark.ids, *bright.ids], 2 * len(dark.ids)
    one, other = (Encoded(ids, [a.images[0], b.images[0]]) for a, b in ((dark, bright), (bright, dark)))
    assert len(beginnings(Request(one), page)) == 1
    assert beginnings(Request(one), page) != beginnings(Request(other), page)


def test_no_more_than_64_pages_of_a_prompt_are_looked_at_and_none_that_is_not_full() -> None:
    assert [len(beginnings(Request([20] * count), PAGE)) for count in (7, 8, 15, 16, 511, 512, 600)] == [
        1, 1, 1, 2, 63, 64, 64,
    ]  # fmt: skip
    assert beginnings(Request("a text"), PAGE) == []


def test_without_a_beginning_the_least_busy_is_first_and_so_it_is_among_those_past_the_bound() -> None:
    loads = {"a": 3, "b": 40, "c": 0, "d": 30, "e": 2}
    assert Affinity().ranked([], loads) == ["c", "e", "a", "d", "b"]
    affinity = Affinity()
    affinity.remember([b"key"], "a")
    ranked = affinity.ranked([b"key"], loads)
    assert ranked[0] == "a" and set(ranked[1:3]) == {"c", "e"} and ranked[3:] == ["d", "b"]


def test_a_replica_is_past_the_bound_with_a_quarter_more_than_its_part_and_no_less_than_four() -> None:
    affinity = Affinity()
    affinity.remember([b"key"], "a")

    def stays(mine: int, *others: int) -> bool:
        return affinity.ranked([b"key"], {"a": mine, **{str(n): load for n, load in enumerate(others)}})[0] == "a"

    assert stays(3, 0, 0, 0) and not stays(4, 0, 0, 0)
    # of 40 requests and this one a part is 10.25, and a quarter more 12.8
    assert stays(12, 9, 9, 10) and not stays(13, 9, 9, 9)
    # of 35 and this one 9, and a quarter more 11.25
    assert stays(11, 8, 8, 8) and not stays(12, 8, 8, 7)


def test_the_oldest_beginnings_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.on_ray.routing.KNOWN", 2)
    affinity, loads = Affinity(), dict.fromkeys(NAMES, 0)
    fresh = {key: Affinity().ranked([key], loads)[0] for key in (b"one", b"two", b"three")}
    homes = {key: next(name for name in NAMES if name != fresh[key]) for key in fresh}  # not where hashing sends it
    for key in (b"one", b"two", b"one", b"three"):
        affinity.remember([key], homes[key])
    assert affinity.ranked([b"one"], loads)[0] == homes[b"one"], "asked for again since"
    assert affinity.ranked([b"three"], loads)[0] == homes[b"three"]
    assert affinity.ranked([b"two"], loads)[0] == fresh[b"two"]


def test_who_refused_or_is_silent_gets_nothing_while_others_are_there() -> None:
    assert eligible(["a", "b", "c"], {"a"}, {"b"}) == ["c"]
    assert eligible(["a", "b"], {"a"}, {"b"}) == ["b"], "silent before refused"
    assert eligible(["a", "b"], {"a", "b"}, {"b"}) == ["a"]
    assert eligible(["a", "b"], (), {"a", "b"}) == ["a", "b"]


def test_a_picture_counts_in_the_page_where_it_starts_and_after_it() -> None:
    pictures = [picture(value) for value in (0, 60, 120, 180)]
    page = len(pictures[0].ids)
    keys = []
    for last in (2, 3):
        some = [pictures[0], pictures[1], pictures[last]]
        ids = [token for each in some for token in each.ids]
        keys.append(beginnings(Request(Encoded(ids, [each.images[0] for each in some])), page))
    assert [a == b for a, b in zip(*keys, strict=True)] == [True, True, False]


class Queued:
    """A router beside a gateway whose handle knows of so many requests of each replica, of eight that each takes."""

    def __init__(self, loads: dict[str, int | None], queue: int = 5) -> None:
        self.router = AffinityRouter.__new__(AffinityRouter)  # Serve makes the rest of it
        self.router._page, self.router._queue, self.router._affinity = PAGE, queue, Affinity()
        self.router._pulse = Pulse()
        self.router._asked, self.router._first = {}, {}
        ids = {name: SimpleNamespace(unique_id=name) for name in loads}
        self.replicas = [SimpleNamespace(replica_id=of, max_ongoing_requests=8) for of in ids.values()]
        self.router._replicas = {replica.replica_id.unique_id: replica for replica in self.replicas}
        self.router._replica_queue_len_cache = SimpleNamespace(get=lambda of: loads[of.unique_id])

    def ranks(self, *args: Any) -> list[str]:
        pending = SimpleNamespace(args=args, routing_context=SimpleNamespace(should_backoff=False))
        found = asyncio.run(self.router.choose_replicas(self.replicas, pending))
        assert pending.routing_context.should_backoff and all(len(rank) == 1 for rank in found)
        return [rank[0].replica_id.unique_id for rank in found]


def test_there_is_room_for_what_replicas_would_take_now_and_for_the_queue() -> None:
    assert Queued({"a": 3, "b": None, "c": 8, "d": 11}).router._room() == 5 + 5 + 8


def test_serve_is_given_one_replica_a_rank_and_what_was_routed_is_remembered() -> None:
    queued, request = Queued({"a": 2, "b": 0, "c": 1}), Request(list(range(20, 60)))
    assert queued.ranks() == queued.ranks("no request") == ["b", "c", "a"]
    home = queued.ranks(request)[-1]
    queued.router.on_request_routed(SimpleNamespace(args=(request,)), SimpleNamespace(unique_id=home), None)
    assert queued.ranks(request)[0] == home
    assert home not in queued.ranks(request, Wanted("call", "", None, frozenset({home})))
