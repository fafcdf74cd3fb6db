"""Rows of every known form as the chats that they are, and what is of no form named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config import ModelConfig
from shoal.data.chats import forms
from shoal.data.chats.forms import as_sent, canonical, pair
from shoal.data.chats.heldout import questions
from shoal.data.chats.rows import labels, read_chats, read_pairs
from shoal.data.chats.whole import read_whole
from shoal.errors import DataError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import END_ID, Tokenizer

TOKENIZER = Tokenizer.bytes_only()
ADD = {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}},
}
TOLD = (
    'You can call functions. To call one, write\n<tool_call>{"name": NAME, "arguments": {...}}</tool_call>\nwith arguments '
    "that follow its parameters, which are a JSON schema.\n<tools>\n" + json.dumps(ADD) + "\n</tools>"
)
CALLED = '<tool_call>{"name": "add", "arguments": {"n": 3}}</tool_call>'
GAVE = '<tool_response>{"name": "add", "content": "5"}</tool_response>'


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(role, text) of each message."""

    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    return [(message["role"], text(message["content"])) for message in canonical(row)["messages"]]


WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 3?"},
    {
        "role": "assistant",
        "content": "So. ",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"n": 3}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "5"},
    {"role": "assistant", "content": "Five."},
]


def test_tools_of_every_form_are_written_alike() -> None:
    told = [("system", TOLD), ("user", "2 + 3?")]
    rest = [("user", GAVE), ("assistant", "Five.")]
    openai = {"messages": WITH_TOOLS, "tools": [{"type": "function", "function": ADD}]}
    assert said(openai) == [*told, ("assistant", "So. " + CALLED), *rest]
    assert said({**openai, "tools": json.dumps([ADD])}) == said(openai)
    before = [{"role": "developer", "content": "Be short."}, *WITH_TOOLS]
    assert said({**openai, "messages": before})[0] == ("system", "Be short.\n\n" + TOLD)
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "2 + 3?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"n": 3}}'},
            {"from": "observation", "value": "5"},
            {"from": "gpt", "value": "Five."},
        ],
        "tools": json.dumps([ADD]),
    }
    assert said(sharegpt) == [*told, ("assistant", CALLED), *rest]
    assert said({**sharegpt, "system": "Be short."})[0] == ("system", "Be short.\n\n" + TOLD)


def test_functions_are_tools_as_they_were_called_before() -> None:
    """A row of them was learned as an empty answer, its call left out."""
    asked, call, gave, told = WITH_TOOLS
    before = [
        asked,
        {"role": "assistant", "content": "So. ", "function_call": call["tool_calls"][0]["function"]},
        {"role": "function", "name": "add", "content": gave["content"]},
        told,
    ]
    assert said({"messages": before, "functions": [ADD]}) == said({"messages": WITH_TOOLS, "tools": [ADD]})
    assert said({"messages": before[:2]})[-1] == ("assistant", "So. " + CALLED)


def test_one_row_of_odd_values_ends_no_run(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "odd.jsonl"
    call = WITH_TOOLS[1]["tool_calls"]
    odd: list[Any] = [{"messages": [{"role": "user", "content": value, "tool_calls": calls}, WITH_TOOLS[3]], "tools": [ADD]}
                      for value in (5, {"a": 1}, [[]], [5], "x", None) for calls in (5, 1.5, {"a": 1}, None, "x")]  # fmt: skip
    odd += [{"messages": [WITH_TOOLS[0], {"role": "assistant", "content": 5, "tool_calls": call}]}]
    odd += [{"prompt": "x", "system": value, "chosen": "a", "rejected": "b", "tools": [ADD]} for value in (5, {"a": 1})]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*odd, {"messages": side("5")}]))
    assert read_chats(path, TOKENIZER, config, limit=1000).refused
    good = {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*odd, good]))
    assert len(read_pairs(path, TOKENIZER, config, limit=1000)) == 2


def test_a_row_that_nobody_thought_of_is_refused_by_every_reader(
    tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: Any, **how: Any) -> Any:
        return canonical(row, **how) if row.get("text") != "odd" else row["gone"]

    monkeypatch.setattr(forms, "canonical", broken)
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "odd"}\n{"text": "fine"}\n')
    for read in (read_chats, read_whole):
        rows = read(path, TOKENIZER, config)
        assert (len(rows), rows.refused_at) == (1, {"a row that cannot be read, KeyError": 1})
    assert len(list(labels(path))) == 1


