"""vLLM's own server serves a model directory: found by the entry point, in processes of its own, text in and text out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Completion
from shoal.inputs.chat import encode_chat

pytestmark = pytest.mark.timeout(240)
MESSAGES = [{"role": "user", "content": "How deep is the sea?"}]


@pytest.fixture(scope="module")
def url(directory: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(directory),
        "--served-model-name",
        "fish",
    ]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, env=os.environ.copy()) as process:
        try:
            until = time.monotonic() + 200
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    assert process.poll() is None and time.monotonic() < until
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def test_it_completes_and_chats_as_our_engine_does(url: str, model: Model) -> None:
    sampling = Sampling(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    prompt = encode_chat(MESSAGES, model.tokenizer, model.config)
    text, chat = Engine(model).generate(
        [Request("The sea is", sampling, depth="full"), Request(prompt, sampling, depth="full")]
    )
    body = {"model": "fish", "temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json={**body, "prompt": "The sea is"}, timeout=60).json()
    assert answer["choices"][0]["prompt_token_ids"] == model.tokenizer.encode("The sea is")
    same(text, answer["choices"][0]["token_ids"])
    answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "messages": MESSAGES}, timeout=60).json()
    assert answer["prompt_token_ids"] == prompt.ids, "its chat template gives the tokens of ours"
    same(chat, answer["choices"][0]["token_ids"])


def same(ours: Completion, theirs: list[int]) -> None:
    """Token for token, up to a place where the two likeliest are a rounding apart."""
    sure = takewhile(lambda entry: entry.top[0][1] - entry.top[1][1] > 1e-3, ours.logprobs)
    expected = [entry.token for entry in sure]
    assert len(expected) > 6, "the check must not be empty"
    assert theirs[: len(expected)] == expected
