"""`shoal serve --no-ray` and the service behind Ray Serve answer a request by the same bytes, but for ids and times."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from shoal import Model
from shoal.api.serve_args import ServeArgs
from shoal.on_ray import serve
from shoal.on_ray.serve_config import serve_config

pytestmark = [pytest.mark.ray, pytest.mark.drill]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI: list[Any] = [{"role": "user", "content": "How deep is the ¿sea?"}]
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
CATCH = {
    "type": "object", "properties": {"fish": {"enum": ["cod", "eel"]}, "deep": {"type": "boolean"}},
    "required": ["fish", "deep"], "additionalProperties": False,
}  # fmt: skip
LOG = {"type": "function", "function": {"name": "log", "parameters": CATCH}}
POLICY = {  # says something before every answer
    "notice": {"en": "Beware."},
    "workloads": {"tracking": "shallow"},
    "urgency": {
        "field": "urgency", "levels": ["calm", "swim"], "told": {"swim": {"en": "Swim: {words}."}},
        "flags": [{"name": "shark", "level": "swim", "words": ["shark"]}],
    },
}  # fmt: skip
VOLATILE = {"date", "server", "openai-processing-ms", "x-ratelimit-reset-requests"}
NEW = re.compile(rb'"id":"(chatcmpl|cmpl|call)[-_][0-9a-f]+"|"created":\d{10},"model"')  # of each answer anew


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), "teal").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(**fields: Any) -> dict[str, Any]:
    return {"url": CHAT, "json": {"model": "fish", "messages": HI, "temperature": 0, "max_tokens": 12, **fields}}


def text(**fields: Any) -> dict[str, Any]:
    return {"url": TEXT, "json": {"model": "fish", "prompt": "def f(x):", "seed": 7, "max_tokens": 12, **fields}}


def image(url: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "which colour?"}]
    return [{"role": "user", "content": parts}]


def raw(content: bytes, **headers: str) -> dict[str, Any]:
    return {"url": CHAT, "content": content, "headers": {"content-type": "application/json", **headers}}


REQUESTS: dict[str, dict[str, Any]] = {
    "models": {"method": "GET", "url": "/v1/models"},
    "model": {"method": "GET", "url": "/v1/models/pike"},
    "no-model": {"method": "GET", "url": "/v1/models/sea/shark"},
    "health": {"method": "GET", "url": "/health"},
    "ready": {"method": "GET", "url": "/ready"},
    "version": {"method": "GET", "url": "/version"},
    "document": {"method": "GET", "url": "/openapi.json"},
    "tokenizer": {"method": "GET", "url": "/tokenizer_info"},
    "tokenize": {"url": "/tokenize", "json": {"messages": HI}},
    "detokenize": {"url": "/detokenize", "json": {"tokens": [81, 120, 200]}},
    "vectors": {"url": "/v1/embeddings", "json": {"model": "fish", "input": ["the sea", "x"]}},
    "base64": {"url": "/v1/embeddings", "json": {"model": "fish", "input": "x", "encoding_format": "base64"}},
    "chat": chat(logprobs=True, top_logprobs=3),
    "alias": chat(model="pike", depth="shallow", user="u7"),
    "choices": chat(n=3, seed=1, temperature=1),
    "image": chat(messages=image(picture())),
    "json": chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": CATCH}}, max_tokens=90),
    "tool": chat(tools=[LOG], tool_choice="required", max_tokens=90),
    "tool-stream": chat(
        **STREAM, tools=[LOG], tool_choice={"type": "function", "function": {"name": "log"}}, max_tokens=90
    ),
    "stream": chat(**STREAM),
    "stream-logprobs": chat(**STREAM, logprobs=True, top_logprobs=2, depth="middle"),
    "stream-image": chat(**STREAM, messages=image(picture()), seed=3, temperature=1),
    "text": text(logprobs=2, n=2),
    "echo": text(prompt=[[81, 120], [90]], echo=True, logprobs=1, max_tokens=0),
    "stop": text(temperature=0, stop=["e", "a", "\n", "x"], max_tokens=40),
    "text-stream": text(**STREAM, echo=True),
    "request-id": {**text(), "headers": {"X-Request-Id": "mine-1"}},
    "first-of-one-a-minute": {"method": "GET", "url": "/v1/models", "headers": {"Authorization": "Bearer poor"}},
    "second-of-one-a-minute": {"method": "GET", "url": "/v1/models", "headers": {"Authorization": "Bearer poor"}},
    "no-key": {**text(), "headers": {"Authorization": ""}},
    "wrong-key": {**text(), "headers": {"Authorization": "Bearer no"}},
    "no-path": {"method": "GET", "url": "/v1/nothing"},
    "no-method": {"method": "DELETE", "url": "/v1/models"},
    "preflight": {"method": "OPTIONS", "url": CHAT, "headers": {"Origin": "https://a.example"}},
    "no-metrics": {"method": "GET", "url": "/metrics"},
    "cut": raw(b"{"),
    "not-utf8": raw(b"\xff\xfe"),
    "deep": raw(b"[" * 100_000),
    "no-json": raw(b"a=b", **{"content-type": "text/plain"}),
    "coded": raw(b"{}", **{"content-encoding": "gzip"}),
    "large": raw(b" " * (17 * 2**20)),
    "raised": chat(messages=[{"role": "user", "content": "Sharks!"}], metadata={"workload": "tracking"}),
    "raised-stream": chat(**STREAM, messages=[{"role": "user", "content": "Sharks!"}]),
    "unknown-field": chat(depht="full"),
    "unknown-field-of-a-stream": chat(depht="full", stream=True),
    "too-long": chat(max_tokens=100_000),
    "far-image": chat(messages=image("https://example.org/x.png")),
    "suffix": text(suffix="x"),
}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def ask(url: str, request: dict[str, Any]) -> Answer:
    given = {"method": "POST", **request}
    headers = {"Authorization": "Bearer rich", **given.pop("headers", {})}
    path = given.pop("url")
    reply = httpx.request(url=url + path, headers={n: v for n, v in headers.items() if v}, timeout=60, **given)
    assert reply.headers["openai-processing-ms"].isdecimal()
    same = {name: "" if name in VOLATILE else value for name, value in reply.headers.items()}
    if len(same["x-request-id"]) > 30:  # made for this request
        same["x-request-id"] = ""
    return Answer(reply.status_code, same, NEW.sub(b"", reply.content))


@pytest.fixture(scope="module")
def urls(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Of both services, each with the same INT8 model, the same keys and policy, and no metrics."""
    root = tmp_path_factory.mktemp("same")
    Model.from_preset("test", seed=3).quantized().save(root / "model")
    (root / "keys").write_text("rich\npoor requests=1\n")
    (root / "policy.json").write_text(json.dumps(POLICY))
    args = ServeArgs(
        model=str(root / "model"),
        name="fish,pike",
        api_keys=str(root / "keys"),
        metrics=False,
        policy=str(root / "policy.json"),
    )
    with without_ray(root) as local:
        try:
            yield local, serve.run(serve_config(args, port=free_port()), blocking=False)
        finally:
            serve.stop()


@contextmanager
def without_ray(root: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "shoal.cli", "serve", "--no-ray", "--no-ui", "--no-metrics", "--name", "fish,pike"]
    command += ["--model", str(root / "model"), "--api-keys", str(root / "keys"), "--port", url.rpartition(":")[2]]
    command += ["--policy", str(root / "policy.json")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    ) as process:
        try:
            assert process.stdout is not None
            assert url in process.stdout.readline()
            yield url
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_same_bytes_with_ray_and_without(urls: tuple[str, str], request_: dict[str, Any]) -> None:
    without, behind = (ask(url, request_) for url in urls)
    assert without == behind


@pytest.mark.parametrize("name", ["chat", "stream", "raised", "text", "text-stream", "json"])
def test_both_services_say_what_the_policy_adds(urls: tuple[str, str], name: str) -> None:
    for url in urls:
        answer = ask(url, REQUESTS[name])
        assert answer.status == 200 and b"Beware." in answer.body
        assert (b"Swim: shark." in answer.body) == (name == "raised")
        assert (answer.headers.get("x-shoal-depth") == "shallow") == (name == "raised")