def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path: Path, config: ModelConfig) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "xx", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yy", "weight": 1},
    ]
    path = tmp_path / "weights.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns, "tools": [ADD]}) + "\n")
    rows = read_chats(path, TOKENIZER, config, limit=1000)
    for index in range(2):
        ids, answer, _ = rows.row(index)
        assert TOKENIZER.decode(ids[answer]) == "yy" and "xx" in TOKENIZER.decode(ids)


NULLS = dict.fromkeys(["weight", "tool_calls", "function_call", "tool_call_id", "name", "tools", "functions", "messages",
                       "text", "conversations", "instruction", "system", "history", "input", "task", "group", "augmented",
                       "image_url", "response_format"])  # fmt: skip


def filled(value: Any) -> Any:
    """With null for all that is not given, as tables of rows have it."""
    if isinstance(value, list):
        return [filled(one) for one in value]
    return {**NULLS, **{name: filled(one) for name, one in value.items()}} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"},
                      {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
                      {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"}, {"text": "a"},
    ],
)  # fmt: skip
def test_null_is_not_given(row: dict[str, Any], tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, filled(row))))
    for heldout in (False, True) if "text" not in row else (False,):
        rows = read_chats(path, TOKENIZER, config, limit=1000, heldout=heldout)
        assert not rows.refused and rows.row(0)[0].tolist() == rows.row(1)[0].tolist()


def test_instructions_are_chats() -> None:
    row = {"instruction": "Translate.", "input": "fish", "output": "poisson"}
    assert said(row) == [("user", "Translate.\nfish"), ("assistant", "poisson")]
    more = {**row, "input": "", "system": "Be short.", "history": [["Hi", "Yo"]]}
    expected = [("system", "Be short."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Translate.")]
    assert said(more) == [*expected, ("assistant", "poisson")]


def test_messages_without_tools_are_left_alone() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "task": "t"}
    assert canonical(row) == row


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b"}, "no known form: got 'keys prompt, completion'; allowed: messages"),
        ([1], "no known form: got 'list'"),
        ({"messages": "x"}, "no messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "tool_calls of an unknown form"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}, "a weight that is neither 0 nor 1"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "a result of no call"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "a"}]}]}, "tool_calls that are none"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, "tools that are no JSON"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools without a name"),
        ({"conversations": [{"from": "ghost", "value": "x"}]}, "conversations of an unknown form"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "a function_call that is no JSON"),
        ({"conversations": {}}, "conversations of an unknown form"),
        ({"instruction": "x"}, "an instruction without an output"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history of an unknown form"),
        ({"text": ""}, "no text"),
    ],
)
def test_what_is_not_as_its_form_wants_it_is_named(row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as told:
        canonical(row)
    assert "\n" not in told.value.message


def test_forms_may_be_mixed_and_a_text_is_learned_from_everywhere(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "mixed.jsonl"
    text = "abc" * 50  # 151 tokens with its end, of rows of 96
    given: list[Any] = [{"text": text}, {"instruction": "a", "output": "b"}, {"id": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    rows = read_chats(path, TOKENIZER, config)
    pieces = [rows.row(index) for index in range(len(rows))]
    assert [len(ids) for ids, _, _ in pieces] == [96, 55, 6]
    assert TOKENIZER.decode([*pieces[0][0], *pieces[1][0]]) == text and pieces[1][0][-1] == END_ID
    assert all(answer.all() for _, answer, _ in pieces[:2])
    assert np.flatnonzero(pieces[2][1]).tolist() == [4, 5]
    assert (rows.refused, rows.refused_at) == ({"no known form": 1}, {"no known form": 3})
    assert len(dict.fromkeys(group for _, group in labels(path))) == 2


def test_a_file_of_no_known_form_is_one_line_with_the_row(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('\n{"prompt": "a"}\n{"prompt": "b"}\n')
    says = r"holds no row to train on: got 'line 2: no known form'; allowed: messages; conversations; instruction and output"
    with pytest.raises(DataError, match=says):
        read_chats(path, TOKENIZER, config)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="line 1: got 'a text, which asks nothing'"):
        questions(path, TOKENIZER, config, DEFAULT_TEMPLATE)


ASKED = {"role": "user", "content": "2 + 3?"}


def side(text: str) -> list[dict[str, Any]]:
    return [ASKED, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 3?", "chosen": "5", "rejected": "6"},
        {"prompt": [ASKED], "chosen": side("5")[1:], "rejected": side("6")[1:]},
        {"prompt": None, "chosen": side("5"), "rejected": side("6")},
        {"prompt": "2 + 3?", "chosen": side("5"), "rejected": side("6")},  # the prompt stands in both sides as well
        {"prompt": [ASKED], "chosen": side("5"), "rejected": "6"},
        {"messages": [ASKED], "chosen": side("5")[1], "rejected": side("6")[1]},
        {"instruction": "2 + 3?", "input": "", "chosen": "5", "rejected": "6"},
        {
            "conversations": [{"from": "human", "value": "2 + 3?"}],
            "chosen": {"from": "gpt", "value": "5"},
            "rejected": {"from": "gpt", "value": "6"},
        },
    ],
)
def test_a_preference_pair_of_any_form_is_two_chats(row: dict[str, Any]) -> None:
    assert pair(row) == (side("5"), side("6"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASKED]}, "no preference pair: got 'keys messages'; allowed: chosen and rejected"),
        (
            {"chosen": side("5"), "rejected": [{"role": "user", "content": "?"}, *side("6")[1:]]},
            "does not ask the same",
        ),
        ({"chosen": "5", "rejected": "6"}, "does not ask the same"),
        ({"prompt": "x", "chosen": [ASKED], "rejected": [ASKED]}, "does not end with answers"),
        ({"prompt": "x", "chosen": "5", "rejected": 6}, "no messages"),
    ],
)
def test_what_is_no_pair_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        pair(row)


