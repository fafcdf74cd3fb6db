"""Before a route: keys, body size, request ids; and input that is not HTTP as it should be. 4xx in the envelope, never 5xx."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from hmac import compare_digest
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.api.app import build_app
from shoal.api.auth import GRACE_SECONDS, ApiKeys, Key, parsed
from shoal.api.limits import Limits
from shoal.api.middleware import Identified
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.wire import UnauthorizedError
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
    "many-values": (b'{"tools": [' + b"[]," * 1_200_000 + b"[]]}", JSON, 400),
    "many-names": (b'{"logit_bias": {' + b'"":0,' * 140_000 + b'"":0}}', JSON, 400),
}


@pytest.mark.parametrize(("body", "headers", "status"), BROKEN.values(), ids=BROKEN)
async def test_broken_bodies(http: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int) -> None:
    reply = await http.post(URL, content=body, headers=headers)
    assert reply.status_code == status
    assert is_envelope(reply)


async def test_many_values_are_refused_before_each_is_made(http: httpx.AsyncClient) -> None:
    for kind, what in (("many-values", "commas"), ("many-names", "colons")):
        reply = await http.post(URL, content=BROKEN[kind][0], headers=JSON)
        assert f"{what}; allowed" in reply.json()["error"]["message"].replace("'", "")


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
    [
        ("GET", "/v1/completions", 405),
        ("GET", "/nothing", 404),
        ("POST", "/%ff%fe", 404),
        ("GET", "/v1/models/%ed%a0%80/x", 404),
    ],
)
async def test_wrong_paths_and_methods(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    reply = await http.request(method, path)
    assert reply.status_code == status
    assert is_envelope(reply)
    if status == 405:
        assert reply.headers["allow"] == "POST"
        assert "allowed: POST" in reply.json()["error"]["message"]


async def test_the_request_id_is_echoed_or_made(http: httpx.AsyncClient) -> None:
    echoed = await http.get("/v1/models", headers={"X-Request-Id": "abc-1"})
    assert echoed.headers["x-request-id"] == "abc-1"
    forged = await http.get("/v1/models", headers={"X-Request-Id": "a b"})
    assert len(forged.headers["x-request-id"]) == 32
    assert len((await http.get("/nothing")).headers["x-request-id"]) == 32


@pytest.mark.parametrize("given", [None, b"", b"a b", b"c" * 129, b"z\xc3\xbc", b"\xff", b"a\xc2\xb2", b"x\ny"])
async def test_a_proxy_that_believes_ids_gets_none_that_it_should_not(given: bytes | None) -> None:
    """Serve's proxy answers with what it was given, and with 500 where that is not ASCII."""
    seen: list[bytes] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")

    headers = [(b"host", b"x")] + ([] if given is None else [(b"x-request-id", given)] * 2)
    await Identified(proxy)({"type": "http", "headers": headers}, None, None)  # type: ignore[arg-type]
    assert len(seen) == 1 and re.fullmatch(b"[0-9a-f]{32}", seen[0])
    await Identified(proxy)({"type": "http", "headers": [(b"x-request-id", b"abc-1")]}, None, None)  # type: ignore[arg-type]
    assert seen[1:] == [b"abc-1"]


async def test_what_anybody_can_say_of_the_host_reaches_no_page(connect: Connect) -> None:
    def headers(request: Request) -> dict[str, str]:
        return dict(request.headers)

    def mounted(app: FastAPI) -> FastAPI:
        app.add_api_route("/ui/headers", headers)
        return app

    told = {"X-Forwarded-Host": "evil.example", "X-Gradio-Server": "http://evil.example", "X-Forwarded-Proto": "https"}
    seen = (await connect(ui_mount=mounted).get("/ui/headers", headers=told)).json()
    assert "evil.example" not in str(seen) and seen["x-forwarded-proto"] == "https"


async def test_a_client_can_read_the_headers_of_every_answer(http: httpx.AsyncClient) -> None:
    settings = {f"name_{at:06}": 1 for at in range(4000)}
    reply = await http.post(URL, json={**BODY, "chat_template_kwargs": settings})
    assert reply.status_code == 200 and sum(map(len, reply.headers.values())) < 4096
    first, *_, last = reply.headers["x-shoal-unused"].split(", ")
    assert (first, last) == ("chat_template_kwargs.name_000000", "...")


