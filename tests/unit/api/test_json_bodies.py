"""JSON bodies: every route reads them by one parser, which refuses with a 400 that names the place."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.api import json_text
from shoal.api.app import build_app
from shoal.api.batches import lines
from shoal.api.bodies import ChatRequest, EmbeddingRequest
from shoal.api.capture import CaptureArgs
from shoal.api.json_text import dumps, loads, pieces, value_of
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.wire import parse
from shoal.errors import RequestError

HEADERS = {"content-type": "application/json"}
NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 5000, "9" * 400 + ".5"]
ODD = [*NUMBERS, '"\\ud800"', '"\\udc00\\ud800"', "[" * 300 + "]" * 300]
SCHEMA = {"type": "object", "properties": {"n": {"type": "number", "maximum": "HERE"}}}
CHAT = {"model": "fish", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PLACES = {
    "/v1/chat/completions": [
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]},
            "tools[0].function.parameters.properties.n.maximum",
        ),
        (
            {
                **CHAT,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            },
            "response_format.json_schema.schema.properties.n.maximum",
        ),
        ({**CHAT, "structured_outputs": {"json": SCHEMA}}, "structured_outputs.json.properties.n.maximum"),
        ({**CHAT, "chat_template_kwargs": {"a": ["HERE"]}}, "chat_template_kwargs.a[0]"),
    ],
    "/v1/responses": [
        (
            {"model": "fish", "input": "hi", "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}]},
            "tools[0].parameters.properties.n.maximum",
        ),
    ],
    "/v1/messages": [
        (
            {**CHAT, "tools": [{"name": "f", "input_schema": SCHEMA}]},
            "tools[0].input_schema.properties.n.maximum",
        ),
    ],
}


def app(model: ServedModel, engine: Any, folder: Path) -> Any:
    """With every route that takes a body."""
    return build_app(
        [Hosted(model, engine)],
        batches=folder / "batches",
        capture=CaptureArgs(str(folder / "capture"), texts=True),
        tools="http://127.0.0.1:9",
    )


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=HEADERS)


def with_(body: Any, odd: str) -> bytes:
    return json.dumps(body).replace('"HERE"', odd).encode()


@pytest.mark.anyio
async def test_every_route_names_the_place_of_what_is_no_json(served: ServedModel, engine: Any, tmp_path: Path) -> None:
    whole = app(served, engine, tmp_path)
    posted = [path for path, way in whole.openapi()["paths"].items() if "post" in way]
    asked = 0
    async with client(whole) as http:
        for path in posted:
            for odd in ODD:
                reply = await http.post(
                    path.replace("{", "").replace("}", ""), content=with_({"x": [0, {"y": "HERE"}]}, odd)
                )
                if reply.status_code in (404, 415, 503):  # takes no body of JSON, or there is nothing of that name
                    continue
                asked += 1
                error = reply.json()["error"]
                assert reply.status_code == 400, (path, odd[:20])
                told = json.dumps(error)
                assert "x[1].y" in told, (path, odd[:20], told)
    assert asked >= len(ODD) * 12


@pytest.mark.anyio
@pytest.mark.parametrize("odd", ODD, ids=[odd[:12] + str(len(odd)) for odd in ODD])
async def test_a_schema_with_what_is_no_json_is_refused_at_its_place(http: httpx.AsyncClient, odd: str) -> None:
    for path, places in PLACES.items():
        for body, place in places:
            reply = await http.post(path, content=with_(body, odd), headers=HEADERS)
            assert reply.status_code == 400, (path, place)
            assert place in reply.json()["error"]["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "odd", ["1e308", "9" * 300, "-1e-999", str(2**64 + 1), "[" * 180 + "]" * 180, '"\\ud83d\\ude00"']
)
async def test_what_is_json_never_ends_in_a_500(http: httpx.AsyncClient, odd: str) -> None:
    """Where a client may say anything it may say that; what a grammar cannot follow is a 400."""
    for path, places in PLACES.items():
        for body, place in places:
            for stream in (False, True):
                reply = await http.post(path, content=with_({**body, "stream": stream}, odd), headers=HEADERS)
                assert reply.status_code in (200, 400), (path, place, reply.text)


def test_a_bad_line_of_a_batch_is_refused_alone() -> None:
    body = {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    for odd in ODD:
        with pytest.raises(lines.LineError, match=r"body\.tools\[0\]\.function\.parameters\.properties\.n\.maximum"):
            lines.parse(1, with_(line, odd), None)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'{"a":{"b":[1,1e999]}}', "a.b[1]"),
        (b'{"a":[0,{"b":"]}","c":NaN}]}', "a[1].c"),
        (b'{"a":\n\n [[], {}, "\\"",\n1e400]}', "a[3]"),
        (b'\xef\xbb\xbf{"a":[[],{},NaN]}', "a[2]"),
        (b'{"a": ["x", "\xff"]}', "a[1]"),
        (b'{"a": tru}', "a"),
        (b'{"a": {"b": "x', "a.b"),
        (b'{"a":1}}', None),
        (b"", None),
        (b",,,,[", None),
    ],
)
def test_the_place_of_a_fault_in_json(text: bytes, place: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        loads(text)
    assert refused.value.param == place


def test_many_faults_cost_no_more_than_one() -> None:
    """Pydantic lists all of them: of a million in 4 MB that took five seconds, in which no other thread ran."""
    with pytest.raises(RequestError, match="input"):
        parse(EmbeddingRequest, b'{"model": "x", "input": [1' + b',"a"' * 10_000 + b"]}")
    many = b",".join(b'"%d": "x"' % number for number in range(10_000))
    with pytest.raises(RequestError, match="10000 wrong ones"):
        parse(
            ChatRequest, b'{"model": "x", "messages": [{"role": "user", "content": ""}], "logit_bias": {' + many + b"}}"
        )


def test_brackets_are_counted_before_each_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MOST_BRACKETS", 10)
    with pytest.raises(RequestError, match="11 brackets"):
        loads(b"[" + b"[],{}," * 5 + b"1]")


def test_pieces_are_the_same_json_as_the_whole() -> None:
    def made() -> dict[str, Any]:
        return {
            "a": 1,
            "many": list(range(5000)),
            "lazy": iter([{"x": [1, "é"]}, *range(40), None]),
            "raw": iter([b'{"raw":true}', b"7"]),
            "told": b'{"a": "b"}',
            "none": iter([]),
            "empty": {},
            "lists": [[], [1], {"b": iter([2, 3])}, "t"],
            "big": 10**30,
        }

    told = b"".join(pieces(made()))
    assert json.loads(told) == {
        **made(),
        "lazy": [{"x": [1, "é"]}, *range(40), None],
        "raw": [{"raw": True}, 7],
        "told": {"a": "b"},
        "none": [],
        "lists": [[], [1], {"b": [2, 3]}, "t"],
    }
    assert value_of(made()) == json.loads(told)
    assert dumps({"a": iter([1, iter("b")])}) == b'{"a":[1,["b"]]}'
    with pytest.raises(ValueError):
        b"".join(pieces({"a": iter([float("nan")])}))


def test_a_name_of_megabytes_is_not_compared_with_every_field() -> None:
    began = time.thread_time()
    with pytest.raises(RequestError, match="unknown field"):
        parse(ChatRequest, b'{"' + b"temperatur" * 200_000 + b'": 1}')
    assert time.thread_time() - began < 0.2
