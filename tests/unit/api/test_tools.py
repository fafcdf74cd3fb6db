"""Tools and formats: what the model is told, what guides it, and how its calls are read, whole and streamed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.bodies import ChatRequest
from shoal.api.calls import Reader
from shoal.api.limits import Limits
from shoal.api.requests import chat_call
from shoal.api.served import ServedModel
from shoal.api.tools import Offer
from shoal.api.wire import parse
from shoal.data.chats.forms import canonical
from shoal.engine.events import Guide
from shoal.engine.guided import GrammarError, Grammars
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.tokenizer import END_ID, Tokenizer
from tests.unit.api.test_chat import events

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools

URL = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "fish", "messages": [{"role": "user", "content": "hi"}]}


def tool(name: str = "log", strict: bool = False, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    function = {"name": name, "description": f"does {name}", "parameters": schema, "strict": strict}
    return {"type": "function", "function": function}


LOG, LOOK = tool("log", n={"type": "integer"}), tool("look", at={"enum": ["sea", "sky"]})
NAMED = {"type": "function", "function": {"name": "log"}}
CALL = '<tool_call>{"name": "log", "arguments": {"n": 7}}</tool_call>'


def offer(**fields: Any) -> Offer:
    return Offer(parse(ChatRequest, json.dumps({**BODY, **fields}).encode()))


async def ask(http: httpx.AsyncClient, **fields: Any) -> tuple[dict[str, Any], list[Any]]:
    """The choice of a whole answer, and the chunks of the streamed one; both must say the same."""
    reply = await http.post(URL, json={**BODY, **fields})
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    *chunks, done = events((await http.post(URL, json={**BODY, **fields, "stream": True})).text)
    text, calls = "", list[dict[str, Any]]()
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        text += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append(dict(piece["function"]))
            else:
                calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    assert done == "[DONE]" and chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text == (choice["message"]["content"] or "")
    assert calls == [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return choice, chunks


class TestReading:
    """The scripted engine writes one token a byte, so every cut of a call is met."""

    async def test_text_and_calls_of_a_free_answer(self, http: httpx.AsyncClient, engine: Any) -> None:
        second = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
        engine.reply = f"First é. {CALL}\n{second}"
        choice, _ = await ask(http, tools=[LOG, LOOK])
        assert (choice["message"]["content"], choice["finish_reason"]) == ("First é.", "tool_calls")
        calls = choice["message"]["tool_calls"]
        functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
        assert functions == [("log", {"n": 7}), ("look", {"at": "sea"})]
        assert len({call["id"] for call in calls}) == 2 and {call["type"] for call in calls} == {"function"}

    @pytest.mark.parametrize(
        "reply",
        [
            "<tool_call>7</tool_call>",
            '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "log"}</tool_call>',
            '<tool_call>{"name": [], "arguments": {}}</tool_call>',
            '<tool_call>{"name": "log", "arguments": {"n": 7}}',
            "a < b <tool",
            "</tool_call> <tool_call>",
        ],
    )
    async def test_what_is_no_call_of_a_known_tool_stays_text(
        self, http: httpx.AsyncClient, engine: Any, reply: str
    ) -> None:
        engine.reply = reply
        choice, _ = await ask(http, tools=[LOG])
        if reply.endswith("}}"):  # whole but for its end mark, which a stop string may have taken
            assert choice["message"]["tool_calls"][0]["function"]["name"] == "log"
        else:
            assert (choice["message"]["content"], choice["finish_reason"]) == (reply, "stop")

    async def test_with_none_tools_are_not_told_and_nothing_is_a_call(
        self, http: httpx.AsyncClient, engine: Any
    ) -> None:
        engine.reply = CALL
        choice, _ = await ask(http, tools=[LOG], tool_choice="none")
        assert choice["message"]["content"] == CALL
        plain = engine.requests[-1].prompt.ids
        await http.post(URL, json=BODY)
        assert engine.requests[-1].prompt.ids == plain

    @pytest.mark.parametrize("spaces", ["", " ", "\n\t "])
    async def test_required_is_one_call_whose_arguments_are_streamed(
        self, http: httpx.AsyncClient, engine: Any, spaces: str
    ) -> None:
        arguments = '{"n": 7, "x": {"y": "}}"}}'
        engine.reply = (
            f'{spaces}{{{spaces}"name"{spaces}:{spaces}"log",{spaces}"arguments": {arguments}{spaces}}}{spaces}'
        )
        choice, chunks = await ask(http, tools=[LOG, LOOK], tool_choice="required")
        (call,) = choice["message"]["tool_calls"]
        assert (call["function"]["name"], call["function"]["arguments"].rstrip()) == ("log", arguments)
        assert choice["finish_reason"] == "tool_calls"
        assert sum("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks) > 10

    async def test_a_named_tool_s_answer_is_its_arguments(self, http: httpx.AsyncClient, engine: Any) -> None:
        engine.reply = '{"n": 7}'
        choice, _ = await ask(http, tools=[LOG, LOOK], tool_choice=NAMED)
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "log", "arguments": '{"n": 7}'}

    @pytest.mark.parametrize("choice", ["required", NAMED])
    async def test_a_call_cut_off_by_its_length_keeps_all_that_was_written(
        self, http: httpx.AsyncClient, engine: Any, choice: Any
    ) -> None:
        written = '{"n": {"m": 1}}'
        engine.reply = written if choice == NAMED else f'{{"name": "log", "arguments": {written}'
        cut = len(engine.reply) - 1
        answer, _ = await ask(http, tools=[LOG], tool_choice=choice, max_tokens=cut)
        assert answer["finish_reason"] == "length"
        assert answer["message"]["tool_calls"][0]["function"]["arguments"] == written[:-1]

    async def test_one_call_at_a_time_where_that_is_asked_for(self, http: httpx.AsyncClient, engine: Any) -> None:
        # what the engine leaves of it, and all that one writes which does not end there
        for engine.reply in (CALL, CALL + "\n" + CALL):
            choice, _ = await ask(http, tools=[LOG], parallel_tool_calls=False)
            assert engine.requests[-1].sampling.frame == ("<tool_call>", "</tool_call>")
            (call,) = choice["message"]["tool_calls"]
            assert (call["function"]["arguments"], choice["message"]["content"]) == ('{"n": 7}', None)

    @given(
        st.lists(
            st.sampled_from(["<tool_call>", "</tool_call>", CALL, "<tool", "a", " ", "\n", '{"name": "log"', "}"])
        ),
        st.data(),
    )
    def test_wherever_the_text_is_cut_the_deltas_say_the_same(self, pieces: list[str], data: st.DataObject) -> None:
        text = "".join(pieces)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert said(offer(tools=[LOG]).reader(), parts) == said(offer(tools=[LOG]).reader(), [text])

    @given(st.text(max_size=20))
    def test_nothing_that_is_written_is_lost_outside_calls(self, text: str) -> None:
        content, calls = said(offer(tools=[LOG]).reader(), [text, CALL])
        assert calls == [("log", '{"n": 7}')] or "<tool_call>" in text
        assert content == text.rstrip() or "<tool_call>" in text


def said(reader: Reader, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", list[tuple[str, str]]()
    for delta in [delta for part in parts for delta in reader.push(part)] + reader.finish(whole=True):
        content += delta.get("content", "")
        calls += [(c["function"]["name"], c["function"]["arguments"]) for c in delta.get("tool_calls", ())]
    return content, calls


class TestTelling:
    async def test_the_model_reads_the_tools_after_the_system_text(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        messages = [{"role": "system", "content": "Be brief."}, *BODY["messages"]]
        await http.post(URL, json={**BODY, "messages": messages, "tools": [LOG]})
        await http.post(URL, json={**BODY, "tools": [LOG]})
        with_system, without = [served.tokenizer.decode(request.prompt.ids) for request in engine.requests]
        shown = json.dumps({key: LOG["function"][key] for key in ("name", "description", "parameters")})
        assert with_system.startswith("Be brief.\n\nYou can call functions.") and shown in with_system
        assert without.startswith("You can call functions.") and shown in without

    async def test_calls_and_their_results_go_back_as_the_model_writes_and_reads_them(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "log", "arguments": '{"n": 7}'}}
        history = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noted"},
        ]
        reply = await http.post(URL, json={**BODY, "messages": [*BODY["messages"], *history]})
        assert reply.status_code == 200
        text = served.tokenizer.decode(engine.requests[0].prompt.ids)
        assert text == f'hi{CALL}<tool_response>{{"name": "log", "content": "noted"}}</tool_response>'

    async def test_a_format_s_description_is_told(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        schema = {"name": "catch", "description": "what was caught", "schema": {"type": "object"}}
        await http.post(URL, json={**BODY, "response_format": {"type": "json_schema", "json_schema": schema}})
        text = served.tokenizer.decode(engine.requests[0].prompt.ids)
        assert text.startswith("The answer is JSON, catch: what was caught")


class TestGuiding:
    async def test_formats_guide_the_engine(self, http: httpx.AsyncClient, engine: Any) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
        formats: list[tuple[dict[str, Any], Guide | None]] = [
            ({"type": "text"}, None),
            ({"type": "json_object"}, Guide("json_object")),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
                Guide("json_schema", json.dumps(schema)),
            ),
        ]
        for given_, guide in formats:
            assert (await http.post(URL, json={**BODY, "response_format": given_})).status_code == 200
            assert engine.requests[-1].sampling.guided == guide

    def test_required_allows_exactly_the_calls_of_the_tools(self) -> None:
        defs = tool("dig", at={"$ref": "#/$defs/place"})
        defs["function"]["parameters"]["$defs"] = {"place": {"enum": ["here"]}}
        guide = offer(tools=[LOG, LOOK, defs], tool_choice="required").guide
        assert guide is not None and isinstance(guide.spec, str)
        schema = json.loads(guide.spec)
        for good in ({"name": "log", "arguments": {"n": 1}}, {"name": "dig", "arguments": {"at": "here"}}):
            jsonschema.validate(good, schema)
        for bad in ({"name": "log", "arguments": {"at": "sea"}}, {"name": "log"}, {"name": "x", "arguments": {}}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(bad, schema)
        named = offer(tools=[LOG, LOOK], tool_choice=NAMED).guide
        assert named == Guide("json_schema", json.dumps(LOG["function"]["parameters"]))


SCHEMA = {
    "type": "object",
    "properties": {"fish": {"type": "string"}},
    "required": ["fish"],
    "additionalProperties": False,
}
SHAPED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


class TestToolsBesideAFormat:
    """An answer is calls, or JSON of the format, and nothing else."""

    async def test_the_guide_allows_calls_or_the_answer(self, http: httpx.AsyncClient, engine: Any) -> None:
        strict = tool("log", strict=True, n={"type": "integer"})
        for fields, many in (({}, True), ({"parallel_tool_calls": False}, False)):
            body = {**BODY, "tools": [strict, LOOK], "response_format": SHAPED, **fields}
            reply = await http.post(URL, json=body)
            assert reply.status_code == 200, reply.text
            guide = engine.requests[-1].sampling.guided
            assert engine.requests[-1].sampling.stop == ()
            assert follows(guide, '{"fish": "<tool_call>"}') and follows(guide, CALL)
            assert follows(guide, CALL + "\n" + CALL) == many
            assert follows(guide, CALL.replace('"log"', '"look"'))  # not strict: any object
            for bad in (
                '{"fish": 7}',
                "so",
                CALL.replace("7", '"x"'),
                CALL.replace("log", "dig"),
                '{"fish": "a"}' + CALL,
            ):
                assert not follows(guide, bad)
        await http.post(URL, json={**BODY, "tools": [LOG], "response_format": {"type": "json_object"}})
        assert follows(engine.requests[-1].sampling.guided, '{"any": [1]}')

    @pytest.mark.parametrize("stream", [False, True])
    async def test_both_kinds_of_answer_are_read(self, http: httpx.AsyncClient, engine: Any, stream: bool) -> None:
        answer = f'{{"fish": {json.dumps(CALL)}}}'  # a call in a text is text
        for engine.reply, calls in ((CALL, 1), (CALL + CALL, 2), (answer, 0)):
            body = {**BODY, "tools": [LOG], "response_format": SHAPED, "stream": stream}
            reply = await http.post(URL, json=body)
            if stream:
                choices = [chunk["choices"][0] for chunk in events(reply.text)[:-1]]
                deltas = [choice["delta"] for choice in choices]
                found = [call for delta in deltas for call in delta.get("tool_calls", ())]
                content = "".join(delta.get("content", "") for delta in deltas) or None
                reason = choices[-1]["finish_reason"]
            else:
                (choice,) = reply.json()["choices"]
                found, content = choice["message"].get("tool_calls", []), choice["message"]["content"]
                reason = choice["finish_reason"]
            assert (len(found), content) == (calls, None if calls else answer)
            assert reason == ("tool_calls" if calls else "stop")
            assert all(json.loads(call["function"]["arguments"]) == {"n": 7} for call in found)


def follows(guide: Guide, text: str) -> bool:
    """Is `text` a whole answer that `guide` allows?"""
    tokenizer = Tokenizer.bytes_only()
    try:
        return bool(Grammars(tokenizer, 300).compile(guide).allowed(tokenizer.encode(text))[END_ID])
    except GrammarError:
        return False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [LOG, LOG]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
        ({"tools": [LOG] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [LOG], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (
            {"tools": [LOG], "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"tools": [LOG], "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [tool(strict=True)], "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages"),
    ],
)
async def test_what_contradicts_itself_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str
) -> None:
    reply = await http.post(URL, json={**BODY, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert engine.requests == []


def test_a_row_to_learn_from_is_what_the_service_shows(served: ServedModel) -> None:
    """Tools, calls and results of a row are the ids that a request with them is, up to the answer, which is learned."""
    add = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    bare = {"type": "function", "function": {"name": "stop"}}
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"n": 3}'}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "So. ", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "5"},
    ]
    body = {"model": "fish", "messages": messages, "tools": [add, bare]}
    wide = dataclasses.replace(served, config=dataclasses.replace(served.config, max_length=4096))
    prompt = chat_call(ChatRequest.model_validate(body), wide, Limits()).requests[0].prompt
    assert isinstance(prompt, Encoded)
    row = canonical({"messages": [*messages, {"role": "assistant", "content": "Five."}], "tools": [add, bare]})
    learned = encode_chat(row["messages"], served.tokenizer, served.config, add_generation_prompt=False)
    assert learned.ids[: len(prompt.ids)] == prompt.ids and "Five." in served.tokenizer.decode(learned.ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("odd", ['"\\ud83d!"', "1e999", "NaN"])
async def test_a_call_with_what_json_or_utf_8_cannot_hold_is_an_answer_in_each_protocol(
    http: httpx.AsyncClient, engine: Any, odd: str, stream: bool
) -> None:
    """Half of a surrogate pair, as an escape, is JSON, and a call that can be sent back; NaN is none, and so the text it is."""
    engine.reply = CALL.replace("7", odd)
    plain = {"type": "function", **LOG["function"]}
    claude = {"name": "log", "input_schema": LOG["function"]["parameters"]}
    for url, body in (
        (URL, {**BODY, "tools": [LOG]}),
        ("/v1/responses", {"model": "fish", "input": "hi", "tools": [plain]}),
        ("/v1/messages", {**BODY, "tools": [claude], "max_tokens": 100}),
    ):
        reply = await http.post(url, json={**body, "stream": stream})
        assert reply.status_code == 200 and "internal" not in reply.text, reply.text
        assert ("tool_call>" in reply.text) == ("ud83d" not in odd)
    if "ud83d" in odd and not stream:
        said = (await http.post(URL, json={**BODY, "tools": [LOG]})).json()["choices"][0]["message"]
        call = said["tool_calls"][0]
        assert json.loads(call["function"]["arguments"]) == {"n": "\ud83d!"} and call["function"]["arguments"].isascii()
        result = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
        assert await ask(http, messages=[*BODY["messages"], said, result], tools=[LOG])