async def test_what_the_pages_bring_stands_behind_the_gate(connect: Connect) -> None:
    """They read bodies before any route does, the login's without a key."""

    def mounted(app: FastAPI) -> FastAPI:
        app.add_middleware(Reads)
        return app

    reply = await connect(ui_mount=mounted, limits=Limits(body_bytes=1000)).post("/ui/login", content=b"x" * 2000)
    assert reply.status_code == 413 and is_envelope(reply)


class Reads:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Response(await Request(scope, receive).body())(scope, receive, send)


async def test_every_answer_tells_its_time_and_what_its_key_may_still_do(connect: Connect) -> None:
    """Under the names that OpenAI's clients read."""
    http = connect(api_keys=ApiKeys(["a requests=3 tokens=120", "b requests=9", "c"], clock=lambda: 100.0))
    body = {"model": "fish", "prompt": "x" * 50, "max_tokens": 10}

    def limits(reply: httpx.Response) -> dict[str, str]:
        assert reply.headers["openai-processing-ms"].isdecimal()
        return {name[12:]: value for name, value in reply.headers.items() if name.startswith("x-ratelimit-")}

    bearer = {name: {"Authorization": f"Bearer {name}"} for name in "abcd"}
    whole = await http.post("/v1/completions", json=body, headers=bearer["a"])
    assert limits(whole) == {
        "limit-requests": "3", "remaining-requests": "2", "reset-requests": "20.000s",
        "limit-tokens": "120", "remaining-tokens": "60", "reset-tokens": "30.000s",
    }  # fmt: skip
    stream = await http.post("/v1/completions", json={**body, "stream": True}, headers=bearer["a"])
    assert limits(stream)["remaining-tokens"] == "9"  # when its first token was sent
    refused = await http.post("/v1/completions", json=body, headers=bearer["a"])
    assert (refused.status_code, limits(refused)["remaining-tokens"], limits(refused)["remaining-requests"]) == (
        429, "0", "1",
    )  # fmt: skip
    assert limits(await http.get("/v1/models", headers=bearer["b"])).keys() == {
        "limit-requests", "remaining-requests", "reset-requests",
    }  # fmt: skip
    for key in ("c", "d"):  # without limits; wrong
        assert limits(await http.get("/v1/models", headers=bearer[key])) == {}


async def test_one_log_line_a_request_without_its_text(
    connect: Connect, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    http = connect(api_keys=ApiKeys(["topsecretkey name=search"]), headers={"Authorization": "Bearer topsecretkey"})
    body = {**BODY, "messages": [{"role": "user", "content": "my secret"}], "user": "u\n7"}
    for stream in (False, True):
        caplog.clear()
        await http.post(URL, json={**body, "stream": stream, "max_tokens": 4}, headers={"X-Request-Id": "abc-1"})
        (line,) = [record.getMessage() for record in caplog.records if record.name == "shoal.access"]
        said = json.loads(line)
        assert 0 < said.pop("first_token_seconds") <= said.pop("seconds")
        assert said.pop("time").endswith("Z")
        assert said == {
            "id": "abc-1", "method": "POST", "path": URL, "status": 200, "key": "search", "user": "u\n7", "model": "fish",
            "prompt_tokens": 12, "completion_tokens": 4, "depth": "full",
        }  # fmt: skip
        assert "secret" not in caplog.text
    engine.raises = ZeroDivisionError("a bug that quotes my secret")
    assert (await http.post(URL, json=body)).status_code == 500
    assert "conftest.py" in caplog.text and "ZeroDivisionError" in caplog.text  # where it was raised
    assert "secret" not in caplog.text


async def test_a_request_is_a_span_of_the_caller_s_trace(http: httpx.AsyncClient) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="spans need OpenTelemetry")
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    spans, provider = export.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer", provider.get_tracer)
        await http.post(URL, json={**BODY, "max_tokens": 4}, headers={"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"})
    *parts, span = spans.get_finished_spans()
    assert [part.name for part in parts] == ["prepare", "queue", "prefill", "decode"]
    assert {part.parent.span_id for part in parts} == {span.context.span_id}
    rounding = 200_000_000  # ns: two clocks are read one after the other, on a machine that may be busy
    assert span.start_time <= parts[0].start_time + rounding and parts[-1].end_time <= span.end_time + rounding
    assert (span.name, f"{span.context.trace_id:x}", f"{span.parent.span_id:x}") == (f"POST {URL}", "ab" * 16, "cd" * 8)
    assert span.attributes["http.response.status_code"] == 200
    assert (span.attributes["gen_ai.usage.output_tokens"], span.attributes["shoal.depth"]) == (4, "full")


