"""Several calls of one message: shown each with its own result, and each learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.api.bodies import ChatRequest
from shoal.api.limits import Limits
from shoal.api.requests import chat_call
from shoal.data.chats.forms import canonical
from shoal.data.chats.heldout import questions
from shoal.data.chats.rows import read_chats
from shoal.inputs.chat import Encoded
from tests.unit.open_weights.taught import TOOLS, served, tokenizer
from tests.unit.open_weights.test_call_formats import ASK, FAMILIES, rendered, whole_text


def call(name: str, its: str, arguments: str | None) -> dict[str, Any]:
    return {"id": its, "type": "function", "function": {"name": name, "arguments": arguments}}


def gave(its: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": its, "content": text}


def said(text: str | None, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": [*calls]} if calls else {}), **more}


def turns(text: str) -> list[tuple[str, str]]:
    """Role and content of each turn that Llama 3's template has written."""
    parts = [part.split("<|end_header_id|>\n\n") for part in text.split("<|start_header_id|>")[1:]]
    return [(role, content.removesuffix("<|eot_id|>")) for role, content in parts]


@pytest.mark.parametrize("ids", [("a", "b"), ("a", "a"), ("", "")])
def test_each_result_is_shown_once_behind_its_call(ids: tuple[str, str]) -> None:
    first, second = ids
    chat = [ASK, said(None, call("look", first, "{}"), call("add_fish", second, '{"n": 1}')),
            gave(first, "one"), gave(second, "two"), gave(second, "more")]  # fmt: skip
    for messages in (chat, canonical({"messages": chat}, native=True)["messages"]):
        assert turns(whole_text("llama3", rendered("llama3", messages, TOOLS)))[2:] == [
            ("assistant", '{"name": "look", "parameters": {}}'),
            ("ipython", '"one"'),
            ("assistant", '{"name": "add_fish", "parameters": {"n": 1}}'),
            ("ipython", '"two"'),
            ("ipython", '"more"'),
            ("assistant", ""),
        ]
    plain = canonical({"messages": chat})["messages"]  # of a template that knows no tools
    assert [json.loads(one["content"].split(">", 1)[1].rsplit("<", 1)[0])["name"] for one in plain[2:]] == [
        "look",
        "add_fish",
        "add_fish",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_with_one_id_are_a_chat_in_every_format(family: str) -> None:
    chat = [
        ASK,
        said(None, call("look", "a", "{}"), call("add_fish", "a", "{}")),
        gave("a", "gave-1"),
        gave("a", "gave-2"),
    ]
    body = {"model": "fish", "messages": chat, "tools": TOOLS}
    prompt = chat_call(ChatRequest.model_validate(body), served(family), Limits()).requests[0].prompt
    assert isinstance(prompt, Encoded)
    text = tokenizer(family).decode(prompt.ids)
    assert text.count("gave-1") == text.count("gave-2") == 1 and text.index("gave-1") < text.index("gave-2")


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "chat",
    [
        [ASK, said("Two."), SYSTEM], [ASK, said("Two."), ASK], [ASK, said("Two."), {**SYSTEM, "role": "developer"}],
        [ASK, said("", call("look", "abcdefghi", "{}")), gave("abcdefghi", "two")],
        [{**ASK, "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
         {**said(None), "content": [{"type": "text", "text": "Two."}]},
         {**SYSTEM, "content": [{"type": "text", "text": "Be brief."}]}],
    ],
)  # fmt: skip
def test_a_chat_is_learned_up_to_its_last_answer_whatever_comes_behind_it(
    family: str, chat: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = learned(family, rows(tmp_path / "rows.jsonl", chat))
    assert ("Two." if "tool_calls" not in chat[1] else '"look"') in text
    its = served(family)
    ((question,),) = questions(tmp_path / "rows.jsonl", its.tokenizer, its.config, its.chat_template).values()
    assert question.reference and "Be brief." not in its.tokenizer.decode(question.row.ids)


@pytest.mark.parametrize("nothing", ["", " ", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_arguments_are_an_object_of_none(family: str, nothing: str | None) -> None:
    """Some clients say nothing where a function takes nothing."""
    form = tokenizer(family).calls
    assert form is not None
    chat = [ASK, said("", call("look", "abcdefghi", nothing)), gave("abcdefghi", "x")]
    text = whole_text(family, rendered(family, canonical({"messages": chat}, native=True)["messages"], TOOLS))
    assert f'"name": "look", "{form.arguments}": {{}}' in text
    assert '"arguments": {}}' in str(canonical({"messages": chat})["messages"][1]["content"])


def rows(path: Path, *chats: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"messages": chat, "tools": TOOLS}) + "\n" for chat in chats))
    return path


# Qwen3's template leaves thoughts out of all answers but the last, which are then none (`inputs.chat`).
SHOWN_ALIKE = [family for family in FAMILIES if family != "qwen3"]


def learned(family: str, path: Path) -> str:
    its = served(family)
    ids, answer, _ = read_chats(path, its.tokenizer, its.config, template=its.chat_template, limit=4000).row(0)
    return its.tokenizer.decode([int(token) for token, marked in zip(ids, answer, strict=True) if marked])


@pytest.mark.parametrize("weight", [1, 0])
@pytest.mark.parametrize("family", SHOWN_ALIKE)
def test_all_calls_of_a_message_are_learned_and_no_result(family: str, weight: int, tmp_path: Path) -> None:
    calls = [call("look", "abcdefghi", '{"t": 1}'), call("add_fish", "bcdefghij", '{"n": 2}')]
    chat = [
        ASK,
        said("", *calls, weight=weight),
        gave("abcdefghi", "gave-1"),
        gave("bcdefghij", "gave-2"),
        said("Three."),
    ]
    text = learned(family, rows(tmp_path / "rows.jsonl", chat))
    assert text.endswith("Three.") and "gave" not in text and "How many" not in text
    assert ('{"t": 1}' in text, '{"n": 2}' in text) == (bool(weight),) * 2
    if weight:
        text = learned(family, rows(tmp_path / "rows.jsonl", chat[:2]))
        assert '{"t": 1}' in text and '{"n": 2}' in text
