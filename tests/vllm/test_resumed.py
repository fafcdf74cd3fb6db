"""An answer whose replica was lost goes on at another as if nothing had happened, whatever it asks for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from shoal import Model, Request, Sampling
from shoal.api.served import ServedModel
from shoal.engine.events import Event, Finished, Guide, Token
from shoal.errors import EngineDeadError as OurDeadError
from shoal.errors import GenerationError
from shoal.vllm_plugin.counts import Counts
from shoal.vllm_plugin.options import engine_args
from shoal.vllm_plugin.serving import VllmEngine, sampling_params

PROMPT = "How deep is the sea?"
OBJECT = json.dumps(
    {"type": "object", "properties": {"depth": {"type": "integer", "maximum": 99}}, "required": ["depth"]}
)
CASES = {
    "greedy": {"temperature": 0},
    "guided": {"temperature": 0, "guided": Guide("regex", "(red|green|blue){6}")},
    "drawn by a schema": {"seed": 5, "guided": Guide("json_schema", OBJECT)},
    "presence": {"temperature": 0, "presence_penalty": 2.0},
    "repetition": {"seed": 7, "repetition_penalty": 1.5},
    "logprobs of the prompt": {"temperature": 0, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def engine(model: Model, directory: Path, loop: asyncio.AbstractEventLoop) -> Iterator[VllmEngine]:
    served = ServedModel("fish", model.config, model.tokenizer)
    args = engine_args(
        str(directory),
        {"hf_overrides": {"depth": "full"}, "enforce_eager": True, "kv_cache_memory_bytes": 2**27},
        max_batch=4, threads=1, shoal=True,
    )  # fmt: skip

    async def made() -> VllmEngine:
        return VllmEngine(served, args, layers=model.config.layers, max_queue=4)

    engine = loop.run_until_complete(made())
    yield engine
    loop.run_until_complete(engine.close())


def ran(loop: asyncio.AbstractEventLoop, engine: VllmEngine, request: Request) -> tuple[list[Token], Finished]:
    async def collect() -> list[Event]:
        return [event async for events in engine.batches(request) for event in events]

    *tokens, end = loop.run_until_complete(asyncio.wait_for(collect(), 120))
    assert isinstance(end, Finished)
    return [token for token in tokens if isinstance(token, Token)], end


def request(sampling: dict[str, Any], name: str) -> Request:
    return Request(PROMPT, Sampling(**{"max_tokens": 24, **sampling}), id=name, depth="full")


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_to_the_same_answer(loop: asyncio.AbstractEventLoop, engine: VllmEngine, name: str) -> None:
    asked = request(CASES[name], name)
    tokens, end = ran(loop, engine, asked)
    assert len(tokens) > 4
    for told in (1, len(tokens) // 2, len(tokens) - 1):
        rest = asked.after([token.token for token in tokens[:told]], tokens[told - 1])
        again, ended = ran(loop, engine, rest)
        assert [token.token for token in again] == [token.token for token in tokens[told:]], told
        assert "".join(token.text for token in again) + ended.text == "".join(t.text for t in tokens[told:]) + end.text
        assert (ended.reason, ended.completion_tokens) == (end.reason, end.completion_tokens)
        assert ended.prompt_tokens == end.prompt_tokens >= ended.cached_tokens
        assert [one and one.token for one in ended.prompt_logprobs] == [
            one and one.token for one in end.prompt_logprobs
        ]


def test_the_rest_of_an_answer_has_draws_of_its_own() -> None:
    """vLLM begins to draw at the first token that it generates: one seed would give the first draws twice."""
    seeds = {sampling_params(Sampling(seed=3, max_tokens=99), told).seed for told in range(50)}
    assert len(seeds) == 50 and 3 in seeds and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("least", [0, 7, 8, 9])
def test_a_stop_string_ends_it_where_it_would_have(
    loop: asyncio.AbstractEventLoop, engine: VllmEngine, least: int
) -> None:
    """`min_tokens` counts the tokens that the lost replica gave."""
    greedy = {"temperature": 0, "ignore_eos": True}
    whole, _ = ran(loop, engine, request(greedy, "whole"))
    shown = next(token.text for token in whole[7:] if re.fullmatch(r"[ -~]", token.text))
    asked = request({**greedy, "stop": (shown,), "min_tokens": least}, "stopped")
    tokens, end = ran(loop, engine, asked)
    for told in range(1, len(tokens) + 1):
        again, ended = ran(loop, engine, asked.after([token.token for token in tokens[:told]], tokens[told - 1]))
        assert [token.token for token in again] == [token.token for token in tokens[told:]], told
        assert (ended.reason, ended.completion_tokens) == (end.reason, len(tokens)), told


def test_a_stop_string_in_what_is_generated_again_ends_it(loop: asyncio.AbstractEventLoop, engine: VllmEngine) -> None:
    asked = {**CASES["guided"], "stop": ("d", "n")}
    tokens, end = ran(loop, engine, request(asked, "stopped"))
    assert end.reason == "stop" and len(tokens) < 24
    again, ended = ran(loop, engine, request(asked, "again").after([each.token for each in tokens], tokens[-1]))
    assert (again, ended.reason, ended.completion_tokens) == ([], "stop", len(tokens))


@pytest.mark.parametrize("before", [True, False])
def test_a_request_is_told_whether_vllm_ended_with_it(model: Model, before: bool) -> None:
    """`taken` is what failover counts: a request that ends two engines goes to no third."""

    class Dead:
        errored = before

        async def generate(self, *given: Any, **more: Any) -> Any:
            raise EngineDeadError
            yield None

    engine = object.__new__(VllmEngine)
    engine._served, engine._all, engine._per_request = ServedModel("fish", model.config, model.tokenizer), 8, False
    engine._most, engine._live, engine._counts, engine._context = 1, set(), Counts(), 1024
    engine._llm = Dead()  # type: ignore[assignment]

    async def answer() -> None:
        async for _ in engine.batches(request({}, "dead")):
            pass

    with pytest.raises(OurDeadError, match="the vLLM process ended") as caught:
        asyncio.run(answer())
    assert caught.value.taken is not before and not engine._live


def test_a_whole_answer_ends_and_another_one_is_no_rest(loop: asyncio.AbstractEventLoop, engine: VllmEngine) -> None:
    asked = request({"temperature": 0, "ignore_eos": True}, "whole")
    tokens, _ = ran(loop, engine, asked)
    rest, end = ran(loop, engine, asked.after([token.token for token in tokens], tokens[-1]))
    assert (rest, end.reason, end.completion_tokens) == ([], "length", 24)
    guided = request(CASES["guided"], "guided")
    with pytest.raises(GenerationError, match="send the request again"):
        ran(loop, engine, guided.after([1, 2, 3], tokens[0]))
