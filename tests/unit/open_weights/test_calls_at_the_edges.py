"""Calls that are long, deep, or spell what frames them: read wherever that is sure, and what is not one stays text."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from recipes import measure
from recipes.customer_service import score, shop
from shoal.api import calls
from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits
from shoal.api.requests import chat_call
from shoal.data.chats.rows import read_chats
from shoal.errors import RequestError
from shoal.inputs.call_formats import FORMATS
from shoal.inputs.stand_ins import texts_in
from tests.unit.open_weights.taught import TOOLS, served
from tests.unit.open_weights.test_call_formats import FAMILIES, STRICT, allowed, offer, read

CLOSED = [family for family in FAMILIES if offer(family).format.close]


@pytest.mark.parametrize("family", CLOSED)
def test_what_closes_a_call_may_stand_in_its_arguments(family: str) -> None:
    """As the grammar of a strict tool has it."""
    one = offer(family, tools=STRICT)
    form = one.format
    values = {"t": f'a\\" {form.close} b {form.close}', "u": [form.close]}
    text = form.begin("look") + json.dumps(values) + form.end
    assert allowed(family, one.guide, text)[0]
    for parts in ([text], list(text)):
        assert read(one.reader(), [*parts, " Done."]) == (" Done.", [("look", values)])
        assert read(one.reader(), [*parts, *parts])[1] == [("look", values)] * 2
    cut = text.removesuffix(form.close)
    assert read(one.reader(), list(cut), whole=False) == ("", [("look", values)]), "all but what closes it"


@pytest.mark.parametrize("family", CLOSED)
def test_a_call_behind_one_whose_text_has_no_end_is_read(family: str) -> None:
    form = offer(family).format
    good = form.begin("look") + "{}" + form.end
    for broken in (f'{form.open}{{"name": "x{form.close}', f'{form.open}say "hi{form.close}'):
        for parts in ([broken + good], list(broken + good)):
            assert read(offer(family).reader(), parts) == (broken, [("look", {})])
        for parts in ([broken], list(broken)):
            assert read(offer(family).reader(), [*parts, " x"]) == (broken + " x", [])


def test_text_that_only_names_what_closes_a_call_is_not_held() -> None:
    reader = offer("qwen2").reader()
    assert reader.push('<tool_call>say "hi</tool_call>') == [{"content": '<tool_call>say "hi</tool_call>'}]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_arguments_at_the_depth_that_python_just_reads_are_a_call_or_text(name: str) -> None:
    form = FORMATS[name]
    for depth in range(sys.getrecursionlimit() - 120, sys.getrecursionlimit() + 5):
        text = f'{{"name": "look", "{form.arguments}": {{"a": {"[" * depth}{"]" * depth}}}}}'
        found = form.read(text, ["look"])
        assert found is None or found[0][0][0] == "look"


def test_white_space_in_front_of_a_forced_call_takes_no_time_of_its_own() -> None:
    """What looks for the call's head must not try each way to share it out: that would not end."""
    for family in FAMILIES:
        one = offer(family, tool_choice="required")
        assert one.reader().push(" " * 20_000) == []


def test_a_long_call_beside_a_format_is_looked_at_until_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0
    known = calls.Bare._may_be_call

    def counted(self: calls.Bare, start: str) -> bool:
        nonlocal looked
        looked += 1
        return known(self, start)

    monkeypatch.setattr(calls.Bare, "_may_be_call", counted)
    values = {"n": "abc" * 900}
    text = offer("llama3").format.begin("add_fish") + json.dumps(values) + "}"
    assert read(offer("llama3").reader(formatted=True), list(text)) == ("", [("add_fish", values)])
    assert looked < 80


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_measures_a_model_with_the_tools_that_it_is_served_with(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own template, and what it calls so is a call to what scores the answers."""
    its, asked = served(family), list[Any]()
    form = its.tokenizer.calls
    assert form is not None
    name = shop.TOOLS[0]["function"]["name"]
    said = form.begin(name) + '{"order": "A1234"}' + form.end

    def generate(requests: list[Any]) -> list[Any]:
        asked.extend(requests)
        return [SimpleNamespace(text=said, tokens=[1], depth=1, logprobs=[]) for _ in requests]

    monkeypatch.setattr(measure, "Engine", lambda _: SimpleNamespace(generate=generate))
    recipe: Any = SimpleNamespace(guide=lambda _: None, most_tokens=40)
    model: Any = SimpleNamespace(tokenizer=its.tokenizer, config=its.config, chat_template=its.chat_template)
    messages = [{"role": "user", "content": "Where is it?"}]
    (answer,) = measure.ByEngine(model, "full", recipe, shop.TOOLS)([messages])
    shown = its.tokenizer.decode(asked[0].prompt.ids)
    assert "You can call functions" not in shown and name in shown
    assert score.read(answer) == score.Said("", ((name, {"order": "A1234"}),))


def test_our_words_of_an_answer_are_its_text_and_its_calls() -> None:
    form = FORMATS["mistral"]
    said = "Well.[TOOL_CALLS]" + '[{"name": "look", "arguments": {}}]'
    told = 'Well.<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    assert calls.rewritten(said, TOOLS, form) == told
    assert calls.rewritten("Well. {", TOOLS, form) == "Well. {"


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_rows_are_read_as_the_service_takes_them(family: str, tmp_path: Any) -> None:
    """A result in parts; and a text, whose other fields offer nothing."""
    its, path = served(family), tmp_path / "rows.jsonl"
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}

    def row(content: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        gave = {"role": "tool", "tool_call_id": "a", "content": content}
        return {"messages": [*turns, gave, {"role": "assistant", "content": "Two."}], "tools": TOOLS}

    parts = [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    rows = [row("two"), row(parts), {"text": "Hello.", "tools": "hammer, saw"}, row(image), row(None)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    read_rows = read_chats(path, its.tokenizer, its.config, template=its.chat_template, limit=4000)
    assert len(read_rows) == 3 and read_rows.refused == {"a result that is no text": 2}
    assert read_rows.row(0)[0].tolist() == read_rows.row(1)[0].tolist()


def test_tools_at_the_depth_that_python_just_reads_are_refused_in_one_line() -> None:
    for depth in (500, sys.getrecursionlimit() - 15, 5000):
        deep: Any = []
        for _ in range(depth):
            deep = [deep]
        assert sorted(texts_in({"a": [deep, "b"]})) == ["a", "b"]
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "x": deep}}}
        body = {"model": "fish", "messages": [{"role": "user", "content": "Look."}], "tools": [tool]}
        with pytest.raises(RequestError, match=r"too deep|chat template stopped"):
            chat_call(ChatRequest.model_validate(body), served("qwen2"), Limits())
