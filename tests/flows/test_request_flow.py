"""A chat request, all the way down and up: openai client -> HTTP -> routes -> engine -> events -> SSE -> openai client.

The real engine on random weights of the `test` preset, a real socket, no Ray.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from shoal import Model
from shoal.inputs.chat import encode_chat
from tests.flows.conftest import KEY, Service

MESSAGES: list[Any] = [{"role": "user", "content": "How deep is the sea?"}]


def test_greedy_answers_are_the_model_s_own(service: Service, client: openai.OpenAI) -> None:
    model = service.model
    prompt = encode_chat(MESSAGES, model.tokenizer, model.config, template=model.chat_template)
    for depth in ("shallow", "full"):
        expected = model.tokenizer.decode(model.generate_naive(prompt, 24, depth=depth))
        answer = client.chat.completions.create(
            model="fish", messages=MESSAGES, temperature=0, max_tokens=24, extra_body={"depth": depth}
        )
        assert answer.choices[0].message.content == expected
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt.ids)
        assert answer.usage.model_extra == {"depth": depth}


def test_an_image_changes_the_answer(client: openai.OpenAI) -> None:
    def ask(colour: str) -> tuple[str | None, float]:
        buffer = io.BytesIO()
        Image.new("RGB", (12, 12), colour).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "which colour?"}]
        messages: list[Any] = [{"role": "user", "content": parts}]
        answer = client.chat.completions.create(
            model="fish", messages=messages, temperature=0, max_tokens=4, logprobs=True
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        return answer.choices[0].message.content, logprobs.content[0].logprob

    # the second time out of the prefix cache: equal up to fp32 rounding
    (text, logprob), again = ask("red"), ask("red")
    assert again == (text, pytest.approx(logprob, abs=1e-5))
    assert ask("blue")[1] != pytest.approx(logprob, abs=1e-3)


def test_completions_by_ids_n_and_logprobs(service: Service, client: openai.OpenAI) -> None:
    tokenizer = service.model.tokenizer
    prompts = [tokenizer.encode("def f("), tokenizer.encode("the sea")]
    answer = client.completions.create(model="fish", prompt=prompts, n=2, seed=1, max_tokens=5, logprobs=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.top_logprobs is not None
        assert logprobs.tokens is not None
        for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
            assert token in top and len(top) in (3, 4), (
                "the token itself is told where it is none of the three likeliest"
            )
    again = client.completions.create(model="fish", prompt=prompts[1], seed=1, max_tokens=5)
    assert again.choices[0].text == answer.choices[2].text  # an answer does not depend on its batch mates


def test_a_stop_string_ends_the_answer_and_is_not_in_it(service: Service, client: openai.OpenAI) -> None:
    free = client.completions.create(model="fish", prompt="abc", temperature=0, max_tokens=24).choices[0].text
    stop = free[3:6]
    answer = client.completions.create(model="fish", prompt="abc", temperature=0, max_tokens=24, stop=stop).choices[0]
    assert (answer.text, answer.finish_reason) == (free[: free.index(stop)], "stop")


def test_overload_gives_only_200_and_429_and_then_serves_on(service: Service, client: openai.OpenAI) -> None:
    async def burst() -> list[int]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60, limits=limits) as http:
            body = {"model": "fish", "prompt": "x", "max_tokens": 40, "ignore_eos": True}
            replies = await asyncio.gather(*[http.post(f"{service.url}/v1/completions", json=body) for _ in range(40)])
        return [reply.status_code for reply in replies]

    statuses = asyncio.run(burst())
    assert set(statuses) == {200, 429}
    service.until_idle()
    assert client.completions.create(model="fish", prompt="x", max_tokens=1).choices[0].text is not None


@pytest.mark.drill
def test_the_command_s_switches_reach_the_service(tmp_path: Path) -> None:
    Model.from_preset("test", seed=1).save(tmp_path / "model")
    (tmp_path / "keys").write_text("k name=kate requests=3\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "shoal.cli", "serve", "--no-ray", "--no-ui", "--no-metrics", "--seconds", "0.001"]
    command += ["--model", str(tmp_path / "model"), "--name", "fish,pike", "--api-keys", str(tmp_path / "keys")]
    command += ["--cors", "https://a.example", "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline().startswith(f"API http://127.0.0.1:{port}/v1")
            headers = {"Authorization": "Bearer k", "Origin": "https://a.example"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                assert http.get("/metrics").status_code == 404
                assert http.get("/v1/models").status_code == 401
                listed = http.get("/v1/models", headers=headers)
                assert [card["id"] for card in listed.json()["data"]] == ["fish", "pike"]
                assert listed.headers["access-control-allow-origin"] == "https://a.example"
                body = {"model": "pike", "prompt": "secret", "max_tokens": 300, "ignore_eos": True}
                statuses = [http.post("/v1/completions", json=body, headers=headers).status_code for _ in range(3)]
                assert statuses == [408, 408, 429]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stdout.read() == "The service has stopped.\n"
            lines = process.stderr.read()
            assert "secret" not in lines
            said = [json.loads(line) for line in lines.splitlines()]
            assert [(line["status"], line.get("key")) for line in said] == [
                (404, None), (401, None), (200, "kate"), (408, "kate"), (408, "kate"), (429, "kate"),
            ]  # fmt: skip
        finally:
            process.kill()
