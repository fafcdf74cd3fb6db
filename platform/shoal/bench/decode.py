"""`shoal bench decode`: decoded tokens per second of the engine, by precision, batch and depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.bench.turns import in_turns, show
from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.errors import UsageError
from shoal.evaluation import decode_speed
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.model import Model
from shoal.model.net import Net

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
    medians = in_turns(runs, rounds)
    table = Table(
        "precision", "batch", "depth", "tokens/s", "x fp32 full", title=f"decode, {shape}, {tokens} tokens a request"
    )
    rows = []
    for (label, batch, depth), speed in medians.items():
        ratio = speed / medians["fp32", batch, "full"]
        table.add_row(label, str(batch), depth, f"{speed:.1f}", f"{ratio:.2f}")
        row = {"precision": label, "batch": batch, "depth": depth, "tokens_per_s": speed, "ratio": ratio}
        rows.append(row)
    show(console, [table], {"bench": "decode", "shape": shape, "tokens": tokens, "rounds": rounds, "rows": rows})


def _config(shape: str) -> ModelConfig:
    if shape not in SHAPES:
        raise UsageError("--shape", got=shape, allowed=sorted(SHAPES))
    return ModelConfig(**SHAPES[shape], train_length=2048, window=256, block=16, page=16, top_k=16)
