"""What is counted of a request, where several choices or minutes come together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.api.auth import Bucket

BODY = {"model": "fish", "messages": [{"role": "user", "content": "hi"}], "n": 3}


@pytest.mark.anyio
async def test_a_prompt_of_several_choices_counts_once_and_so_do_its_cached_tokens(
    http: httpx.AsyncClient, engine: Any
) -> None:
    """The scripted engine finds three tokens of each prompt in its cache."""
    usage = (await http.post("/v1/chat/completions", json=BODY)).json()["usage"]
    prompt = len(engine.requests[0].prompt.ids)
    assert len(engine.requests) == 3
    assert usage["prompt_tokens"] == prompt
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["completion_tokens"] == 3 * len(engine.reply.encode())


@pytest.mark.anyio
async def test_two_prompts_count_both(connect: Callable[..., httpx.AsyncClient]) -> None:
    async with connect() as http:
        body = {"model": "fish", "prompt": ["abcd", "efghij"], "n": 2}
        usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    assert usage["prompt_tokens"] == 10
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


def test_a_minute_that_nobody_used_is_not_saved_up_beyond_one() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    now[0] = 3600.0
    assert bucket.state() == (60, 0.0)
    bucket.spend(60)
    assert bucket.state()[0] == 0 and bucket.wait() == pytest.approx(1.0)
    now[0] += 1.0
    assert bucket.wait() == 0
