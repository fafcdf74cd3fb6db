"""`shoal bench model`: what hybrid attention costs in training beside full causal attention, and what decoding reads."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal import presets
from shoal.bench.turns import in_turns, show
from shoal.config import ModelConfig
from shoal.model import cost
from shoal.model.attention import hybrid_attention
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import Reach

READ_AT = (4 * 2**10, 32 * 2**10, 128 * 2**10)  # tokens


def model(console: Console, *, rounds: int) -> None:
    """Both tables, and their numbers as the last line."""
    torch.set_num_threads(1)
    timed, training = attention(rounds)
    counted, decoding = reads()
    result = {"bench": "model", "rounds": rounds, "rows": training, "reads": decoding}
    show(console, [timed, counted], result)


def attention(rounds: int) -> tuple[Table, list[dict[str, Any]]]:
    """Forward and backward of hybrid attention against full causal attention, at two training lengths (one thread)."""
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
    return table, rows


def reads(lengths: tuple[int, ...] = READ_AT) -> tuple[Table, list[dict[str, Any]]]:
    """Vectors that decoding one token takes out of the pages in one layer, a KV head: counted while the operator runs, and
    equal to what `cost.vectors_read` says."""
    config = dataclasses.replace(presets.get("base").model, layers=4, kv_heads=2, heads=4, head_dim=32)
    table = Table(
        "tokens", "read", "dense reads", "x fewer",
        title=f"vectors read a decoded token, w {config.window}, S {config.block}, K {config.top_k}",
    )  # fmt: skip
    rows = []
    for length in lengths:
        counted, dense = count_reads(config, length), 2 * length
        assert counted == cost.vectors_read(config, length), f"counted {counted}, cost.py says otherwise"
        table.add_row(f"{length:,}", f"{counted:,}", f"{dense:,}", f"{dense / counted:.1f}")
        rows.append({"length": length, "read": counted, "dense": dense, "ratio": dense / counted})
    return table, rows


@torch.inference_mode()
def count_reads(config: ModelConfig, length: int, kind: str = "H") -> int:
    """Vectors of d numbers a KV head that the paged operator reads to decode the last of `length` tokens."""
    c, pages = config, -(-length // config.page)
    at, table = torch.arange(length), torch.arange(1, pages + 1)[None]
    cache = GroupCache.zeros(dataclasses.replace(c, layers=4), pages + 1)
    kv, summaries = cache.kv[0], cache.summaries[0]
    k, v = (torch.randn(length, c.kv_heads, c.head_dim) for _ in range(2))
    write_kv(k, v, kv, summaries, PagedStep(at, at + c.page, table, [0, length], c.page, c.block))
    q, last = torch.randn(1, c.heads, c.head_dim), at[-1:]
    step = PagedStep(last, last + c.page, table, [0, 1], c.page, c.block)
    reach = Reach(c.window, c.top_k, c.sinks, torch.full((c.heads,), 0.7) if kind == "H" else None)
    with Reads(kv, summaries) as seen:
        paged_attention(q, kv, summaries, step, reach)
    return seen.numbers // (c.kv_heads * c.head_dim)


class Reads(TorchDispatchMode):
    """Counts the numbers that operators take out of `memories`: of each that is given a view of one and returns memory of its
    own, what it returns. Only gathers are known; anything else that touches the memories is an error, not a miscount."""

    GATHERS = ("aten::index.Tensor", "aten::index_select")

    def __init__(self, *memories: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0
        self._memories = {memory.untyped_storage().data_ptr() for memory in memories}

    def _inside(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._memories

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(self._inside, args)) and not self._inside(out):
            if func.name() not in self.GATHERS:
                raise TypeError(f"{func.name()} reads the pages, and is no gather that this knows how to count")
            self.numbers += out.numel()
        return out


def _milliseconds(forward: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    forward().sum().backward()
    return 1000 * (time.perf_counter() - start)