def test_pairs_are_two_rows_and_one_that_is_too_long_goes_with_its_other(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "pairs.jsonl"
    given = [
        {"prompt": "a", "chosen": "b" * 200, "rejected": "c"},
        {"prompt": "a", "chosen": "bb", "rejected": "c"},
        {"prompt": "a", "chosen": "", "rejected": "c"},
        {"prompt": "a", "chosen": "c", "rejected": "c"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    rows = read_pairs(path, TOKENIZER, config)
    assert [TOKENIZER.decode(rows.row(index)[0]) for index in range(len(rows))] == ["abb", "ac", "a", "ac"]
    assert rows.refused_at == {
        "longer than 96 tokens": 1,
        "the preferred and the rejected answer are the same": 4,
    }
    path.write_text('\n{"text": "a"}\n')
    with pytest.raises(DataError, match="holds no pair to learn from: got 'line 2: no preference pair'"):
        read_pairs(path, TOKENIZER, config)


STRICT = {
    "name": "track",
    "parameters": {"type": "object", "properties": {"order": {"type": "string"}}},
    "strict": True,
}


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "A1?"},
                {
                    "role": "assistant",
                    "content": "",
                    "function_call": {"name": "track", "arguments": '{"order": "A1"}'},
                },
                {"role": "function", "name": "track", "content": "sent"},
                {"role": "assistant", "content": "Sent."},
            ],
            "functions": [STRICT],
        },
        {
            "conversations": [
                {"from": "human", "value": "A1?"},
                {"from": "function_call", "value": '{"name": "track", "arguments": {"order": "A1"}}'},
                {"from": "observation", "value": "sent"},
                {"from": "gpt", "value": "Sent."},
            ],
            "tools": json.dumps([STRICT]),
        },
    ],
    ids=["OpenAI", "ShareGPT"],
)
def test_a_chat_as_sent_is_what_a_client_would_send_with_all_that_guides(row: dict[str, Any]) -> None:
    sent = as_sent(row)
    assert sent is not None and sent["tools"] == [{"type": "function", "function": STRICT}]
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool", "assistant"]
    (call,) = sent["messages"][1]["tool_calls"]
    assert call["id"] == sent["messages"][2]["tool_call_id"]
    assert call["function"] == {"name": "track", "arguments": '{"order": "A1"}'}


def test_a_format_is_sent_with_the_chat_that_has_it() -> None:
    format_ = {"type": "json_object"}
    sent = as_sent({"messages": [ASKED], "response_format": format_})
    assert sent == {"messages": [ASKED], "tools": [], "response_format": format_}


def test_a_chat_without_tools_is_sent_without() -> None:
    assert as_sent({"messages": [ASKED]}) is None and as_sent({"text": "a", "tools": []}) is None
