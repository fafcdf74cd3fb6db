"""Models, health, readiness, version, metrics and the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from shoal import __version__
from shoal.errors import EngineDeadError

pytestmark = pytest.mark.anyio


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["max_model_len"]) == ("fish", 384)
    assert card["depths"] == {"shallow": 1, "middle": 2, "full": 4}
    assert (await http.get("/v1/models/fish")).json() == card
    missing = await http.get("/v1/models/sea/shark")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_is_about_death_and_readiness_about_now(
    http: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
    engine.dead = ConnectionError("no replica yet")
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
    engine.dead = EngineDeadError("the forward pass failed")
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [503, 503]

    async def silent() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("shoal.api.routes.PROBE_SECONDS", 0.01)
    engine.check_health = silent
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]


async def test_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": __version__, "model": "fish"}


async def test_metrics_count_requests_and_pass_on_the_engine_s(http: httpx.AsyncClient) -> None:
    body = {"model": "fish", "prompt": "ab", "max_tokens": 4}
    for fields in ({}, {"n": 2}, {"stream": True}, {"model": "shark"}):
        await http.post("/v1/completions", json={**body, **fields})
    text = (await http.get("/metrics")).text
    for line in (
        'shoal:request_success_total{finished_reason="length",model_name="fish"} 4.0',
        'shoal:request_errors_total{code="model_not_found",model_name="fish"} 1.0',
        'shoal:time_to_first_token_seconds_count{model_name="fish"} 4.0',
        'shoal:request_kv_units_bucket{le="2.0",model_name="fish"} 0.0',
        'shoal:request_kv_units_bucket{le="4.0",model_name="fish"} 4.0',
        'shoal:request_kv_units_sum{model_name="fish"} 16.0',
        'shoal:num_requests_running{model_name="fish"} 0.0',
        'shoal:num_preemptions_total{model_name="fish"} 7.0',
    ):
        assert line in text.splitlines()


async def test_metrics_can_be_switched_off_and_survive_a_silent_engine(
    connect: Callable[..., httpx.AsyncClient], engine: Any
) -> None:
    assert (await connect(metrics=False).get("/metrics")).status_code == 404

    async def broken() -> dict[str, float]:
        raise ConnectionError

    engine.stats = broken
    assert (await connect().get("/metrics")).status_code == 200


async def test_the_openapi_document_is_whole(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    known = document["components"]["schemas"]
    assert known["ChatRequest"]["additionalProperties"] is False

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert {"ChatRequest", "ImagePart", "ChatCompletion"} <= found <= set(known)


async def test_a_page_can_be_mounted_and_needs_no_key(connect: Callable[..., httpx.AsyncClient]) -> None:
    def mount(app: FastAPI) -> FastAPI:
        app.get("/ui")(lambda: "page")
        return app

    assert (await connect(ui_mount=mount).get("/ui")).json() == "page"
