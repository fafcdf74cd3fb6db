"""POST /v1/chat/completions: the wire behaviour that clients depend on."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from shoal.api.limits import Limits
from shoal.engine.events import Finished
from shoal.errors import DeadlineError, QueueFullError
from shoal.inputs.chat import Encoded

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
BODY = {"model": "fish", "messages": [{"role": "user", "content": "hi"}]}


def events(text: str) -> list[Any]:
    """The payloads of an SSE body; the end mark as the string it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def png(width: int = 12, height: int = 12) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def test_a_whole_answer(http: httpx.AsyncClient, engine: Any) -> None:
    reply = await http.post(URL, json=BODY)
    assert reply.status_code == 200
    assert reply.headers["x-shoal-depth"] == "full"
    answer = reply.json()
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": engine.reply, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    count = len(engine.reply.encode())
    prompt = len(engine.requests[0].prompt.ids)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": count,
        "total_tokens": prompt + count,
        "prompt_tokens_details": {"cached_tokens": 3},
        "depth": "full",
    }


async def test_a_stream_is_role_then_text_then_reason_then_done(http: httpx.AsyncClient, engine: Any) -> None:
    reply = await http.post(URL, json={**BODY, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *middle, last, done = events(reply.text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == engine.reply
    assert {chunk["choices"][0]["finish_reason"] for chunk in [first, *middle]} == {None}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert done == "[DONE]"
    assert all("usage" not in chunk for chunk in [first, *middle, last])
    assert len({chunk["id"] for chunk in [first, *middle, last]}) == 1


async def test_usage_comes_in_a_chunk_without_choices(http: httpx.AsyncClient) -> None:
    whole = (await http.post(URL, json=BODY)).json()
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events((await http.post(URL, json=body)).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"], done) == ([], whole["usage"], "[DONE]")


async def test_text_held_back_for_a_stop_string_arrives_with_the_end(http: httpx.AsyncClient, engine: Any) -> None:
    engine.ends = Finished("x", "stop", "held", depth=4, prompt_tokens=1, completion_tokens=1)
    whole = (await http.post(URL, json=BODY)).json()
    streamed = events((await http.post(URL, json={**BODY, "stream": True})).text)
    assert whole["choices"][0]["message"]["content"] == engine.reply + "held"
    assert streamed[-3]["choices"][0]["delta"] == {"content": "held"}
    assert streamed[-2]["choices"][0]["finish_reason"] == "stop"


async def test_logprobs_have_the_chat_shape_whole_and_streamed(http: httpx.AsyncClient) -> None:
    body = {**BODY, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    content = (await http.post(URL, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["H", "e", "l"]
    assert content[0] == {
        "token": "H", "logprob": -0.5, "bytes": [72],
        "top_logprobs": [{"token": "H", "logprob": -0.5, "bytes": [72]}, {"token": "I", "logprob": -1.5, "bytes": [73]}],
    }  # fmt: skip
    chunks = events((await http.post(URL, json={**body, "stream": True})).text)[:-1]
    streamed = [entry for c in chunks if (lp := c["choices"][0]["logprobs"]) for entry in lp["content"]]
    assert streamed == content


async def test_tokens_that_are_half_a_character_are_reported_by_their_bytes(
    http: httpx.AsyncClient, engine: Any
) -> None:
    engine.reply = "é"
    body = {**BODY, "logprobs": True, "stream": True}
    chunks = events((await http.post(URL, json=body)).text)[1:-2]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "é"]
    tokens = [chunk["choices"][0]["logprobs"]["content"][0]["token"] for chunk in chunks]
    assert tokens == ["bytes:\\xc3", "bytes:\\xa9"]


async def test_n_choices_come_from_seeds_derived_from_the_given_one(http: httpx.AsyncClient, engine: Any) -> None:
    answer = (await http.post(URL, json={**BODY, "n": 3, "seed": 5})).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt.ids)  # the prompt counts once
    engine.requests.clear()
    await http.post(URL, json={**BODY, "n": 3, "seed": 5, "stream": True})
    assert sorted(r.sampling.seed for r in engine.requests) == sorted(seeds)
    engine.requests.clear()
    await http.post(URL, json={**BODY, "n": 2})
    assert [request.sampling.seed for request in engine.requests] == [None, None]


async def test_fields_reach_the_engine(http: httpx.AsyncClient, engine: Any) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "stop": ["a", "bc"], "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"70": -5}, "min_tokens": 2,
        "stop_token_ids": [80], "ignore_eos": True, "max_completion_tokens": 9,
    }  # fmt: skip
    assert (await http.post(URL, json={**BODY, **fields, "quality_tolerance": 0.25})).status_code == 200
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("a", "bc"), (80,), True)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.logit_bias, sampling.min_tokens, sampling.max_tokens) == ({70: -5}, 2, 9)
    assert (request.depth, request.quality_tolerance) == ("auto", 0.25)


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({}, "auto"),
        ({"depth": "shallow"}, "shallow"),
        ({"depth": 2}, 2),
        ({"reasoning_effort": "minimal"}, "shallow"),
        ({"reasoning_effort": "low"}, "shallow"),
        ({"reasoning_effort": "medium"}, "auto"),
        ({"reasoning_effort": "high"}, "full"),
    ],
)
async def test_depth(http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], depth: object) -> None:
    ran = "shallow" if depth == "shallow" else "full"
    reply = await http.post(URL, json={**BODY, **fields})
    assert engine.requests[0].depth == depth
    assert (reply.headers["x-shoal-depth"], reply.json()["usage"]["depth"]) == (ran, ran)


