"""Models, health, readiness, version, metrics and the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.drain import Drain
from shoal.api.middleware import OPEN_PATHS
from shoal.api.page import chat_page
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.metrics import Samples, sample
from shoal.errors import ConfigError, EngineDeadError
from tests.unit.api.conftest import Scripted

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


async def test_a_model_s_card_tells_what_is_computed_with_and_not_what_is_stored(
    served: ServedModel, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.fresh.EVERY_SECONDS", 0.0)
    stored = replace(served, config=replace(served.config, quantization="w8a8"))
    app = build_app([Hosted(stored, engine)])
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def told() -> set[str]:
        cards = [(await http.get("/v1/models")).json()["data"][0], (await http.get("/v1/models/fish")).json()]
        return {card["quantization"] for card in cards}

    assert await told() == {"none"}  # the engine fell back to fp32
    engine.quantization = "w8a8"
    assert await told() == {"w8a8"}

    async def of_three_replicas() -> list[dict[str, str]]:
        return [{"quantization": how, "weights": "ab"} for how in ("w8a8", "none", "w8a8")]

    async def silent() -> list[dict[str, str]]:
        raise ConnectionError

    for info, says in ((of_three_replicas, "none,w8a8"), (silent, "w8a8")):
        monkeypatch.setattr(engine, "info", info)
        assert await told() == {says}
        lines = (await http.get("/metrics")).text.splitlines()
        counted = {line for line in lines if line.startswith(("shoal:model_info{", "shoal:replica_weights{"))}
        assert (
            counted
            == {
                "none,w8a8": {
                    'shoal:model_info{model_name="fish",quantization="w8a8"} 2.0',
                    'shoal:model_info{model_name="fish",quantization="none"} 1.0',
                    'shoal:replica_weights{model_name="fish",weights="ab"} 3.0',
                },
                "w8a8": set(),
            }[says]
        )


async def test_a_scrape_tells_of_all_gateways_whichever_answers_it(served: ServedModel, engine: Any) -> None:
    """Each under its name, so that no counter drops when another answers the next scrape, or when one is gone."""
    others: dict[str, Samples] = {"b": {sample("request_errors", model_name="fish", code="429"): 7.0}}
    fails = False

    async def gateways() -> dict[str, Samples]:
        if fails:
            raise ConnectionError
        return {"a": app.state.service.counted(), **others}

    app = build_app([Hosted(served, engine)], gateways=gateways)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    await http.post("/v1/completions", json={"model": "fish"})

    async def told() -> set[str]:
        lines = (await http.get("/metrics")).raise_for_status().text.splitlines()
        return {line for line in lines if line.startswith("shoal:request_errors")}

    of_b = 'shoal:request_errors_total{code="429",gateway="b",model_name="fish"} 7.0'
    assert await told() == {'shoal:request_errors_total{code="400",gateway="a",model_name=""} 1.0', of_b}
    del others["b"]
    assert await told() == {'shoal:request_errors_total{code="400",gateway="a",model_name=""} 1.0'}
    fails = True
    assert await told() == set(), "a gap, and not the counts of one"


async def test_health_is_about_death_and_readiness_about_now(
    http: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.fresh.EVERY_SECONDS", 0.0)
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
    engine.dead = ConnectionError("no replica yet")
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]
    engine.dead = EngineDeadError("the forward pass failed")
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [503, 503]
    assert [(await http.head(path)).status_code for path in ("/health", "/ready")] == [503, 503]  # as monitors ask

    async def silent() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("shoal.api.fresh.PROBE_SECONDS", 0.01)
    engine.check_health = silent
    assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 503]


async def test_a_service_that_is_closed_takes_no_work_and_says_so(served: ServedModel, engine: Any) -> None:
    drain = Drain(OPEN_PATHS)
    app = build_app([Hosted(served, engine)], drain=drain)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    body = {"model": "fish", "prompt": "abc", "max_tokens": 2}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert await drain.ended(0.0)
    drain.close()
    assert [(await http.get(path)).status_code for path in ("/health", "/metrics", "/ready")] == [200, 200, 503]
    refused = await http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/tokenizer_info/", "/health/", "/nothing"])
async def test_no_path_is_redirected(connect: Callable[..., httpx.AsyncClient], path: str) -> None:
    """Behind a proxy that ends TLS it would go to http://, and take the key along in clear text."""
    reply = await connect().post(path)
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


