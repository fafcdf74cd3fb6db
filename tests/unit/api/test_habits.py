"""What clients send out of habit: hints, other spellings, other methods. Each is taken, and none is ignored in silence."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from shoal.api.auth import ApiKeys
from shoal.api.page import chat_page
from tests.unit.api.test_chat import BODY, URL, events, png

pytestmark = pytest.mark.anyio
Connect = Callable[..., httpx.AsyncClient]

HINTS = {
    "store": True,
    "metadata": {"run": "7"},
    "service_tier": "priority",
    "verbosity": "low",
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "safety_identifier": "u7",
}


def image(url: str, **fields: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **fields}}]}]


class TestHints:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_each_is_taken_and_named_in_a_header(self, http: httpx.AsyncClient, stream: bool) -> None:
        plain = await http.post(URL, json={**BODY, "stream": stream})
        assert plain.status_code == 200 and "x-shoal-unused" not in plain.headers
        for name, value in HINTS.items():
            reply = await http.post(URL, json={**BODY, name: value, "stream": stream})
            assert (reply.status_code, reply.headers["x-shoal-unused"]) == (200, name)
        reply = await http.post(URL, json={**BODY, **HINTS, "stream": stream})
        assert set(reply.headers["x-shoal-unused"].split(", ")) == set(HINTS)

    async def test_inside_of_parts_they_are_named_by_their_path_and_once(self, http: httpx.AsyncClient) -> None:
        messages = [
            *image(png(), detail="high"),
            {"role": "user", "content": "hi", "name": "ann"},
            {"role": "assistant", "content": "hm", "name": "bob"},
            {"role": "user", "content": [{"type": "text", "text": "so?", "cache_control": {"type": "ephemeral"}}]},
        ]
        options = {"include_obfuscation": True}
        reply = await http.post(URL, json={**BODY, "messages": messages, "stream": True, "stream_options": options})
        told = "messages[].content[].cache_control, messages[].content[].image_url.detail, messages[].name, "
        told += "stream_options.include_obfuscation"
        assert reply.status_code == 200
        assert set(reply.headers["x-shoal-unused"].split(", ")) == set(told.split(", "))

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"store": "yes"}, "store"),
            ({"metadata": {"a": 1}}, "metadata.a"),
            ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
            ({"verbosity": "loud"}, "verbosity"),
            ({"messages": image("data:", detail="extreme")}, "messages[0].content[0].image_url.detail"),
            ({"messages": [{"role": "user", "content": "hi", "name": 7}]}, "messages[0].name"),
        ],
    )
    async def test_a_hint_of_another_type_is_refused(
        self, http: httpx.AsyncClient, fields: dict[str, Any], param: str
    ) -> None:
        reply = await http.post(URL, json={**BODY, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


class TestUsageOfAStream:
    async def test_every_chunk_may_have_it_and_it_grows_to_that_of_the_whole(
        self, http: httpx.AsyncClient, engine: Any
    ) -> None:
        """As guidellm asks, which counts tokens by it."""
        engine.reply = "Hello, fish!"
        whole = (await http.post(URL, json=BODY)).json()["usage"]
        engine.at_once = 3  # several events in one message
        for include in (True, False):
            options = {"include_usage": include, "continuous_usage_stats": True}
            reply = await http.post(URL, json={**BODY, "stream": True, "stream_options": options})
            *chunks, done = events(reply.text)
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts[0] == 0 and counts == sorted(counts)
            assert set(range(whole["completion_tokens"] + 1)) <= set(counts)  # one token more with each
            assert all(chunk["usage"]["prompt_tokens"] == whole["prompt_tokens"] for chunk in chunks)
            assert all(chunk["usage"]["depth"] == whole["depth"] for chunk in chunks)
            assert (chunks[-1]["usage"], done) == (whole, "[DONE]")
            assert (chunks[-1]["choices"] == []) == include


class TestOtherSpellings:
    async def test_all_tokens_and_the_likeliest_one(self, http: httpx.AsyncClient, engine: Any) -> None:
        assert (await http.post(URL, json={**BODY, "top_k": -1, "top_p": 0})).status_code == 200
        sampling = engine.requests[0].sampling
        assert (sampling.top_k, sampling.top_p) == (0, 0)

    async def test_a_byte_order_mark_before_the_body(self, http: httpx.AsyncClient) -> None:
        body = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
        reply = await http.post(URL, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 200

    async def test_base64_with_line_feeds_is_the_same_image(self, http: httpx.AsyncClient, engine: Any) -> None:
        head, _, data = png(24, 24).partition(",")
        for lines in (data, base64.encodebytes(base64.b64decode(data)).decode(), data.replace("A", "A\r\n ")):
            assert (await http.post(URL, json={**BODY, "messages": image(f"{head},{lines}")})).status_code == 200
        assert len({request.prompt.images[0].sha256() for request in engine.requests}) == 1


class TestMethods:
    async def test_head_is_answered_where_get_is(self, connect: Connect) -> None:
        http = connect()
        paths = [path for path, found in (await http.get("/openapi.json")).json()["paths"].items() if "get" in found]
        assert "/v1/models" in paths
        for path in ["/openapi.json", *(path.replace("{name}", "fish") for path in paths)]:
            got, head = await http.get(path), await http.head(path)
            assert (head.status_code, head.content) == (got.status_code, b"")
            assert head.headers["content-type"] == got.headers["content-type"]
        assert (await http.head("/v1/completions")).status_code == 405
        assert (await http.head("/v1/models/shark")).status_code == 404

    async def test_its_key_is_asked_for_too(self, connect: Connect) -> None:
        http = connect(api_keys=ApiKeys(["sk-1"]))
        assert (await http.head("/v1/models")).status_code == 401
        assert (await http.head("/v1/models", headers={"Authorization": "Bearer sk-1"})).status_code == 200

    async def test_the_root_leads_to_the_pages_where_there_are_some(self, connect: Connect) -> None:
        def mount(app: FastAPI, *, base_url: str, model: str | None) -> FastAPI:
            return app

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pages_of_a_test", SimpleNamespace(mount=mount))  # type: ignore[arg-type]
            http = connect(api_keys=ApiKeys(["sk-1"]), ui_mount=chat_page("http://x/v1", mount="pages_of_a_test:mount"))
            for method in ("GET", "HEAD"):
                reply = await http.request(method, "/")
                assert (reply.status_code, reply.headers["location"]) == (307, "ui/")
            assert (await connect(api_keys=ApiKeys(["sk-1"])).get("/")).status_code == 404
