"""What a model's own drafts gain it at batch 1, without changing a token: the part `drafts` of `shoal bench decode --model`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from rich.table import Table

from shoal.bench.speed import Bench, Rows
from shoal.bench.turns import in_turns
from shoal.config import FULL
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import UsageError
from shoal.inputs.chat import encode_chat

AHEAD = (0, 1, 2, 4)  # drafts a step
QUESTIONS = ("What is the capital of France?", "Give me three tips for a good night's sleep.", "Why is the sky blue?")


def drafts_of(bench: Bench) -> tuple[Table, Rows]:
    """Tokens a second of greedy answers to `QUESTIONS`, one after the other, without drafts and with some; by precision. Raises
    UsageError for a model that has no early exit to draft at."""
    if len(bench.config.exits) == 1:
        raise UsageError("--parts", got="drafts", allowed="others, of a model without early exits; see `shoal adapt`")
    engines = {
        (label, ahead): Engine(model, speculative=ahead, speculative_max_batch=1 if ahead else None)
        for label, model in bench.both.items()
        for ahead in AHEAD
    }
    said: dict[tuple[str, int], list[list[int]]] = {}
    runs: dict[tuple[str, int], Callable[[], float]] = {
        key: partial(_answers, engine, bench.tokens, said, key) for key, engine in engines.items()
    }
    medians = in_turns(runs, bench.rounds)
    title = f"drafts of the exit after {bench.config.exits[0]} of {bench.config.layers} layers, batch 1"
    table = Table("", "drafts", "tokens/s", "ratio", "accepted", "same tokens", title=title)
    rows = []
    for (label, ahead), found in medians.items():
        metrics = engines[label, ahead].scheduler.metrics
        stood = metrics.drafts_accepted / metrics.drafts if metrics.drafts else 0.0
        ratio, same = found / medians[label, 0], said[label, ahead] == said[label, 0]
        table.add_row(label, str(ahead), f"{found:.1f}", f"{ratio:.2f}", f"{stood:.0%}", "yes" if same else "no")
        rows.append(
            {"what": label, "drafts": ahead, "tokens_per_s": found, "ratio": ratio, "accepted": stood, "same": same}
        )
    return table, rows


def _answers(engine: Engine, tokens: int, said: dict[tuple[str, int], list[list[int]]], key: tuple[str, int]) -> float:
    """Tokens a second, prefill included; the answers go to `said`."""
    model = engine.model
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [
        encode_chat(
            [{"role": "user", "content": text}], model.tokenizer, model.config, template=model.chat_template, answers=False
        ).ids
        for text in QUESTIONS
    ]  # fmt: skip
    start = time.perf_counter()
    done = [engine.generate([Request(prompt, sampling, depth=FULL)])[0] for prompt in prompts]
    spent = time.perf_counter() - start
    said[key] = [answer.tokens for answer in done]
    return sum(len(answer.tokens) for answer in done) / spent
