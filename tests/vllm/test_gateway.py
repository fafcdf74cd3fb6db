"""vLLM behind our gateway on Ray Serve: a Shoal model and a Llama-shaped checkpoint, side by side in one application."""

from __future__ import annotations

import asyncio
import base64
import io
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from shoal import Engine, Model, Request, Sampling
from shoal.api.fresh import EVERY_SECONDS
from shoal.api.serve_args import ServeArgs
from shoal.inputs.chat import encode_chat
from shoal.on_ray import serve
from shoal.on_ray.resources import local_ray
from shoal.on_ray.serve_config import serve_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

MESSAGES: list[Any] = [{"role": "user", "content": "How deep is the sea?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def url(directory: Path, llama: Path) -> Iterator[str]:
    args = ServeArgs(
        models={"fish": str(directory), "llama": str(llama)}, engine="vllm", max_batch=2, max_queue=2, cpus=0.5, threads=1,
        vllm={"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**27},
    )  # fmt: skip
    with local_ray():
        yield serve.run(serve_config(args, port=free_port()), blocking=False, seconds=300)
        serve.stop()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def metric(url: str, model: str, name: str) -> float:
    time.sleep(EVERY_SECONDS)  # what is told is as old as that
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    mine = [line for line in lines if line.startswith(f"shoal:{name}{{") and f'model_name="{model}"' in line]
    return sum(float(line.split()[-1]) for line in mine)


def with_an_image() -> list[Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in the sea?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("depth", ["shallow", "full", "auto"])
def test_a_shoal_model_answers_as_in_our_engine(client: openai.OpenAI, model: Model, depth: str, image: bool) -> None:
    """Depth "auto" is decided before vLLM sees the request, by the model's own router."""
    messages = with_an_image() if image else MESSAGES
    prompt = encode_chat(messages, model.tokenizer, model.config)
    (expected,) = Engine(model).generate(
        [Request(prompt, Sampling(temperature=0, max_tokens=12, logprobs=2), depth=depth)]
    )
    answer = client.chat.completions.create(
        model="fish", messages=messages, logprobs=True, top_logprobs=2, extra_body={"depth": depth}, **GREEDY
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    for ours, theirs in zip(expected.logprobs, found.content, strict=False):
        if ours.top[0][1] - ours.top[1][1] < 1e-3:
            break
        assert bytes(theirs.bytes or []) == model.tokenizer.token_bytes(ours.token)
        assert abs(theirs.logprob - ours.logprob) < 1e-4
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt.ids)
    assert answer.usage.model_extra and answer.usage.model_extra["depth"] == ("middle" if depth == "auto" else depth)


def test_a_llama_answers_as_in_transformers(client: openai.OpenAI, llama: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("[user]How deep is the sea?[assistant]", add_special_tokens=False).input_ids
    ids = [tokenizer.bos_token_id, *ids]
    reference = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    answer = client.chat.completions.create(model="llama", messages=MESSAGES, logprobs=True, top_logprobs=1, **GREEDY)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    found = answer.choices[0].logprobs
    assert found is not None and found.content
    for entry in found.content:
        with torch.no_grad():
            scores = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = scores.topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            break
        token = int(best.indices[0])
        assert bytes(entry.bytes or []).decode(errors="replace") == tokenizer.decode([token])
        assert abs(entry.logprob - float(best.values[0])) < 1e-3
        ids.append(token)


@pytest.mark.parametrize("name", ["fish", "llama"])
def test_a_stream_is_the_whole_answer_and_ends_at_a_stop_string(client: openai.OpenAI, name: str) -> None:
    whole = client.completions.create(model=name, prompt="The sea is", **GREEDY).choices[0].text
    chunks = list(client.completions.create(model=name, prompt="The sea is", stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 2
    stop = whole[3:5]
    ended = client.completions.create(model=name, prompt="The sea is", stop=[stop], **GREEDY).choices[0]
    assert (ended.text, ended.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_choices_of_a_guided_answer_are_the_only_ones(client: openai.OpenAI) -> None:
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    for name in ("fish", "llama"):
        answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=8, extra_body=body)
        assert answer.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "llama", "depth": "shallow"}, "depth"),
        ({"model": "llama", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
         "messages"),
        ({"model": "fish", "speculative": 4}, "speculative"),
        ({"model": "llama", "max_tokens": 100_000}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_answered_400_by_name(url: str, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4, **body}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("name", ["fish", "llama"])
def test_a_client_that_leaves_ends_its_request(url: str, name: str) -> None:
    body = {"model": name, "prompt": "a", "max_tokens": 480, "ignore_eos": True, "stream": True}
    tokens, cancelled = (metric(url, name, of) for of in ("generation_tokens_total", "requests_cancelled_total"))
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        assert next(answer.iter_lines())
    until(lambda: metric(url, name, "requests_cancelled_total") == cancelled + 1)
    assert metric(url, name, "num_requests_running") == 0
    assert 0 < metric(url, name, "generation_tokens_total") - tokens < 480


def test_more_than_fit_are_answered_429_and_the_others_whole(url: str) -> None:
    """Two run, two wait close to the engine, two in the gateway; of sixteen some are refused and none is lost."""

    async def ask(client: httpx.AsyncClient) -> int:
        body = {"model": "llama", "prompt": "b", "max_tokens": 120, "ignore_eos": True}
        answer = await client.post(f"{url}/v1/completions", json=body)
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
        else:
            assert answer.json()["usage"]["completion_tokens"] == 120
        return answer.status_code

    async def all_at_once() -> list[int]:
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(ask(client) for _ in range(16)))

    found = set[int]()
    until(lambda: found.update(asyncio.run(all_at_once())) or found >= {200, 429})
    assert found == {200, 429}


def test_a_killed_engine_process_is_replaced_and_the_stream_goes_on(url: str, client: openai.OpenAI) -> None:
    """The running request continues at the replica that takes its place; greedy, so the answer is the whole one. Until then the
    service names its model as not ready, and the other model answers."""
    asked: dict[str, Any] = {"model": "llama", "prompt": "The sea", "temperature": 0, "max_tokens": 200,
                             "extra_body": {"ignore_eos": True}}  # fmt: skip
    whole = client.completions.create(**asked).choices[0].text
    chunks = client.completions.create(stream=True, **asked)
    text = next(chunks).choices[0].text
    (engine,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("VLLM::EngineCor") and "EngineReplica-llama" in process.parent().cmdline()[0]
    )
    engine.send_signal(signal.SIGKILL)
    while (told := httpx.get(f"{url}/ready", timeout=30)).json().get("not_ready") != ["llama"]:
        time.sleep(0.1)
    assert (told.status_code, told.json()["status"]) == (200, "ready")
    assert client.completions.create(model="fish", prompt="The sea", **GREEDY).usage.completion_tokens > 0
    text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole
    until(lambda: httpx.get(f"{url}/ready", timeout=30).json() == {"status": "ready"}, 120)
