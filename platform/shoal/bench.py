"""Benchmarks: `shoal bench decode|model|train|data|serve`. Each prints a table, and JSON as its last line.

Random weights, since speed does not depend on their values. Variants run in turns, so that a drift of the machine hits
all of them; what is quoted is the median of the rounds. Load and threads stand beside every number.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.errors import UsageError
from shoal.evaluation import decode_speed, machine
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.attention import hybrid_attention
from shoal.model.model import Model
from shoal.model.net import Net

K = TypeVar("K")

SHAPES: dict[str, dict[str, Any]] = {  # our block in the peers' shapes (see docs/benchmarks)
    "82m": {"layers": 12, "width": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "ffn": 2048, "vocab": 8192},
    "5m": {"layers": 4, "width": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 768, "vocab": 8192},
}


def decode(console: Console, *, shape: str, batches: tuple[int, ...], tokens: int, rounds: int) -> None:
    """Decoded tokens per second by precision, batch size and depth."""
    full = Model(_config(shape), Net(_config(shape)).init_(0), Tokenizer.bytes_only(), name=shape)
    models = {"fp32": full, "int8": full.quantized()}
    runs: dict[tuple[str, int, str], Callable[[], float]] = {}
    for label, model in models.items():
        engine = Engine(model)
        decode_speed(engine, 1, 8)  # packs the kernels
        for depth in ("full", "shallow"):
            for batch in batches:
                runs[label, batch, depth] = lambda e=engine, b=batch, d=depth: decode_speed(e, b, tokens, d)  # type: ignore[misc]
    medians = _in_turns(runs, rounds)
    table = Table(
        "precision", "batch", "depth", "tokens/s", "x fp32 full", title=f"decode, {shape}, {tokens} tokens a request"
    )
    rows = []
    for (label, batch, depth), speed in medians.items():
        ratio = speed / medians["fp32", batch, "full"]
        table.add_row(label, str(batch), depth, f"{speed:.1f}", f"{ratio:.2f}")
        row = {"precision": label, "batch": batch, "depth": depth, "tokens_per_s": speed, "ratio": ratio}
        rows.append(row)
    _show(console, table, {"bench": "decode", "shape": shape, "tokens": tokens, "rounds": rounds, "rows": rows})


def attention(console: Console, *, rounds: int) -> None:
    """Forward and backward of hybrid attention against full causal attention, at two training lengths (one thread)."""
    torch.set_num_threads(1)
    table = Table(
        "T", "hybrid ms", "full causal ms", "ratio", title="attention in training, 4 query heads, 2 KV heads, d 24"
    )
    rows = []
    for length in (256, 1024):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2048 // length, length, h, 24, generator=generator).requires_grad_() for h in (4, 2, 2))

        def hybrid(q=q, k=k, v=v) -> float:  # type: ignore[no-untyped-def]
            return _milliseconds(
                lambda: hybrid_attention(q, k, v, window=32, block=4, top_k=16, sinks=1, local_weight=0.7)
            )

        def dense(q=q, k=k, v=v) -> float:  # type: ignore[no-untyped-def]
            a, b, c = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
            return _milliseconds(lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True))

        medians = _in_turns({"hybrid": hybrid, "dense": dense}, rounds)
        ratio = medians["hybrid"] / medians["dense"]
        table.add_row(str(length), f"{medians['hybrid']:.1f}", f"{medians['dense']:.1f}", f"{ratio:.2f}")
        rows.append({"length": length, **{f"{name}_ms": value for name, value in medians.items()}, "ratio": ratio})
    _show(console, table, {"bench": "model", "rounds": rounds, "rows": rows})


def _config(shape: str) -> ModelConfig:
    if shape not in SHAPES:
        raise UsageError("--shape", got=shape, allowed=sorted(SHAPES))
    return ModelConfig(**SHAPES[shape], train_length=2048, window=256, block=16, page=16, top_k=16)


def _milliseconds(forward: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    forward().sum().backward()
    return 1000 * (time.perf_counter() - start)


def _in_turns(runs: dict[K, Callable[[], float]], rounds: int) -> dict[K, float]:
    """Median of each run over `rounds`, all runs in turns, after one turn that is not counted."""
    found: dict[K, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):
        for key, run in runs.items():
            value = run()
            if number:
                found[key].append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def _show(console: Console, table: Table, result: dict[str, Any]) -> None:
    console.print(table)
    result["machine"] = machine()
    console.print(f"load {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads", highlight=False)
    print(json.dumps(result))
