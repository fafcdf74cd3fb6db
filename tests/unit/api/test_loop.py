"""The event loop under the largest requests that are allowed: nobody else waits long for his turn.

What a callback of the loop takes is counted in seconds of the CPU, which a busy machine does not lengthen much; without the
collector of garbage, which other tests have given much to do.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from shoal import presets
from shoal.api.app import build_app
from shoal.api.capture import CaptureArgs
from shoal.api.limits import Limits
from shoal.api.middleware import OPEN_PATHS
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Event, Finished, Request, Token, TokenLogprob
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio

MOST_SECONDS = 0.05  # that the loop may be kept by one callback
CONTEXT, WIDTH = 2**14, 4096
TOKENS = 64  # of an answer
LIMITS = Limits()
TOP = tuple((token, -0.5 - token / 100) for token in range(70, 90))


class Large(Scripted):
    """Its answers are `TOKENS` long, and of its vectors each has `WIDTH` numbers."""

    async def batches(self, request: Request) -> AsyncIterator[list[Event]]:
        assert isinstance(request.prompt, Encoded)
        entry = None if request.sampling.logprobs is None else TokenLogprob(70, -0.5, TOP)
        known = () if request.sampling.prompt_logprobs is None else (TokenLogprob(70, -0.25, TOP),)
        for at in range(0, TOKENS, 8):
            await asyncio.sleep(0)
            ready: list[Event] = [Token(request.id, 70, "a", entry, 4)] * 8
            if at == TOKENS - 8:
                length = len(request.prompt.ids)
                prompt = (None, *known * (length - 1)) if known else ()
                ready.append(
                    Finished(request.id, "stop", "", 4, length, 0, TOKENS, 0.0, 0.1, 0.2, prompt_logprobs=prompt)
                )
            yield ready

    async def embed(self, prompts: list[list[int]], *given: Any, **more: Any) -> list[list[float]]:
        def work() -> list[list[float]]:
            return [VECTOR[at:].tolist() + VECTOR[:at].tolist() for at in range(len(prompts))]

        return await asyncio.to_thread(work)


VECTOR = np.random.default_rng(1).normal(size=WIDTH)
SCHEMA = {"type": "object", "properties": {f"p{at}": {"type": "string", "description": "d"} for at in range(200)}}
TEXT = {"model": "fish", "prompt": "x" * (CONTEXT - 1000)}
SOME = {"model": "fish", "logprobs": True, "top_logprobs": 20, "n": LIMITS.choices}
TOOLS = [{"type": "function", "name": f"f{at}", "parameters": SCHEMA} for at in range(LIMITS.tools)]
RESPONSE = {"model": "fish", "input": "hi", "tool_choice": "none", "tools": TOOLS}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 15_000_000}}


def said(content: Any, times: int = 1) -> dict[str, Any]:
    return {"model": "fish", "messages": [{"role": "user", "content": content, "name": "n"}] * times}


LARGEST: dict[str, tuple[str, dict[str, Any]]] = {
    "choices": ("/v1/chat/completions", {**said("hi"), **SOME}),
    "choices-stream": ("/v1/chat/completions", {**said("hi"), **SOME, "stream": True}),
    "stored": ("/v1/chat/completions", {**said("hi"), **SOME, "store": True}),
    "parts": ("/v1/chat/completions", said([{"type": "text", "text": ""}] * 40_000)),
    "turns": ("/v1/chat/completions", said("a", LIMITS.messages)),
    "image": ("/v1/chat/completions", said([IMAGE])),
    "texts": ("/v1/completions", {**TEXT, "prompt": "x", "echo": True, "logprobs": 20, "n": LIMITS.choices}),
    "echo": ("/v1/completions", {**TEXT, "echo": True, "logprobs": 20, "return_token_ids": True}),
    "echo-stream": ("/v1/completions", {**TEXT, "echo": True, "logprobs": 20, "stream": True}),
    "prompt-logprobs": ("/v1/completions", {**TEXT, "prompt_logprobs": 20}),
    "ids": ("/v1/completions", {**TEXT, "prompt": [[70] * 16_000] * 32, "return_token_ids": True, "stream": True}),
    "wrong": ("/v1/completions", {**TEXT, "prompt": ["a", *[1] * 2**20]}),
    "tools": ("/v1/responses", RESPONSE),
    "tools-stream": ("/v1/responses", {**RESPONSE, "stream": True}),
    "embeddings": ("/v1/embeddings", {"model": "fish", "input": ["a"] * 512}),
    "base64": ("/v1/embeddings", {"model": "fish", "input": ["a"] * LIMITS.inputs, "encoding_format": "base64"}),
    "score": ("/v1/score", {"model": "fish", "text_1": "a", "text_2": ["a"] * (LIMITS.inputs - 1)}),
    "rerank": ("/v1/rerank", {"model": "fish", "query": "a", "documents": ["a" * 1000] * (LIMITS.inputs - 1)}),
    "tokenize": ("/tokenize", {"prompt": "a" * LIMITS.tokenized}),
    "detokenize": ("/detokenize", {"tokens": [70] * LIMITS.tokenized}),
}


@contextmanager
def watched() -> Iterator[list[tuple[float, str]]]:
    """Seconds of the CPU that callbacks of the loop take, with what they are."""
    run, found = asyncio.Handle._run, list[tuple[float, str]]()

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        if (took := time.thread_time() - began) > 0.01:
            found.append((took, repr(handle)[:500]))

    gc.collect()
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", timed)
        yield found
    gc.enable()


async def post(app: Any, path: str, body: bytes) -> int:
    """The status of the answer, whose bytes nobody puts together."""
    status, sent = 0, False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": ("a", 1), "server": None,
    }  # fmt: skip
    await app(scope, receive, send)
    return status


@pytest.fixture
def app(tmp_path: Path) -> Any:
    model = ServedModel("fish", replace(presets.get("test").model, max_length=CONTEXT), Tokenizer.bytes_only())
    return build_app([Hosted(model, Large(model.tokenizer))], capture=CaptureArgs(str(tmp_path), texts=True))


@pytest.mark.parametrize("name", LARGEST)
async def test_no_request_keeps_the_loop_from_others(app: Any, name: str) -> None:
    path, large = LARGEST[name]
    warm = json.dumps({**said("hi"), "max_tokens": 1}).encode()
    assert await post(app, "/v1/chat/completions", warm) == 200
    body = json.dumps(large).encode()
    assert len(body) <= LIMITS.body_bytes
    with watched() as found:
        status = await asyncio.create_task(post(app, path, body))
        await asyncio.sleep(0)
    assert status == (400 if name in ("wrong", "image") else 200)
    assert max(found, default=(0.0, ""))[0] < MOST_SECONDS, sorted(found, reverse=True)[:3]


@pytest.mark.parametrize("path", [path for path in OPEN_PATHS if path.strip("/") not in ("", "ui", "favicon.ico")])
async def test_nobody_keeps_the_loop_without_a_key(app: Any, path: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        with watched() as found:
            codes = [(await asyncio.create_task(http.get(path))).status_code for _ in range(2)]
            await asyncio.sleep(0)
    assert codes == [200, 200]
    assert max(found, default=(0.0, ""))[0] < MOST_SECONDS, sorted(found, reverse=True)[:3]


@pytest.mark.parametrize("name", ["choices", "texts", "echo", "prompt-logprobs", "tools", "embeddings", "base64"])
async def test_an_answer_in_pieces_is_one_json_of_the_length_that_its_header_says(app: Any, name: str) -> None:
    path, large = LARGEST[name]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        reply = await http.post(path, json=large)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert int(reply.headers["content-length"]) == len(reply.content) > 2**16
    whole = reply.json()
    if name == "choices":
        assert [len(choice["logprobs"]["content"]) for choice in whole["choices"]] == [TOKENS] * LIMITS.choices
        assert all(len(one["top_logprobs"]) == 20 for one in whole["choices"][-1]["logprobs"]["content"])
    elif name in ("texts", "echo"):
        columns, text = whole["choices"][0]["logprobs"], whole["choices"][0]["text"]
        assert len({len(column) for column in columns.values()}) == 1 and columns["text_offset"][-1] == len(text) - 1
    elif name == "prompt-logprobs":
        assert len(whole["choices"][0]["prompt_logprobs"]) == CONTEXT - 1000
    elif name == "tools":
        assert len(whole["tools"]) == LIMITS.tools and whole["tools"][-1]["parameters"] == SCHEMA
    elif name == "embeddings":
        assert [one["index"] for one in whole["data"]] == [*range(512)]
        assert all(one["embedding"] == np.roll(VECTOR, -at).tolist() for at, one in enumerate(whole["data"]))
