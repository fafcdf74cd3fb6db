"""Before a route: keys, body size, request ids; and input that is not HTTP as it should be. 4xx in the envelope, never 5xx."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.api.auth import ApiKeys
from shoal.api.requests import Limits
from shoal.errors import ConfigError

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
BODY = {"model": "fish", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}
Connect = Callable[..., httpx.AsyncClient]


def is_envelope(reply: httpx.Response) -> bool:
    return set(reply.json()["error"]) == {"message", "type", "param", "code"}


def chat(**fields: object) -> bytes:
    return json.dumps({**BODY, **fields}).encode()


BROKEN = {
    "cut": (b"{", JSON, 400),
    "empty": (b"", JSON, 400),
    "not-utf8": (b"\xff\xfe\xfd", JSON, 400),
    "surrogate": (b'{"model": "\\ud800"}', JSON, 400),
    "deep": (b"[" * 200_000 + b"]" * 200_000, JSON, 400),
    "huge-number": (b'{"model": 1e999999}', JSON, 400),
    "infinity": (chat(temperature=7).replace(b"7", b"1e999"), JSON, 400),
    "long-key": (chat(logit_bias={"9" * 5000: 1}), JSON, 400),
    "form": (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "no-type": (b"{}", {}, 415),
    "text": (b"{}", {"content-type": "text/plain"}, 415),
    "gzip": (b"{}", {**JSON, "content-encoding": "gzip"}, 415),
    "50MB": (b" " * 50_000_000, JSON, 413),
}


@pytest.mark.parametrize(("body", "headers", "status"), BROKEN.values(), ids=BROKEN)
async def test_broken_bodies(http: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int) -> None:
    reply = await http.post(URL, content=body, headers=headers)
    assert reply.status_code == status
    assert is_envelope(reply)


async def test_a_body_of_unsaid_length_is_counted_and_its_sender_gets_to_the_end(connect: Connect) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(300):
            sent += 1
            yield b" " * 1000

    reply = await connect(limits=Limits(body_bytes=100_000)).post(URL, content=endless(), headers=JSON)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    assert sent == 300


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", URL, 405), ("GET", "/nothing", 404), ("POST", "/%ff%fe", 404), ("GET", "/v1/models/%ed%a0%80/x", 404)],
)
async def test_wrong_paths_and_methods(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    reply = await http.request(method, path)
    assert reply.status_code == status
    assert is_envelope(reply)


async def test_the_request_id_is_echoed_or_made(http: httpx.AsyncClient) -> None:
    echoed = await http.get("/v1/models", headers={"X-Request-Id": "abc-1"})
    assert echoed.headers["x-request-id"] == "abc-1"
    forged = await http.get("/v1/models", headers={"X-Request-Id": "a b"})
    assert len(forged.headers["x-request-id"]) == 32
    assert len((await http.get("/nothing")).headers["x-request-id"]) == 32


async def test_one_log_line_a_request_without_its_text(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="shoal.api")
    body = {**BODY, "messages": [{"role": "user", "content": "my secret"}], "user": "u\n7"}
    await http.post(URL, json=body, headers={"X-Request-Id": "abc-1"})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "shoal.api"]
    assert line.startswith(f"POST {URL} 200 ")
    assert line.endswith("id=abc-1 user='u\\n7'")
    assert "secret" not in caplog.text


class TestKeys:
    async def test_any_of_the_keys_opens_and_nothing_else_does(self, connect: Connect, engine: Any) -> None:
        http = connect(api_keys=ApiKeys(["first", "zweiter-schlüssel"]))
        for header in ("Bearer first", "bearer first", "Bearer zweiter-schlüssel"):
            reply = await http.post(URL, json=BODY, headers={"Authorization": header.encode()})  # type: ignore[dict-item]
            assert reply.status_code == 200
        for header in ("Bearer firs", "Bearer first2", "first", "Basic first", "Bearer", "Bearer ", "Bearer \xff"):
            reply = await http.post(URL, json=BODY, headers={"Authorization": header.encode("latin-1")})  # type: ignore[dict-item]
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert is_envelope(reply)
        assert (await http.post(URL, json=BODY)).status_code == 401
        assert len(engine.requests) == 3

    async def test_only_the_status_routes_are_open(self, connect: Connect) -> None:
        http = connect(api_keys=ApiKeys(["k"]))
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/tokenizer_info", "/nothing", "/healthy"):
            assert (await http.get(path)).status_code == 401

    async def test_an_unauthorised_body_is_not_parsed(self, connect: Connect) -> None:
        reply = await connect(api_keys=ApiKeys(["k"])).post(URL, content=b"{", headers=JSON)
        assert reply.status_code == 401

    def test_keys_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("# ours\nalpha\n\n beta \n")
        keys = ApiKeys.load(file)
        assert keys is not None and keys.allow("Bearer alpha") and keys.allow("Bearer beta")
        assert not keys.allow("Bearer # ours") and not keys.allow("Bearer ")

    def test_keys_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SHOAL_API_KEYS", raising=False)
        assert ApiKeys.load() is None
        monkeypatch.setenv("SHOAL_API_KEYS", "a, b")
        keys = ApiKeys.load()
        assert keys is not None and keys.allow("Bearer b")

    @pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe\xfd"])
    def test_a_file_without_keys_never_means_open(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError):
            ApiKeys.load(file)

    def test_keys_cannot_be_printed(self) -> None:
        keys = ApiKeys(["topsecret"])
        assert "topsecret" not in repr(keys) + str(vars(keys))
