"""Where a tool is strict no answer that the grammar allows is read as a call of it with other arguments, however it is spelt;
one call at a time ends with what closes it, wherever else that is spelt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits
from shoal.api.requests import EngineCall, chat_call
from shoal.engine.guided import Grammars, StrayError
from shoal.engine.text import TextStream
from tests.unit.open_weights.taught import TOOLS, served, tokenizer
from tests.unit.open_weights.test_call_formats import ASK, FAMILIES, STRICT, offer, read

SCHEMA = {
    "type": "object",
    "properties": {"fish": {"type": "string"}},
    "required": ["fish"],
    "additionalProperties": False,
}
LIKE_A_CALL = {"type": "object", "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}}}
FORMATS: dict[str, dict[str, Any]] = {
    "free": {},
    "one at a time": {"parallel_tool_calls": False},
    "object": {"response_format": {"type": "json_object"}},
    **{
        name: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for name, schema in (
            ("schema", SCHEMA),
            ("like a call", LIKE_A_CALL),
            ("closed, like a call", {**LIKE_A_CALL, "additionalProperties": False}),
            ("two", {"anyOf": [SCHEMA, LIKE_A_CALL]}),
        )
    },
}


def asked(family: str, fields: dict[str, Any]) -> EngineCall:
    body = {"model": "fish", "messages": [ASK], "tools": STRICT, **fields}
    return chat_call(ChatRequest.model_validate(body), served(family), Limits())


def reads(family: str, call: EngineCall) -> Callable[[list[int]], tuple[bool, list[tuple[str, Any]]]]:
    """What says of tokens whether the answer may be these, and the calls that it then has."""
    its, guide = tokenizer(family), call.requests[0].sampling.guided
    assert guide is not None
    grammar = Grammars(its, len(its)).compile(guide)

    def answers(ids: list[int]) -> tuple[bool, list[tuple[str, Any]]]:
        try:
            allowed = bool(grammar.allowed(ids)[its.ends[0]])
        except StrayError:
            return False, []
        stream = its.stream()
        parts = [*(stream.push(token) for token in ids), stream.finish()]
        return allowed, read(call.reader(), parts)[1] if allowed else []

    return answers


def letters(family: str, text: str) -> list[int]:
    """`text` without any token for what frames calls."""
    return tokenizer(family)._letters.encode(text, add_special_tokens=False).ids


def spellings(family: str, text: str, opened: str) -> list[list[int]]:
    its = tokenizer(family)
    before, mark, rest = text.partition(opened)
    return [letters(family, text), its.template_ids(text), [*letters(family, before + mark), *its.template_ids(rest)]]


@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_spelling_of_a_call_goes_around_the_grammar(family: str, fields: dict[str, Any]) -> None:
    """In letters or in tokens, behind text, behind what Python takes for white space, as what else is read."""
    answers, form = reads(family, asked(family, fields)), offer(family).format
    listed, wrong = ("[", "]") if form.listed else ("", ""), f'{{"name": "add_fish", "{form.arguments}": {{"n": 99}}}}'
    good = form.begin("add_fish") + '{"n": 12}' + form.end
    for one in {listed[0] + wrong + listed[1], wrong.replace('", "', '" , "')}:
        for opened in {form.open, "" if form.bare else form.open}:
            for before in ("", "Well. ", "\x1c", "\n", form.open, good, "x" + form.open[:-1]):
                for behind in {form.gap + form.close, ""}:
                    for ids in spellings(family, before + opened + one + behind, form.open):
                        calls = answers(ids)[1]
                        assert ("add_fish", {"n": 99}) not in calls, tokenizer(family).decode(ids)
    allowed, calls = answers(tokenizer(family).template_ids(good))
    marked = form.bare and not calls
    if marked:  # told apart by what opens a call, since such JSON may be the answer
        allowed, calls = answers(tokenizer(family).template_ids(form.open + good))
    assert (allowed, calls) == (True, [("add_fish", {"n": 12})])
    assert marked == (form.bare and fields not in (FORMATS["free"], FORMATS["one at a time"], FORMATS["schema"]))


@pytest.mark.parametrize(
    "family",
    [name if name in ("llama3", "qwen3") else pytest.param(name, marks=pytest.mark.drill) for name in FAMILIES],
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_allowed_has_only_calls_that_are_right(family: str, data: st.DataObject) -> None:
    form = offer(family).format
    wrong = f'{{"name": "add_fish", "{form.arguments}": {{"n": 99}}}}'
    right = [form.begin(name) + arguments + form.end for name, arguments in (("add_fish", '{"n": 34}'), ("look", "{}"))]
    quoted = form.begin("look") + json.dumps({"t": [wrong, form.open + wrong + form.close]}) + form.end
    some = st.sampled_from(["Well", " ", "\n", "\x1c", "{", "[", "]", form.open, form.close, wrong, *right, quoted])
    pieces = data.draw(st.lists(st.tuples(some, st.booleans()), max_size=6))
    ids = [
        token
        for text, plain in pieces
        for token in (letters(family, text) if plain else tokenizer(family).template_ids(text))
    ]
    for name, arguments in reads(family, asked(family, {}))(ids)[1]:
        assert name == "look" or arguments in ({"n": 12}, {"n": 34})


# ---- one at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [TOOLS, STRICT], ids=["free", "strict"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_at_a_time_ends_with_what_closes_it_and_not_in_its_arguments(family: str, tools: Any) -> None:
    its, form = tokenizer(family), offer(family).format
    body = {"model": "fish", "messages": [ASK], "tools": tools, "parallel_tool_calls": False}
    call = chat_call(ChatRequest.model_validate(body), served(family), Limits())
    sampling, values = call.requests[0].sampling, {"t": f'a\\" {form.close} b', "u": ["}" + form.gap + form.close]}
    said = form.begin("look") + json.dumps(values) + form.end
    for text, opening in ((said, ""), (said + said, ""), ("Well. " + said + " Done. " + said, "Well.")):
        for ids in (its.template_ids(text), letters(family, text)):
            stream, parts = TextStream(its, sampling.stop, sampling.include_stop, sampling.frame), list[str]()
            for token in ids:
                part, stopped = stream.push(token)
                parts.append(part)
                if stopped:
                    break
            content, calls = read(call.reader(), [*parts, stream.finish()])
            if form.bare and opening:  # JSON behind text is text
                continue
            assert calls == [("look", values)]
            if form.close:
                assert stopped and content == opening
