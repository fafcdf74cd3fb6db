"""What a request may ask for: every bound with what lies on it and just beyond, and copies of all that is given."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.engine.events import Guide, Request, Sampling, Token
from shoal.errors import RequestError

# field: its least and its greatest value, and what is too much; of whole numbers the next one
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31),
    "min_p": (0, 1),
    "max_tokens": (1, 2**31),
    "min_tokens": (0, 16),  # of 16 at most
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-3, 100),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "speculative": (0, 16),
}
WHOLE = ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "speculative")


def refused(says: str, **given: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Sampling(**given)
    assert caught.value.param == says.partition(":")[0].partition(" ")[0]
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_is_taken_from_its_least_to_its_greatest(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        assert getattr(Sampling(**{name: value}), name) == value  # type: ignore[arg-type]
    below, above = (low - 1, high + 1) if name in WHOLE else (math.nextafter(low, -9), math.nextafter(high, 999))
    for value in (below, above):
        refused(f"{name}: got", **{name: value})
    for odd in (True, "1", math.nan, math.inf, 10**400, *([1.0] if name in WHOLE else [None])):
        refused(f"{name}: got" if odd is not None else f"{name}: allowed", **{name: odd})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop": ["a", ""]}, "stop: got ''; allowed: non-empty strings"),
        ({"stop": ["a", 3]}, "stop: got 3"),
        ({"stop": ""}, "stop: got ''"),
        ({"stop": 3}, "stop: got 3; allowed: strings"),
        ({"stop": b"ab"}, "stop: got"),
        ({"stop_token_ids": "12"}, "stop_token_ids: got"),
        ({"stop_token_ids": {5}}, "stop_token_ids: got"),
        ({"stop_token_ids": [5, True]}, "stop_token_ids: got True; allowed: a whole number"),
        ({"banned": [[1], []]}, "banned: got []; allowed: lists of at least one token id"),
        ({"banned": [1]}, "banned: got 1"),
        ({"banned": [[1.5]]}, "banned: got 1.5; allowed: a whole number"),
        ({"logit_bias": [1]}, "logit_bias: got [1]"),
        ({"logit_bias": {"a": 1}}, "logit_bias: got 'a'; allowed: a whole number"),
        ({"logit_bias": {1: math.nextafter(100, 101)}}, "logit_bias: got"),
        ({"logit_bias": {1: -101}}, "logit_bias: got -101; allowed: numbers from -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: got"),
        ({"logit_bias": {1: True}}, "logit_bias: got True"),
        ({"guided": "json"}, "guided: got 'json'; allowed: a Guide"),
        ({"guided": Guide("json_object"), "ignore_eos": True}, "ignore_eos with guided"),
        ({"guided": Guide("json_object"), "min_tokens": 1}, "min_tokens with guided"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], says: str) -> None:
    refused(says, **given)


def test_what_lies_on_the_bounds_is_used() -> None:
    made = Sampling(logit_bias={1: 100, 2: -100.0}, guided=Guide("json_object"), stop="###")
    assert made.logit_bias == {1: 100, 2: -100.0} and made.stop == ("###",)
    assert Sampling(ignore_eos=True, min_tokens=3).guided is None
    assert Sampling(frame=("<a>", "</a>")).frame == ("<a>", "</a>")


@pytest.mark.parametrize(
    ("kind", "spec", "fits"),
    [
        ("json_schema", "{}", True),
        ("json_schema", "", False),
        ("json_schema", ["{}"], False),
        ("json_object", "", True),
        ("json_object", "{}", False),
        ("json_object", [], False),
        ("regex", "a+", True),
        ("regex", "", False),
        ("lark", "start: 'a'", True),
        ("choice", ["a", "b"], True),
        ("choice", [], False),
        ("choice", "ab", False),
        ("choice", ["a", ""], False),
        ("choice", ["a", 3], False),
        ("xml", "a", False),
    ],
)
def test_a_guide_has_what_its_kind_needs_and_nothing_else(kind: Any, spec: Any, fits: bool) -> None:
    if fits:
        assert Guide(kind, spec).spec == spec
        return
    with pytest.raises(RequestError, match=r"guided\.(kind|spec of)") as caught:
        Guide(kind, spec)
    assert caught.value.param == "guided"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"sampling": {}}, "sampling"),
        ({"id": ""}, "id"),
        ({"id": 3}, "id"),
        ({"depth": True}, "depth"),
        ({"depth": 1.5}, "depth"),
        ({"priority": 0.5}, "priority"),
        ({"answer": "ab"}, "answer"),
        ({"answer": [1.5]}, "answer"),
        ({"deadline": -1e-9}, "deadline"),
        ({"deadline": math.inf}, "deadline"),
        ({"deadline": 10**400}, "deadline"),
        ({"deadline": "3"}, "deadline"),
        ({"ran": 1.5}, "ran"),
        ({"quality_tolerance": -1}, "quality_tolerance"),
        ({"quality_tolerance": True}, "quality_tolerance"),
        ({"spent": -1.0}, "spent"),
        ({"spent": math.nan}, "spent"),
    ],
)
def test_a_request_that_cannot_be_run_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request("x", **given)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("priority", "sooner"), [(0, -1), (-3, -4), (1, 0), (99, 98), (100, 100), (101, 100), (102, 101)]
)
def test_who_goes_on_elsewhere_goes_a_little_sooner_and_what_may_wait_still_may(priority: int, sooner: int) -> None:
    assert Request("x", priority=priority).sooner == sooner


@pytest.mark.parametrize(
    ("depth", "routed", "spent", "goes_on"),
    [  # it goes on: routed, with which tolerance, and what was spent of it
        ("auto", False, None, (True, 0.2, 0.0)),  # the router chose, and may look again
        ("auto", False, 0.25, (False, 0.2, 0.25)),  # drafts at full depth, verified
        ("auto", False, 0.0, (False, 0.2, 0.0)),
        (2, False, None, (False, None, 0.0)),  # nothing keeps a tolerance there
        (2, False, 0.25, (False, 0.2, 0.25)),
        (2, True, None, (True, 0.2, 0.0)),  # a second engine was lost as well
        (2, True, 0.25, (False, 0.2, 0.25)),
    ],
)
def test_what_another_engine_goes_on_with_follows_from_what_was_told(
    depth: str | int, routed: bool, spent: float | None, goes_on: tuple[bool, float | None, float]
) -> None:
    asked = Request(
        "x", Sampling(max_tokens=9), depth=depth, quality_tolerance=0.2, id="a", deadline=3.0, priority=4, payer="p",
        client="c", answer=(60, 61), spent=0.125, ran=3, routed=routed, adapter="l", signals=True, gaps=True, beside="b",
    )  # fmt: skip
    rest = asked.after([62, 63], Token("a", 63, "", depth=4, spent=spent, ran=11))
    keeps, tolerance, so_far = goes_on
    changed = {"answer": (60, 61, 62, 63), "depth": 4, "ran": 11, "spent": so_far}
    assert vars(rest) == {**vars(asked), **changed, "routed": keeps, "quality_tolerance": tolerance}
