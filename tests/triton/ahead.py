"""Compiles every kernel that one layer of a preset launches, to machine code, on a machine without a GPU: a program of its
own, as Triton must not be in its interpreter. Prints a line of JSON: what was launched, in order.

    python -m tests.triton.ahead PRESET DTYPE ARCHITECTURE [int8]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from shoal import presets
from shoal.model.block import Block, rope_tables
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import Reach

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8", torch.int32: "i32"}
launched: list[str] = []


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES.get(value.dtype, "i64")
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """In place of a launch."""
    del grid, warmup
    given = {**dict(zip(self.arg_names, args, strict=False)), **named}
    constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else kind(given[name]) for name in self.arg_names}
    options = {"num_warps": named.get("num_warps", 4)}
    made = triton.compile(ASTSource(self, signature, constants), target=target, options=options)
    assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024, "what any of these devices has"
    launched.append(self.__name__)


@torch.no_grad()
def layer(name: str, dtype: torch.dtype, eight: bool) -> None:
    """One decoding step of two requests through one layer, of whose work only the launches are done."""
    config = presets.get(name).model
    block = Block(config, 0).to(dtype)
    cache = GroupCache.zeros(config, 3, dtype, kv_dtype=torch.int8 if eight else None)
    positions = torch.tensor([config.page - 1, 0])
    tables = torch.tensor(
        [[1] + [0] * (config.context // config.page - 1), [2] + [0] * (config.context // config.page - 1)]
    )
    step = PagedStep(positions, tables[:, 0] * config.page + positions, tables, [0, 1, 2], config.page, config.block)
    x = torch.zeros(2, config.width, dtype=dtype)
    block.paged(x, step, rope_tables(positions, config, launch.fp(dtype)), cache.kv[0], cache.summaries[0])
    launch.int8_product(torch.zeros(64, config.width, dtype=torch.int8), torch.ones(64, 1))(x.float())


def trained(name: str, dtype: torch.dtype) -> None:
    """Attention of a layer in training, forward and backward, over a row that is just long enough to choose."""
    c = presets.get(name).model
    length = (c.top_k + 1) * c.block
    q, k, v = (torch.zeros(1, length, heads, c.head_dim, dtype=dtype) for heads in (c.heads, c.kv_heads, c.kv_heads))
    spans = Spans.packed(torch.zeros(1, length, dtype=torch.long), c.block)
    reach = Reach(c.window, c.top_k, c.sinks, torch.full((c.heads,), 0.5))
    sparse.attend(q.requires_grad_(), k, v, spans, reach).sum().backward()


if __name__ == "__main__":
    target = GPUTarget("cuda", int(sys.argv[3]), 32)
    JITFunction.run = compiled
    launch.ON.add("cpu")
    launch._precision, sparse._nearly_fp32 = (lambda x: "ieee"), (lambda x: "tf32x3")  # as of a tensor on a GPU
    sparse._runs = lambda numbers, first: numbers  # which nothing has chosen here
    layer(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[4:] == ["int8"])
    trained(sys.argv[1], getattr(torch, sys.argv[2]))
    print(json.dumps(launched))