async def test_other_origins_are_answered_only_where_they_are_let_in(connect: Connect) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in (await connect().options(URL, headers=ask)).headers
    http = connect(cors=["https://a.example"], api_keys=ApiKeys(["k"]))
    assert (await http.options(URL, headers=ask)).headers["access-control-allow-origin"] == "https://a.example"
    other = await http.options(URL, headers={**ask, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    anybody = await connect(cors=["*"]).options(URL, headers=ask)
    assert anybody.headers["access-control-allow-origin"] == "*"
    for wrong in ("a.example", "https://a.example/", "https://a.example/x", "HTTPS://a", ""):
        with pytest.raises(ConfigError, match="cors"):
            connect(cors=[wrong])


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

    def test_every_key_is_compared_and_in_constant_time_whichever_is_given(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys, compared = ApiKeys(["a", "b", "c"]), list[bytes]()

        def compare(given: bytes, known: bytes) -> bool:
            compared.append(known)
            return compare_digest(given, known)

        monkeypatch.setattr("hmac.compare_digest", compare)
        for given, found in (("a", True), ("c", True), ("x", False)):
            compared.clear()
            with nullcontext() if found else pytest.raises(UnauthorizedError):
                keys.find(f"Bearer {given}")
            assert len(compared) == len(set(compared)) == 3

    async def test_only_the_status_routes_are_open(self, connect: Connect) -> None:
        http = connect(api_keys=ApiKeys(["k"]))
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/tokenizer_info", "/nothing", "/healthy"):
            assert (await http.get(path)).status_code == 401

    async def test_they_are_open_too_where_the_app_stands_below_a_path(self, served: ServedModel, engine: Any) -> None:
        """As with `route_prefix` of a Serve config: the path is then the whole one."""
        app = build_app([Hosted(served, engine)], api_keys=ApiKeys(["k"]))
        below = httpx.ASGITransport(app, root_path="/fish")
        async with httpx.AsyncClient(transport=below, base_url="http://test/fish") as http:
            assert [(await http.get(path)).status_code for path in ("/ready", "/v1/models", "/fish/ready")] == [
                200,
                401,
                401,
            ]
            assert (await http.get("/v1/models", headers={"Authorization": "Bearer k"})).status_code == 200

    async def test_an_unauthorised_body_is_not_parsed(self, connect: Connect) -> None:
        reply = await connect(api_keys=ApiKeys(["k"])).post(URL, content=b"{", headers=JSON)
        assert reply.status_code == 401

    def test_keys_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("# ours\nalpha\n\n beta \n")
        keys = ApiKeys.load(file)
        assert keys is not None and keys.find("Bearer alpha") is not keys.find("Bearer beta")
        for wrong in ("Bearer # ours", "Bearer ", None):
            with pytest.raises(UnauthorizedError):
                keys.find(wrong)

    def test_keys_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SHOAL_API_KEYS", raising=False)
        assert ApiKeys.load() is None
        monkeypatch.setenv("SHOAL_API_KEYS", "a, b name=bee requests=2")
        keys = ApiKeys.load()
        assert keys is not None and keys.find("Bearer a").requests is None
        bee = keys.find("Bearer b")
        assert bee.name == "bee" and bee.requests is not None and bee.requests.per_minute == 2

    @pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe\xfd"])
    def test_a_file_without_keys_never_means_open(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError):
            ApiKeys.load(file)

    def test_a_digest_stands_for_its_key(self) -> None:
        keys = ApiKeys(ApiKeys(["alpha name=first requests=3 tokens=9 at_once=4", "beta"]).lines)
        alpha = keys.find("Bearer alpha")
        assert (alpha.name, keys.find("Bearer beta").name) == ("first", ApiKeys(["beta"]).find("Bearer beta").name)
        assert alpha.requests is not None and alpha.tokens is not None
        assert (alpha.requests.per_minute, alpha.tokens.per_minute) == (3, 9)
        assert alpha.places is not None and alpha.places.most == 4
        with pytest.raises(UnauthorizedError):
            keys.find(f"Bearer {keys.lines[0].split()[0]}")  # who reads the digest has no key

    def test_a_file_that_changes_is_read_again(self, tmp_path: Path) -> None:
        file, beside = tmp_path / "keys", tmp_path / "new"
        file.write_text("alpha requests=2\nbeta requests=2\n")
        keys = ApiKeys.load(file, clock=lambda: 100.0)
        assert keys is not None
        keys.find("Bearer alpha").admit()
        beside.write_text("alpha requests=2\nbeta requests=5\ngamma\n")
        beside.replace(file)  # as editors and Kubernetes change files
        assert keys.find("Bearer gamma")
        alpha, beta = keys.find("Bearer alpha").requests, keys.find("Bearer beta").requests
        assert alpha is not None and beta is not None
        assert (alpha.state()[0], beta.state()[0]) == (1, 5)  # what was spent is spent
        file.write_text("gamma\n")
        with pytest.raises(UnauthorizedError):
            keys.find("Bearer alpha")

    @staticmethod
    def with_beta(folder: Path, lines: str, now: list[float]) -> tuple[Path, ApiKeys, Key]:
        """A file of keys, what it gives, and its key "beta"."""
        (file := folder / "keys").write_text(lines)
        keys = ApiKeys.load(file, clock=lambda: now[0])
        assert keys is not None
        return file, keys, keys.find("Bearer beta")

    def test_a_file_that_is_read_half_written_costs_no_batch_and_refills_no_minute(self, tmp_path: Path) -> None:
        now = [100.0]
        file, keys, beta = self.with_beta(tmp_path, "alpha\nbeta requests=2\n", now)
        beta.admit()
        for _ in range(2):  # written over in place, and read in between
            file.write_text("alpha\n")
            with pytest.raises(UnauthorizedError):
                keys.find("Bearer beta")
            assert keys.known(beta.digest.hex()) is beta
            file.write_text("alpha\nbeta requests=2\n")
            assert keys.find("Bearer beta") is beta is keys.known(beta.digest.hex())
        file.write_text("alpha\n")
        assert keys.known(beta.digest.hex()) is beta
        now[0] += GRACE_SECONDS
        assert keys.known(beta.digest.hex()) is None and keys.known("0" * 64) is None
        file.write_text("alpha\nbeta requests=2\n")
        assert keys.find("Bearer beta") is not beta

    @pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe", b"new requests=none\n", b"new\nnew\n"])
    def test_a_broken_new_file_changes_nothing_and_is_told(
        self, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "keys"
        file.write_text("topsecret\n")
        keys = ApiKeys.load(file)
        assert keys is not None
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        for _ in range(2):
            assert keys.find("Bearer topsecret")
            with pytest.raises(UnauthorizedError):
                keys.find("Bearer new")
        assert len(caplog.records) == 1 and "stay as they were" in caplog.text and "topsecret" not in caplog.text
        file.write_text("other\n")
        assert keys.find("Bearer other")

    @pytest.mark.parametrize(
        "lines",
        [
            ["alpha name=ann", "# of the shop", "beta name=ann"],  # would share what is stored
            # as alpha is called without one
            ["alpha", "", f"beta name={ApiKeys(['alpha']).find('Bearer alpha').name}"],
            ["alpha name=ann", "", "alpha name=bob"],
        ],
    )
    def test_keys_that_cannot_be_told_apart_are_refused_with_both_lines(self, lines: list[str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="lines 1 and 3") as refused:
            ApiKeys(lines)
        assert "alpha" not in str(refused.value) and "beta" not in str(refused.value)
        (file := tmp_path / "keys").write_text("gamma name=ann\n")
        keys = ApiKeys.load(file)
        assert keys is not None
        file.write_text("\n".join(lines))  # of a service that runs: the keys stay as they were
        assert keys.find("Bearer gamma").name == "ann"

    def test_a_digest_that_is_none_is_no_key(self) -> None:
        """Digests are shown to others: one in capitals, or cut, would let in whoever has seen it."""
        for line in ("sha256:" + "AB" * 32, "sha256:" + "ab" * 31, "sha256:"):
            with pytest.raises(ConfigError, match="digits"):
                ApiKeys([line])

    @pytest.mark.parametrize("setting", ["requests", "tokens", "at_once"])
    def test_a_number_is_taken_as_it_is_or_refused(self, setting: str) -> None:
        """One of 13 digits was taken by its first 12."""
        key = parsed(f"k {setting}=999999999999", 1, time.monotonic)
        found = {"requests": key.requests, "tokens": key.tokens, "at_once": key.places}[setting]
        assert (found.most if setting == "at_once" else found.per_minute) == 999_999_999_999
        for wrong in ("1" + "0" * 12, "9" * 5000):
            with pytest.raises(ConfigError, match="12 digits at most"):
                parsed(f"k {setting}={wrong}", 1, time.monotonic)

    def test_keys_cannot_be_printed(self) -> None:
        keys = ApiKeys(["topsecret"])
        assert "topsecret" not in repr(keys) + str(vars(keys))
        for line in (
            "topsecret topsecret",
            "topsecret requests=0",
            "topsecret at_once=0",
            "topsecret tokens=topsecret",
            "topsecret\ntopsecret",
        ):
            with pytest.raises(ConfigError) as error:
                ApiKeys(line.split("\n"))
            assert "topsecret" not in error.value.message


class TestRates:
    """Limits a minute, key by key, on a clock that stands still unless it is told."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [100.0]

    def http(self, connect: Connect, now: list[float], *lines: str) -> httpx.AsyncClient:
        return connect(api_keys=ApiKeys(lines, clock=lambda: now[0]))

    async def test_requests(self, connect: Connect, now: list[float]) -> None:
        http = self.http(connect, now, "a requests=2", "b")
        ask = [await http.get("/v1/models", headers={"Authorization": "Bearer a"}) for _ in range(3)]
        assert [reply.status_code for reply in ask] == [200, 200, 429]
        assert (ask[-1].headers["retry-after"], ask[-1].json()["error"]["code"]) == ("30", "rate_limit_exceeded")
        assert ask[-1].json()["error"]["type"] == "rate_limit_error"
        assert (await http.get("/v1/models", headers={"Authorization": "Bearer b"})).status_code == 200
        now[0] += 30
        again = [await http.get("/v1/models", headers={"Authorization": "Bearer a"}) for _ in range(2)]
        assert [reply.status_code for reply in again] == [200, 429]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_tokens_of_prompt_and_answer(self, connect: Connect, now: list[float], stream: bool) -> None:
        http = self.http(connect, now, "a tokens=60")
        # 61: one more than a minute has
        body = {"model": "fish", "prompt": "x" * 50, "max_tokens": 11, "stream": stream}
        statuses = []
        for seconds in (0, 1.9, 0.2):
            now[0] += seconds
            statuses.append(
                (await http.post("/v1/completions", json=body, headers={"Authorization": "Bearer a"})).status_code
            )
        assert statuses == [200, 429, 200]

    @pytest.mark.parametrize(
        ("path", "body"),
        [("/tokenize", {"prompt": "x" * 61}), ("/detokenize", {"tokens": [81] * 61}),
         ("/tokenize", {"messages": [{"role": "user", "content": "x" * 60}]}),
         ("/v1/embeddings", {"model": "fish", "input": "x" * 61})],
    )  # fmt: skip
    async def test_tokens_that_are_only_counted_or_read(
        self, connect: Connect, now: list[float], path: str, body: dict[str, Any]
    ) -> None:
        http = self.http(connect, now, "a tokens=60")
        replies = [await http.post(path, json=body, headers={"Authorization": "Bearer a"}) for _ in "ab"]
        assert [reply.status_code for reply in replies] == [200, 429]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_requests_at_the_same_time(
        self, connect: Connect, now: list[float], engine: Any, stream: bool
    ) -> None:
        """A place is taken until the answer has ended, however it ends."""
        http = self.http(connect, now, "a at_once=2", "b")
        engine.hangs_after = 1
        body = {"model": "fish", "prompt": "x", "stream": stream}
        ask = lambda key: http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})  # noqa: E731
        running = [asyncio.create_task(ask("a")) for _ in "ab"]
        while engine.open < 2:
            await asyncio.sleep(0.001)
        third = await ask("a")
        assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "2 at once" in third.json()["error"]["message"] and third.headers["retry-after"] == "1"
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        engine.hangs_after = None
        assert [(await ask(key)).status_code for key in "aaab"] == [200] * 4
        refused = await http.post("/v1/completions", content=b"{", headers={"Authorization": "Bearer a"} | JSON)
        assert [refused.status_code, *[(await ask("a")).status_code for _ in "abc"]] == [400, 200, 200, 200]
