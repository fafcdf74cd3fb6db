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
from shoal.api.json_text import loads
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.wire import parse
from shoal.errors import RequestError

HEADERS = {"content-type": "application/json"}
NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 5000, "9" * 400 + ".5"]
ODD = [*NUMBERS, '"\\ud800"', '"\\udc00\\ud800"', "[" * 300 + "]" * 300]
SCHEMA = {"type": "object", "properties": {"n": {"type": "number", "maximum": "HERE"}}}
CHAT = {"model": "fish", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


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


def test_a_name_of_megabytes_is_not_compared_with_every_field() -> None:
    began = time.thread_time()
    with pytest.raises(RequestError, match="unknown field"):
        parse(ChatRequest, b'{"' + b"temperatur" * 200_000 + b'": 1}')
    assert time.thread_time() - began < 0.2