async def test_metrics_count_requests_and_pass_on_the_engine_s(http: httpx.AsyncClient) -> None:
    body = {"model": "fish", "prompt": "ab", "max_tokens": 4}
    for fields in ({}, {"n": 2}, {"stream": True}, {"model": "shark"}):
        await http.post("/v1/completions", json={**body, **fields})
    text = (await http.get("/metrics")).text
    for line in (
        'shoal:request_success_total{finished_reason="length",model_name="fish"} 4.0',
        'shoal:request_errors_total{code="model_not_found",model_name=""} 1.0',
        'shoal:time_to_first_token_seconds_count{model_name="fish"} 4.0',
        'shoal:request_kv_units_bucket{le="2.0",model_name="fish"} 0.0',
        'shoal:request_kv_units_bucket{le="4.0",model_name="fish"} 4.0',
        'shoal:request_kv_units_sum{model_name="fish"} 16.0',
        'shoal:num_requests_running{model_name="fish"} 0.0',
        'shoal:num_preemptions_total{model_name="fish"} 7.0',
        'shoal:model_info{model_name="fish",quantization="none"} 1.0',
        'shoal:requests_depth_4_total{model_name="fish"} 0.0',
        "# TYPE shoal:requests_depth_4_total counter",
        "# TYPE shoal:iteration_tokens_total histogram",
    ):
        assert line in text.splitlines(), line


async def test_metrics_can_be_switched_off_and_survive_a_silent_engine(
    connect: Callable[..., httpx.AsyncClient], engine: Any
) -> None:
    assert (await connect(metrics=False).get("/metrics")).status_code == 404

    async def broken() -> dict[str, float]:
        raise ConnectionError

    engine.stats = broken
    assert (await connect().get("/metrics")).status_code == 200


async def test_the_document_s_examples_name_the_served_model_and_are_answered(
    connect: Callable[..., httpx.AsyncClient], tmp_path: Path
) -> None:
    (tmp_path / "adapters" / "runs" / "support" / "adapter").mkdir(parents=True)
    capture = CaptureArgs(str(tmp_path / "capture"), texts=True)
    http = connect(batches=tmp_path / "batches", adapters_from=tmp_path / "adapters", capture=capture)
    chat = {"model": "fish", "messages": [{"role": "user", "content": "?"}], "max_tokens": 3, "store": True}
    stored = (await http.post("/v1/chat/completions", json=chat)).json()["id"]
    document = (await http.get("/openapi.json")).json()
    asked, file = 0, ""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            if path == "/v1/files" and method == "post":
                (form,) = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["examples"]
                upload = {"file": ("in.jsonl", form["file"])}
                file = (await http.post(path, data={"purpose": form["purpose"]}, files=upload)).json()["id"]
            elif "requestBody" in operation:
                (content,) = operation["requestBody"]["content"].values()
                name = content["schema"]["$ref"].rpartition("/")[2]
                for example in document["components"]["schemas"][name]["examples"]:
                    assert example.get("model", "fish") == "fish"
                    if "input_file_id" in example:
                        example["input_file_id"] = file
                    example |= {"id": stored} if "id" in example else {}
                    reply = await http.post(path.replace("{id}", stored), json=example)
                    assert (reply.status_code, asked := asked + 1)[0] == 200, reply.text
    assert asked >= 5


