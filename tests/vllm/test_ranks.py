"""A Shoal model over two processes of vLLM (tensor parallel), as a replica runs it; and what is told when one of them dies."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.api.serve_args import ServeArgs
from shoal.engine.events import Token
from shoal.errors import ConfigError, EngineDeadError
from shoal.vllm_plugin.start import start

RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
PROMPTS = [random.Random(n).choices(range(20, 270), k=n) for n in (5, 33, 200)]  # tokens; sparse from 32 on
SAMPLING = Sampling(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


def configured(directory: Path, **given: Any) -> ServeArgs:
    return ServeArgs(
        model=str(directory), engine="vllm", max_batch=4, threads=1,
        vllm={"kv_cache_memory_bytes": 2**26, "block_size": 16, "max_num_batched_tokens": 64, **given},
    )  # fmt: skip


@pytest.mark.timeout(180)
def test_two_ranks_give_our_engine_s_tokens_and_the_death_of_one_is_told_as_503(directory: Path, model: Model) -> None:
    args = configured(directory, **RANKS)
    expected = Engine(model).generate([Request(prompt, SAMPLING, depth="full") for prompt in PROMPTS])

    async def answer(engine: Any, prompt: list[int]) -> list[Token]:
        request = Request(prompt, SAMPLING, depth="full")
        return [e async for events in engine.batches(request) for e in events if isinstance(e, Token)]

    async def all_of_it() -> None:
        engine = await asyncio.to_thread(start, str(directory), args.served(str(directory)), args)
        try:
            for ours, theirs in zip(
                expected, await asyncio.gather(*(answer(engine, prompt) for prompt in PROMPTS)), strict=True
            ):
                for one, other in zip(ours.logprobs, theirs, strict=True):
                    if one.top[0][1] - one.top[1][1] < 1e-3:
                        break
                    assert other.logprob is not None
                    assert other.token == one.token
                    assert abs(other.logprob.logprob - one.logprob) < 1e-4
            await engine.check_health()
            workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("VLLM::Worker")]
            assert len(workers) == 2
            workers[1].send_signal(signal.SIGKILL)
            for _ in range(2):  # the request that finds it dead, and the next one
                with pytest.raises(EngineDeadError, match="the vLLM process ended: try again") as told:
                    async with asyncio.timeout(60):
                        while True:
                            await answer(engine, PROMPTS[0])
                assert told.value.status == 503
            with pytest.raises(EngineDeadError):
                await engine.check_health()
        finally:
            await engine.close()

    asyncio.run(all_of_it())


def test_an_engine_that_does_not_start_is_told_in_one_line(directory: Path) -> None:
    args = configured(directory, max_model_len=100_000)
    with pytest.raises(ConfigError, match=r"vLLM does not start with .*max_model_len \(100000\)") as told:
        start(str(directory), args.served(str(directory)), args)
    assert "\n" not in str(told.value)
