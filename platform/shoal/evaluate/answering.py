"""Answers by the engine, as they are served, and how fast it is; which machine that was."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch

from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.evaluate.measures import Answer
from shoal.inputs.chat import Encoded
from shoal.machine import cores
from shoal.model.model import Model


def generate(engine: Engine, prompts: Sequence[Encoded], max_tokens: int, depth: str) -> list[Answer]:
    """Greedy answers by the engine, in the prompts' order."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    done = engine.generate([Request(prompt, sampling, depth=depth) for prompt in prompts])
    return [Answer(c.text, len(c.tokens), c.depth, len(p.ids)) for c, p in zip(done, prompts, strict=True)]


def interleaved_speed(models: dict[str, Model], *, tokens: int, rounds: int = 3) -> dict[str, dict[int, list[float]]]:
    """Decoded tokens per second at batch 1 and 8 in each of `rounds`, rising (the models in turns so that drift hits all)."""
    engines = {label: Engine(model) for label, model in models.items()}
    found: dict[str, dict[int, list[float]]] = {label: {1: [], 8: []} for label in models}
    for _ in range(rounds):
        for label, engine in engines.items():
            for batch in (1, 8):
                found[label][batch].append(decode_speed(engine, batch, tokens))
    return {label: {b: sorted(v) for b, v in by.items()} for label, by in found.items()}


def decode_speed(
    engine: Engine,
    batch: int,
    tokens: int,
    depth: str | int = "full",
    sampling: Sampling | None = None,
    adapters: Sequence[str] = ("",),
) -> float:
    """Tokens per second over a run of `tokens` tokens for each of `batch` requests, prefill of 16 tokens included; greedy
    unless `sampling` is given, with `adapters` by turns."""
    sampling = sampling or Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [[20 + (7 * i + j) % 200 for j in range(16)] for i in range(batch)]
    start = time.perf_counter()
    done = engine.generate(
        [
            Request(prompt, sampling, depth=depth, adapter=adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        ]
    )
    return sum(len(c.tokens) for c in done) / (time.perf_counter() - start)


def gates(model: Model) -> list[dict[str, Any]]:
    """The local branch's share gamma a head, by layer."""
    rows = []
    for layer in range(model.config.layers):
        group = next(group for group, end in enumerate(model.config.ends) if layer < end)
        inside = layer - model.config.ends[group]  # from the group's end
        gamma = model.net.groups[group].blocks[inside].attention.gamma()  # type: ignore[index, union-attr]
        rows.append({"layer": layer, "gamma": [1.0] if gamma is None else [round(g, 4) for g in gamma.tolist()]})
    return rows


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
