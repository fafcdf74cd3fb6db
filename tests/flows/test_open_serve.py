"""A service of an imported model, in a process of its own without Ray: chats, completions, tools and schemas over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal import Model
from shoal.cli import main
from shoal.inputs.chat import encode_chat

DATA = Path(__file__).parents[1] / "data" / "open"
CHAT = [{"role": "user", "content": "What is 12 + 3?<|im_end|>"}]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("open")
    shutil.copytree(DATA / "smollm3", source / "from")
    shutil.copytree(DATA / "tokenizer", source / "from", dirs_exist_ok=True)
    config = source / "from" / "config.json"  # room for what tools are told with
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    options = ["--from", str(source / "from"), "--out", str(source / "model"), "--name", "smol", "--dtype", "float32"]
    assert main(["import", *options]) == 0
    return source / "model"


@pytest.fixture(scope="module")
def url(imported: Path) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "shoal.cli",
        "serve",
        "--no-ray",
        "--no-ui",
        "--model",
        str(imported),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1]
        finally:
            process.kill()


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/{path}", json={"model": "smol", "temperature": 0, **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_chats_and_completions_are_the_models(url: str, imported: Path) -> None:
    model = Model.load(imported)
    ids = encode_chat(CHAT, model.tokenizer, model.config, template=model.chat_template).ids
    told = post(url, "chat/completions", messages=CHAT, max_tokens=12)
    wanted = model.generate_naive(ids, 12)
    assert told["choices"][0]["message"]["content"] == model.tokenizer.decode(wanted)
    assert told["usage"]["prompt_tokens"] == len(ids) and told["usage"]["depth"] == "full"
    again = post(url, "chat/completions", messages=CHAT, max_tokens=12, speculative=4)
    assert again["choices"] == told["choices"]
    text = post(url, "completions", prompt="Hello, 12 fish", max_tokens=8, depth="full")
    assert text["choices"][0]["text"] == model.tokenizer.decode(model.generate_naive("Hello, 12 fish", 8))
    assert text["usage"]["prompt_tokens"] == len(json.loads((DATA / "chats.json").read_text())["text"])


def test_what_a_request_does_not_say_is_as_the_source_wants_it(url: str) -> None:
    """The generation_config.json beside these weights says a temperature of 0.7."""

    def said(**more: Any) -> list[str]:
        body = {"model": "smol", "messages": CHAT, "max_tokens": 8, **more}
        answers = [httpx.post(f"{url}/chat/completions", json={**body, "seed": seed}, timeout=60) for seed in range(4)]
        return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    assert said() == said(temperature=0.7) != said(temperature=1.0)


def test_a_schema_and_a_tool_are_followed(url: str) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    told = post(url, "chat/completions", messages=CHAT, max_tokens=40, response_format=form)
    assert json.loads(told["choices"][0]["message"]["content"])["n"] in (1, 2)
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    called = post(url, "chat/completions", messages=CHAT, max_tokens=80, tools=[tool], tool_choice="required")
    call = called["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "add" and json.loads(call["arguments"])["n"] in (1, 2)


def test_what_it_has_not_is_a_400(url: str) -> None:
    def refused(path: str, **body: Any) -> str:
        answer = httpx.post(f"{url}/{path}", json={"model": "smol", **body}, timeout=60)
        assert answer.status_code == 400, answer.text
        return answer.text

    assert "depth" in refused("chat/completions", messages=CHAT, depth="shallow")
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert "reads no images" in refused("chat/completions", messages=[{"role": "user", "content": picture}])
    models = httpx.get(f"{url}/models", timeout=60).json()["data"]
    assert [card["id"] for card in models] == ["smol"] and models[0]["depths"] == {"full": 5}


def test_quantize_only_rounds_it(imported: Path, tmp_path: Path) -> None:
    assert main(["quantize", "--model", str(imported), "--out", str(tmp_path / "int8"), "--no-train"]) == 0
    rounded = Model.load(tmp_path / "int8", verify=True)
    assert rounded.config.quantization == "w8a8" and rounded.tokenizer.controls is not None
