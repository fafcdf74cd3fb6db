"""Tokens a second, of answers and of prompts, by precision, batch and depth, beside the peers that were named; the first parts
of `shoal bench decode`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.table import Table

from benchmarks.peers import Peer
from benchmarks.turns import in_turns
from shoal.config import FULL, ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.engine.front import settle
from shoal.evaluate.answering import decode_speed
from shoal.model.model import Model

Rows = list[dict[str, Any]]
PROMPT = 16  # tokens of what is decoded after


@dataclass(frozen=True)
class Bench:
    """What is measured, and how."""

    model: Model  # in fp32
    batches: tuple[int, ...]
    tokens: int  # decoded a request
    prompt: int  # tokens of a prompt, where prompts are measured
    rounds: int
    peers: tuple[Peer, ...] = ()
    trained: bool = False  # not random weights

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @cached_property
    def both(self) -> dict[str, Model]:
        """The model in each precision."""
        return {"fp32": self.model, "int8": self.model.quantized()}

    @cached_property
    def engines(self) -> dict[str, Engine]:
        """One for each precision, whose kernels are there."""
        engines = {label: Engine(model) for label, model in self.both.items()}
        for engine in engines.values():
            decode_speed(engine, 1, 8)
        settle()  # as a server does
        return engines


def speed(bench: Bench) -> tuple[Table, Rows]:
    """Decoding, after prompts of `PROMPT` tokens."""
    runs: dict[tuple[str, int, str], Callable[[], float]] = {}
    depths = dict.fromkeys((FULL, next(iter(bench.config.exit_names))))
    for label, engine in bench.engines.items():
        for depth in depths:
            for batch in bench.batches:
                runs[label, batch, depth] = lambda e=engine, b=batch, d=depth: decode_speed(e, b, bench.tokens, d)  # type: ignore[misc]
    for peer in bench.peers:
        for batch in bench.batches:
            runs[peer.name, batch, FULL] = lambda p=peer, b=batch: (  # type: ignore[misc]
                b * bench.tokens / p.seconds(b, PROMPT, bench.tokens)
            )
    medians = in_turns(runs, bench.rounds)
    beside = {"fp32": "x fp32 full", **{peer.name: f"x {peer.name}" for peer in bench.peers}}
    table = Table("", "batch", "depth", "tokens/s", *beside.values(), title=f"decode, {bench.tokens} tokens a request")
    rows = []
    for (label, batch, depth), found in medians.items():
        ratios = {name: found / medians[name, batch, FULL] for name in beside}
        table.add_row(label, str(batch), depth, f"{found:.1f}", *(f"{ratio:.2f}" for ratio in ratios.values()))
        rows.append({"what": label, "batch": batch, "depth": depth, "tokens_per_s": found, "ratios": ratios})
    return table, rows


def prefill(bench: Bench) -> tuple[Table, Rows]:
    """Prompts of `bench.prompt` tokens, one after the other, each to its first token. No two begin alike, so that none is found
    in a prefix cache."""
    runs: dict[str, Callable[[], float]] = {}
    numbers = itertools.count()
    for label, engine in bench.engines.items():
        runs[label] = lambda e=engine: prefill_speed(e, bench.prompt, numbers)  # type: ignore[misc]
    for peer in bench.peers:
        runs[peer.name] = lambda p=peer: bench.prompt / p.seconds(1, bench.prompt, 1)  # type: ignore[misc]
    medians = in_turns(runs, bench.rounds)
    beside = {"fp32": "x fp32", **{peer.name: f"x {peer.name}" for peer in bench.peers}}
    table = Table("", "tokens/s", *beside.values(), title=f"prefill, a prompt of {bench.prompt} tokens")
    rows = []
    for label, found in medians.items():
        ratios = {name: found / medians[name] for name in beside}
        table.add_row(label, f"{found:.1f}", *(f"{ratio:.2f}" for ratio in ratios.values()))
        rows.append({"what": label, "prompt": bench.prompt, "tokens_per_s": found, "ratios": ratios})
    return table, rows


def prefill_speed(engine: Engine, length: int, numbers: Iterator[int]) -> float:
    """Tokens a second of one prompt of `length` tokens to its first token, by the next of `numbers`."""
    number = next(numbers)
    prompt = [20 + (7 * number + 3 * i) % 200 for i in range(length)]  # as none of `decode_speed` begins
    start = time.perf_counter()
    engine.generate([Request(prompt, Sampling(temperature=0.0, max_tokens=1, ignore_eos=True), depth=FULL)])
    return length / (time.perf_counter() - start)
