"""Captured rows of requests over HTTP: what they say, of whom, and that they hold no text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.api.app import build_app
from shoal.api.capture import CaptureArgs
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.api.trial import Trial
from shoal.engine.events import Finished, Signals
from shoal.errors import GenerationError
from shoal.loop.canary_state import Canary
from shoal.loop.capture import Capture, subject
from tests.canaries import seen

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools
Connect = Callable[..., httpx.AsyncClient]

SECRET = "the sea is full of herring"
CHAT = {"model": "fish", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 9}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "capture"


def rows(folder: Path) -> list[dict[str, Any]]:
    return Capture(folder).rows().to_pylist()


async def test_each_route_that_generates_leaves_one_row(connect: Connect, folder: Path) -> None:
    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"model": "fish", "prompt": SECRET, "max_tokens": 9},
        "/v1/responses": {"model": "fish", "input": SECRET, "max_output_tokens": 9, "store": False},
        "/v1/messages": {"model": "fish", "messages": CHAT["messages"], "max_tokens": 9},
    }
    async with connect(capture=CaptureArgs(str(folder))) as http:
        for path, body in bodies.items():
            whole = (await http.post(path, json=body)).raise_for_status().json()
            found = rows(folder)[-1]
            assert found["id"] == whole["id"] and found["route"] == path and found["status"] == 200
            assert found["answer_tokens"] == 9 and found["prompt_tokens"] > 20 and found["stream"] is False
            assert found["finish"] == "length" and found["layers"] == 4 and found["total_s"] > 0
            streamed = await http.post(path, json={**body, "stream": True})
            streamed.raise_for_status()
            assert rows(folder)[-1]["id"] in streamed.text and rows(folder)[-1]["stream"] is True
        await http.post("/tokenize", json={"prompt": SECRET})
        assert len(rows(folder)) == 2 * len(bodies)
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert SECRET.encode() not in kept and b"herring" not in kept


async def test_nothing_is_kept_unless_it_is_asked_for(connect: Connect, tmp_path: Path) -> None:
    async with connect() as http:
        (await http.post("/v1/chat/completions", json=CHAT)).raise_for_status()
        assert "shoal:capture" not in (await http.get("/metrics")).text
    assert [*tmp_path.iterdir()] == []


async def test_what_was_asked_is_told_in_numbers(connect: Connect, folder: Path, served: Any) -> None:
    tools = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]
    body = {**CHAT, "temperature": 0.5, "quality_tolerance": 0.25, "n": 2, "tools": tools, "user": "u7"}
    async with connect(capture=CaptureArgs(str(folder))) as http:
        (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        (await http.post("/v1/chat/completions", json={**CHAT, "depth": "shallow"})).raise_for_status()
    one, other = rows(folder)
    assert one["temperature"] == 0.5 and one["tolerance"] == 0.25 and one["tools"] == 1 and one["images"] == 0
    assert one["depth_asked"] == "auto" and other["depth_asked"] == "shallow" and other["layers"] == 1
    assert one["answer_tokens"] == 18 and one["max_tokens"] == 9 and one["cached_tokens"] == 6
    assert one["tool_calls"] == 0 and one["tool_valid"] is None and other["tool_calls"] is None
    assert one["prompt_bytes"] > other["prompt_bytes"] == len(SECRET)
    assert one["subject"] == subject(Capture(folder).salt, None, "u7") and other["subject"] is None


async def test_a_call_of_a_tool_is_valid_or_not(connect: Connect, folder: Path, engine: Any) -> None:
    tools = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]
    body = {**CHAT, "max_tokens": 200, "tools": tools}
    async with connect(capture=CaptureArgs(str(folder))) as http:
        engine.reply = '<tool_call>{"name": "track", "arguments": {"order": "7"}}</tool_call>'
        (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        for inner in ('{"name": "trick", "arguments": {}}', '{"name": "track", "arguments": {"order"'):
            engine.reply = f"<tool_call>{inner}</tool_call>"
            (await http.post("/v1/chat/completions", json=body)).raise_for_status()
        (await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 200})).raise_for_status()
    found, *texts, untaught = rows(folder)
    assert (found["tool_calls"], found["tool_valid"], found["finish"]) == (1, True, "tool_calls")
    assert [(one["tool_calls"], one["tool_valid"], one["finish"]) for one in texts] == [(0, False, "stop")] * 2
    assert untaught["tool_valid"] is None, "nothing was offered"


async def test_calls_of_tools_in_answers_of_a_canary_are_told_to_its_trial(engine: Any, served: ServedModel) -> None:
    """Whole and streamed ones, with a capture or without; an answer without a call says nothing."""
    tools = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object"}}}]
    split = Split(engine)
    split.trial = Trial(engine, "2.canary", Canary(2, 3, "now"), split.pace)
    split.trial.takes = lambda conversation: True  # type: ignore[method-assign]
    replies = ('{"name": "track", "arguments": {"order": "7"}}', '{"name": "trick", "arguments": {"order": "7"}}')
    app = build_app([Hosted(served, split)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for engine.reply in (*(f"<tool_call>{reply}</tool_call>" for reply in replies), "no call"):
            for stream in (False, True):  # each of another person: one counts once
                body = {**CHAT, "max_tokens": 200, "tools": tools, "stream": stream, "user": f"{engine.reply} {stream}"}
                (await http.post("/v1/chat/completions", json=body)).raise_for_status()
    assert seen(split.trial.evidence, "canary") == (6, 0)
    assert seen(split.trial.evidence, "canary", "wrong") == (4, 2)


async def test_what_the_engine_says_of_itself_is_kept(connect: Connect, folder: Path, engine: Any) -> None:
    told = Signals(1.5, (0.5, 0.25), 0.125, 2.0, 1.0, 3.0, 4)
    engine.ends = Finished("x", "stop", "", 4, 12, 3, 5, 0.5, signals=told)
    async with connect(capture=CaptureArgs(str(folder))) as http:
        (await http.post("/v1/chat/completions", json={**CHAT, "n": 2})).raise_for_status()
    found = rows(folder)[0]
    assert found["prompt_nll"] == 1.5 and found["predicted_gaps"] == [0.5, 0.25] and found["router_bound"] == 0.125
    assert found["router_distance"] == 2.0 and found["answer_nll"] == 1.0 and found["answer_nll_max"] == 3.0
    assert found["drafts_accepted"] == 8 and found["queue_s"] == 0.5 and found["finish"] == "stop"


@pytest.mark.parametrize(
    ("body", "raises", "status", "error"),
    [
        ({**CHAT, "temperature": -1}, None, 400, "invalid_request_error"),
        ({**CHAT, "model": "whale"}, None, 404, "model_not_found"),
        (CHAT, GenerationError("x"), 500, "generation_failed"),
    ],
)
async def test_a_request_that_failed_leaves_a_row(
    connect: Connect, folder: Path, engine: Any, body: Any, raises: Exception, status: int, error: str
) -> None:
    engine.raises = raises
    async with connect(capture=CaptureArgs(str(folder))) as http:
        assert (await http.post("/v1/chat/completions", json=body)).status_code == status
    (found,) = rows(folder)
    assert (found["status"], found["error"]) == (status, error)
    assert (found["prompt_tokens"] is not None) == (status == 500)


async def test_a_client_that_leaves_leaves_a_row(connect: Connect, folder: Path, engine: Any) -> None:
    engine.hangs_after = 3
    async with connect(capture=CaptureArgs(str(folder))) as http:
        asked = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
        while not engine.open:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait([asked])
        while engine.open:
            await asyncio.sleep(0.01)
    (found,) = rows(folder)
    assert found["status"] == 499 and found["finish"] is None


async def test_turns_of_one_conversation_are_one(connect: Connect, folder: Path) -> None:
    first = CHAT["messages"]
    later = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]
    chats = [first, later, [{"role": "user", "content": "Hello"}]]
    async with connect(capture=CaptureArgs(str(folder))) as http:
        for user in ("a", "b"):
            for chat in chats:
                await http.post("/v1/chat/completions", json={**CHAT, "messages": chat, "user": user})
        await http.post("/v1/messages", json={"model": "fish", "messages": later, "max_tokens": 3})
    found = [row["conversation"] for row in rows(folder)]
    assert found[0] == found[1] and found[3] == found[4] and len(set(found)) == 5 and None not in found


async def test_the_name_of_a_slice_holds_nobody_s_words(connect: Connect, folder: Path) -> None:
    async with connect(capture=CaptureArgs(str(folder))) as http:
        for name in ("orders of jo@sea.com", "w" * 512, "\x1b]0;calm\x07a\nAlarm: \u202eb"):
            (await http.post("/v1/chat/completions", json={**CHAT, "metadata": {"workload": name}})).raise_for_status()
    assert [row["slice"] for row in rows(folder)] == ["orders of [email]", "w" * 64, "]0;calma Alarm: b"]