async def test_the_document_says_which_paths_need_a_key(connect: Callable[..., httpx.AsyncClient]) -> None:
    http = connect(api_keys=ApiKeys(["k"]))
    document = (await http.get("/openapi.json")).json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            reply = await http.request(method, path.replace("{name}", "fish"))
            assert (reply.status_code == 401) == ("security" in operation), path
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


class TestSeveralModels:
    @pytest.fixture
    def shark(self, served: ServedModel) -> Hosted:
        other = replace(served, name="shark", aliases=("big", "sea/shark"))
        return Hosted(other, Scripted(served.tokenizer, reply="I bite"))

    @pytest.fixture
    def http(self, served: ServedModel, engine: Any, shark: Hosted) -> httpx.AsyncClient:
        app = build_app([Hosted(served, engine), shark])
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def test_each_name_reaches_its_engine(self, http: httpx.AsyncClient, engine: Any, shark: Hosted) -> None:
        for name, own, text in (("fish", "fish", engine.reply), ("sea/shark", "shark", "I bite")):
            answer = (await http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 50})).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (own, text)
        assert (await http.post("/v1/completions", json={"model": "sea", "prompt": "a"})).status_code == 404

    async def test_all_names_are_listed_aliases_with_their_root(self, http: httpx.AsyncClient) -> None:
        cards = (await http.get("/v1/models")).json()["data"]
        roots = [("fish", "fish"), ("shark", "shark"), ("big", "shark"), ("sea/shark", "shark")]
        assert [(card["id"], card["root"]) for card in cards] == roots
        assert (await http.get("/v1/models/sea/shark")).json() == cards[3]

    async def test_metrics_and_errors_are_each_model_s_own(self, http: httpx.AsyncClient) -> None:
        for name in ("big", "shark", "fish"):
            await http.post("/v1/completions", json={"model": name, "prompt": "a"})
        await http.post("/v1/completions", json={"model": "big", "prompt": "a", "depth": "abyss"})
        lines = (await http.get("/metrics")).text.splitlines()
        for model, count in (("fish", 1), ("shark", 2)):
            assert f'shoal:e2e_request_latency_seconds_count{{model_name="{model}"}} {count}.0' in lines
            assert f'shoal:num_replicas{{model_name="{model}"}} 1.0' in lines
        assert 'shoal:request_errors_total{code="400",model_name="shark"} 1.0' in lines

    async def test_one_dead_engine_is_told_and_the_other_answers(self, http: httpx.AsyncClient, shark: Hosted) -> None:
        shark.client.dead = EngineDeadError("gone")  # type: ignore[attr-defined]
        # its loss is its own
        assert [(await http.get(path)).status_code for path in ("/health", "/ready")] == [200, 200]
        assert (await http.get("/ready")).json() == {"status": "ready", "not_ready": ["shark"]}
        assert (await http.post("/v1/completions", json={"model": "fish", "prompt": "a"})).status_code == 200

    def test_a_name_given_twice_is_refused(self, served: ServedModel, engine: Any, shark: Hosted) -> None:
        with pytest.raises(ConfigError, match="each name once"):
            build_app([Hosted(served, engine), Hosted(replace(shark.served, aliases=("fish",)), shark.client)])


def below(app: FastAPI, **_: object) -> FastAPI:
    """A page as Gradio mounts one: it answers below /ui/, and not at /ui."""
    page = FastAPI()
    page.get("/")(lambda: "page")
    app.mount("/ui", page)
    return app


async def test_the_page_is_found_without_its_slash_whatever_stands_before_it(served: ServedModel, engine: Any) -> None:
    app = build_app([Hosted(served, engine)], ui_mount=chat_page("http://fish/v1", mount=f"{__name__}:below"))
    transport = httpx.ASGITransport(app, root_path="/sea")
    async with httpx.AsyncClient(transport=transport, base_url="https://proxy", follow_redirects=True) as http:
        reply = await http.get("/sea/ui?dark=1")
        assert (reply.json(), str(reply.url)) == ("page", "https://proxy/sea/ui/?dark=1")
