"""What a client has a grammar made of takes a bounded time, and holds up nobody meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from shoal.api.bodies import ChatRequest
from shoal.api.tools import Offer
from shoal.engine.events import Guide
from shoal.engine.guided import Grammars
from shoal.errors import RequestError
from shoal.inputs.tokenizer import Tokenizer

WHOLE = {"type": "integer"}
DIVISORS: dict[str, Any] = {
    "one": {**WHOLE, "multipleOf": 99_999_989},
    "together": {"allOf": [{**WHOLE, "multipleOf": 9973}, {**WHOLE, "multipleOf": 9967}]},
    "of a fraction": {"type": "number", "allOf": [{"multipleOf": 997.3}, {"multipleOf": 9.967}]},
    "as a float": {**WHOLE, "multipleOf": 9.9999989e7},
}
STRING = {"type": "string"}
OPTIONAL = "(ab|cd)?" * 50_000
# of each kind of guide those that an engine of expressions is known to be slow with
SLOW: dict[str, Guide] = {
    "nested": Guide("regex", "((a{1,1000}b{1,1000}){1,1000}c){1,1000}"),
    "backtracking": Guide("regex", "(a+)+b" * 50),
    "many states": Guide("regex", "(a|b)*a(a|b){200}"),
    "long": Guide("regex", OPTIONAL),
    "choices": Guide("choice", [f"abc{number}" for number in range(100_000)]),
}
SCHEMAS: dict[str, Any] = {
    "a long pattern": {**STRING, "pattern": OPTIONAL},
    "many patterns": {"anyOf": [{**STRING, "pattern": f"{number}(a?){{4000}}" + "b?" * 1000} for number in range(99)]},
    "a pattern and a length": {**STRING, "pattern": "^(a|b)*a(a|b){9999}$", "minLength": 9999},
    "all of patterns": {"allOf": [{**STRING, "pattern": f"(.*{letter}){{50}}"} for letter in "abcdefgh"]},
    "a property's pattern": {"type": "object", "patternProperties": {f"^{OPTIONAL}$": STRING}},
    **DIVISORS,
}
SLOW |= {name: Guide("json_schema", json.dumps(schema)) for name, schema in SCHEMAS.items()}
SECONDS = 30.0  # generous: alone all of them together take five


def _compile(guides: list[Guide]) -> None:
    for guide in guides:
        with suppress(RequestError):
            Grammars(Tokenizer.bytes_only(), 300).compile(guide)


@pytest.mark.parametrize("name", SLOW)
def test_no_guide_takes_for_ever(name: str) -> None:
    """In a process of its own, which can be ended where it would."""
    process = multiprocessing.get_context("fork").Process(target=_compile, args=([SLOW[name]],))
    process.start()
    process.join(SECONDS)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def test_python_goes_on_while_a_guide_is_made() -> None:
    """So that a loop in the same process answers others."""
    thread = threading.Thread(
        target=_compile, args=([Guide("regex", "a?" * 4000), SLOW["all of patterns"], SLOW["choices"]],)
    )
    longest, before = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        longest, before = max(longest, time.perf_counter() - before), time.perf_counter()
    assert longest < 1.0


@pytest.mark.parametrize("schema", DIVISORS.values(), ids=DIVISORS)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_divisors_are_refused_in_tools_too(schema: dict[str, Any], choice: str) -> None:
    parameters = {"type": "object", "properties": {"n": schema}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": [tool], "tool_choice": choice}
    guide = Offer(ChatRequest.model_validate(body)).guide
    assert guide is not None
    with pytest.raises(RequestError, match="multipleOf"):
        Grammars(Tokenizer.bytes_only(), 300).compile(guide)


@pytest.mark.parametrize("divisor", [7, 60, 3600, 10**7, 0.01, 2.5, 1e-9])
def test_usual_divisors_are_followed(divisor: float) -> None:
    guide = Guide("json_schema", json.dumps({"type": "number", "multipleOf": divisor}))
    assert Grammars(Tokenizer.bytes_only(), 300).compile(guide).allowed([]).any()
