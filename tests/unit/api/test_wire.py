"""Request bodies: what is read, what is refused and how the refusal names the field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.bodies import ChatRequest, CompletionRequest
from shoal.api.wire import parse
from shoal.errors import RequestError

CHAT = {"model": "fish", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: object) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def refusal(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"zzz": None}, "zzz", "unknown field"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, "messages[0].contnt", "did you mean 'content'?"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text, or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0]",
            "got 'video'; allowed: parts of type text or image_url",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": []}, "messages", "got []; allowed: a list of at least 1"),
        ({"messages": "hi"}, "messages", "got 'hi'; allowed: a list"),
        ({"messages": [5]}, "messages[0]", "got 5; allowed: an object"),
        ({"stop": ["a", 5]}, "stop[1]", "got 5; allowed: text"),
        ({"stop": {"a": 5}}, "stop", "got 'an object of 1'; allowed: text, or a list of texts"),
        ({"temperature": "hot"}, "temperature", "got 'hot'; allowed: a number"),
        ({"max_tokens": 5.5}, "max_tokens", "got 5.5; allowed: a whole number"),
        ({"stream": "yes"}, "stream", "got 'yes'; allowed: true or false"),
        ({"user": "u" * 257}, "user", "allowed: at most 256 characters"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tool_choice": "maybe"}, "tool_choice", "'required'"),
        ({"tool_choice": 5}, "tool_choice", "none, auto, required"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schem": {}}}},
            "response_format.json_schema.schem",
            "did you mean 'schema'?",
        ),
        ({"n": True}, "n", "got True; allowed: a whole number"),
        ({"n": "2"}, "n", "got '2'; allowed: a whole number"),
        ({"seed": 2**64}, "seed", "allowed: below 9223372036854775808"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "low"),
        ({"stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation", "true or false"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_its_reason(fields: dict[str, object], param: str, says: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert says in error.message


def test_a_field_that_lacks_is_named() -> None:
    with pytest.raises(RequestError, match=r"^model is missing$") as caught:
        parse(ChatRequest, b'{"messages": []}')
    assert caught.value.param == "model"


def test_null_and_off_values_mean_not_given() -> None:
    body = chat(temperature=None, tools=[], stop=None, store=False, service_tier="auto", audio=None, seed=None)
    assert body.model_dump() == chat().model_dump()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_fields = st.sampled_from([*ChatRequest.model_fields, *ChatRequest.refused, "x"])


@given(st.dictionaries(_fields, _json, max_size=4))
def test_any_json_is_read_or_refused_never_a_crash(fields: dict[str, object]) -> None:
    for kind in (ChatRequest, CompletionRequest):
        try:
            parse(kind, json.dumps({**CHAT, **fields}).encode())
        except RequestError as error:
            assert error.status == 400
            error.message.encode()  # can be sent
