"""`shoal bench model`: what hybrid attention costs in training, beside full causal attention."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from shoal.bench.turns import in_turns, show
from shoal.model.attention import hybrid_attention


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

        medians = in_turns({"hybrid": hybrid, "dense": dense}, rounds)
        ratio = medians["hybrid"] / medians["dense"]
        table.add_row(str(length), f"{medians['hybrid']:.1f}", f"{medians['dense']:.1f}", f"{ratio:.2f}")
        rows.append({"length": length, **{f"{name}_ms": value for name, value in medians.items()}, "ratio": ratio})
    show(console, [table], {"bench": "model", "rounds": rounds, "rows": rows})


def _milliseconds(forward: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    forward().sum().backward()
    return 1000 * (time.perf_counter() - start)
