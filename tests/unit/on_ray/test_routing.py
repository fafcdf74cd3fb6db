"""Where requests go: a beginning to the replica that has it, nobody past the bound, and nobody unreachable."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("ray")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shoal import Request, presets
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.on_ray.routing import SHARE, SPARE, Affinity, beginnings, eligible

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


def test_who_refused_or_is_silent_gets_nothing_while_others_are_there() -> None:
    assert eligible(["a", "b", "c"], {"a"}, {"b"}) == ["c"]
    assert eligible(["a", "b"], {"a"}, {"b"}) == ["b"], "silent before refused"
    assert eligible(["a", "b"], {"a", "b"}, {"b"}) == ["a"]
    assert eligible(["a", "b"], (), {"a", "b"}) == ["a", "b"]
