"""The prefix cache shows a client nothing of what another key has asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal import Engine, Model, Request
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys, parsed
from shoal.api.serve_args import ServeArgs
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.front import AsyncEngine
from shoal.vllm_plugin.options import cache_salt

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools

Connect = Callable[..., httpx.AsyncClient]

SECRET = "the sea is full of herring " * 4
CHAT = [{"role": "user", "content": SECRET}]
GENERATES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "n": 2},
    "/v1/completions": {"prompt": [SECRET, "fish"]},
    "/v1/responses": {"input": SECRET, "store": False},
    "/v1/messages": {"messages": CHAT, "max_tokens": 4},
}
KEYS = ["ann", "bob", "cat tenant=shop", "dan tenant=shop", "eve tenant=ann"]


async def salts(http: httpx.AsyncClient, engine: Any, path: str) -> dict[str, str]:
    """The salt that the requests of each key have."""
    found = {}
    for key in ("ann", "bob", "cat", "dan", "eve"):
        engine.requests.clear()
        body = {"model": "fish", **GENERATES[path]}
        (await http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})).raise_for_status()
        (found[key],) = {request.cache_salt for request in engine.requests}
    return found


@pytest.mark.parametrize("path", GENERATES)
async def test_each_tenant_has_a_salt_of_its_own(connect: Connect, engine: Any, served: ServedModel, path: str) -> None:
    found = await salts(connect(api_keys=ApiKeys(KEYS)), engine, path)
    assert found["cat"] == found["dan"] and all(found.values())
    assert len(set(found.values())) == 4, "a tenant called like a key is not that key's"
    shared = build_app([Hosted(replace(served, shared_prefix_cache=True), engine)], api_keys=ApiKeys(KEYS))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(shared), base_url="http://test") as http:
        assert set((await salts(http, engine, path)).values()) == {""}


async def test_these_are_all_routes_that_generate(connect: Connect) -> None:
    document = (await connect().get("/openapi.json")).json()
    found = set()
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if "stream" in document["components"]["schemas"].get(name, {}).get("properties", {}):
            found.add(path)
    assert found == set(GENERATES)


async def test_no_key_finds_the_prompt_of_another() -> None:
    model = Model.from_preset("small")
    engine = AsyncEngine(Engine(model, units=400))
    hosted = Hosted(ServedModel("fish", model.config, model.tokenizer), engine)
    app = build_app([hosted], api_keys=ApiKeys(KEYS))
    body = {"model": "fish", "prompt": SECRET * 3, "max_tokens": 1}

    async def cached(http: httpx.AsyncClient, key: str) -> int:
        answer = await http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        found: int = answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            found = [await cached(http, key) for key in ("ann", "ann", "bob", "cat", "dan")]
    finally:
        await engine.close()
    assert [bool(tokens) for tokens in found] == [False, True, False, False, True]


def test_vllm_has_a_salt_of_the_tenant_and_of_the_depth_where_requests_have_their_own() -> None:
    salts = {
        (salt, layers): cache_salt(Request([1], cache_salt=salt), layers)
        for salt in ("", "a")
        for layers in (None, 1, 4)
    }
    assert salts["", None] == "" and len(set(salts.values())) == len(salts)


def test_the_tenant_stays_where_keys_are_kept_as_digests() -> None:
    key = parsed("secret name=a tenant=shop at_once=2", 1, lambda: 0.0)
    assert parsed(key.line, 1, lambda: 0.0) == replace(key, places=parsed(key.line, 1, lambda: 0.0).places)


def test_an_operator_may_have_it_shared(tmp_path: Path) -> None:
    Model.from_preset("test").save(tmp_path / "model")
    given = {"model": str(tmp_path / "model")}
    assert not ServeArgs(**given).served(given["model"]).shared_prefix_cache  # type: ignore[arg-type]
    assert ServeArgs(**given, shared_prefix_cache=True).served(given["model"]).shared_prefix_cache  # type: ignore[arg-type]