async def test_an_image_reaches_the_engine_as_patches(http: httpx.AsyncClient, engine: Any) -> None:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": png()}}]
    assert (await http.post(URL, json={**BODY, "messages": [{"role": "user", "content": parts}]})).status_code == 200
    prompt = engine.requests[0].prompt
    assert isinstance(prompt, Encoded)
    assert [(image.rows, image.cols) for image in prompt.images] == [(3, 3)]


async def test_developer_is_read_as_system(http: httpx.AsyncClient, engine: Any) -> None:
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "be brief"}, *BODY["messages"]]  # type: ignore[misc]
        await http.post(URL, json={**BODY, "messages": messages})
    assert engine.requests[0].prompt.ids == engine.requests[1].prompt.ids


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "shark"}, 404, "model", "model_not_found"),
        ({"max_tokens": 10_000}, 400, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 999}]}, 400, "messages", "context_length_exceeded"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"temperature": -1}, 400, "temperature", None),
        ({"top_p": -0.1}, 400, "top_p", None),
        ({"top_k": -2}, 400, "top_k", None),
        ({"max_completion_tokens": 10_000}, 400, "max_completion_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", None),
        ({"top_logprobs": 2}, 400, "top_logprobs", None),
        ({"quality_tolerance": -1}, 400, "quality_tolerance", None),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
        ({"depth": "abyss"}, 400, "depth", None),
        ({"depth": 3}, 400, "depth", None),
        ({"depth": "full", "reasoning_effort": "low"}, 400, "depth", None),
        ({"depth": "shallow", "quality_tolerance": 0.1}, 400, "quality_tolerance", None),
        ({"n": 0}, 400, "n", None),
        ({"n": 1000}, 400, "n", None),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", None),
        ({"logit_bias": {"300": 1}}, 400, "logit_bias", None),
        ({"logit_bias": {"30": 101}}, 400, "logit_bias", None),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids", None),
        ({"stop": [""]}, 400, "stop", None),
        ({"stop": ["x"] * 17}, 400, "stop", None),
        ({"stop": ["x", "y" * 1025]}, 400, "stop", None),  # each token would look for all of it
        ({"stop_token_ids": [80] * 1025}, 400, "stop_token_ids", None),  # and among all of them
        ({"logit_bias": {"0" * 20 + "80": 1}}, 400, "logit_bias", None),  # not token 0
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, 400, "messages", None),
    ],
)
async def test_errors_have_openai_s_envelope(
    http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    for stream in (False, True):
        reply = await http.post(URL, json={**BODY, **fields, "stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (status, param, code)
        assert set(error) == {"message", "type", "param", "code"}
    assert engine.requests == []


def bomb(width: int, height: int, data: bytes = b"") -> str:
    """A PNG of a few bytes that says it has so many pixels; `data`: compressed rows, or none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


IMAGES = {
    "url": "http://evil/x.png",
    "file": "file:///x",
    "not-base64": "data:image/png;base64,!!",
    "no-image": "data:image/png;base64,AAAA",
    "svg": "data:image/svg+xml;base64," + base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    "pixels": bomb(2**31 - 1, 2**31 - 1),
    "many-pixels": bomb(4001, 4000),
    "no-rows": bomb(4000, 4000),
    "cut-rows": bomb(99, 99, zlib.compress(bytes(99 * 298))[:-20]),
    "cut": png()[:-60],
    "too-long": "data:image/png;base64," + "A" * (12 * 2**20),
}


@pytest.mark.parametrize("url", IMAGES.values(), ids=IMAGES)
async def test_a_bad_image_or_a_bomb_is_a_400(http: httpx.AsyncClient, engine: Any, url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    reply = await http.post(URL, json={**BODY, "messages": [{"role": "user", "content": parts}]})
    assert (reply.status_code, engine.requests) == (400, [])
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["param"] == "messages"


async def test_too_many_images(connect: Callable[..., httpx.AsyncClient]) -> None:
    parts = [{"type": "image_url", "image_url": {"url": png()}}] * 2
    body = {**BODY, "messages": [{"role": "user", "content": parts}]}
    assert (await connect(limits=Limits(images=1)).post(URL, json=body)).status_code == 400
    assert (await connect(limits=Limits(images=2)).post(URL, json=body)).status_code == 200


async def test_a_full_queue_is_429_with_retry_after_also_for_a_stream(http: httpx.AsyncClient, engine: Any) -> None:
    engine.raises = QueueFullError("the queue is full", do="try again")
    for stream, seconds, told in ((False, None, "1"), (True, 0.2, "1"), (False, 7.3, "8"), (True, 1e6, "60")):
        engine.raises.retry_after = seconds
        reply = await http.post(URL, json={**BODY, "stream": stream})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == told
        assert reply.json()["error"]["code"] == "queue_full"


async def test_an_error_after_the_first_token_is_one_event_and_the_end(http: httpx.AsyncClient, engine: Any) -> None:
    engine.ends = Finished("x", "deadline", error=DeadlineError("out of time", param="deadline", got=600.0))
    reply = await http.post(URL, json={**BODY, "stream": True})
    *_, last = events(reply.text)
    assert reply.status_code == 200
    assert (last["error"]["code"], last["error"]["param"]) == ("deadline_exceeded", None)
    assert "got '600 s'" in last["error"]["message"]
    assert (await http.post(URL, json=BODY)).status_code == 408
    engine.raises = DeadlineError("out of reach", param="deadline")  # as the engine refuses it at once
    late = await http.post(URL, json=BODY)
    assert (late.status_code, late.json()["error"]["param"]) == (408, None)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_bug_in_the_engine_is_a_500_that_gives_nothing_away(
    http: httpx.AsyncClient, engine: Any, n: int
) -> None:
    engine.raises = ZeroDivisionError("secret prompt")
    reply = await http.post(URL, json={**BODY, "n": n})
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert engine.open == 0


async def test_an_engine_that_is_silent_past_the_deadline_is_given_up(
    connect: Callable[..., httpx.AsyncClient], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.client.GRACE_SECONDS", 0.01)
    engine.hangs_after = 0
    reply = await connect(limits=Limits(seconds=0.05)).post(URL, json=BODY)
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert engine.open == 0
