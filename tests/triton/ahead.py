"""Compiles every kernel that a layer of a preset launches, to machine code, on a machine without a GPU: a program of its own,
as Triton must not be in its interpreter. Prints a line of JSON: what was launched, in order, by each kind of a layer (also
such as imported models have), and each way that rows take through it.

    python -m tests.triton.ahead PRESET DTYPE ARCHITECTURE [int8]

PRESET is one of ours or of `SHAPES`. Memory is said to begin at multiples of 16 bytes, as torch's does, and numbers to be such
multiples where they are: only then are loads of a loop made ahead of it, which takes shared memory.
"""

from __future__ import annotations

import dataclasses
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
from shoal.config import ModelConfig
from shoal.model.block import Block, rope_tables
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import Reach

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # changes to a preset
    # heads of 128 numbers, as in most open models from 3b on, and with the variance, as `shoal adapt --sparse` makes them
    "wide": ("1b", {"heads": 16, "head_dim": 128, "width": 256, "ffn": 256, "block": 64, "summary": "mean_var"}),
    # a key a block, a query head a KV head, nothing turned, q and k normed over all heads
    "plain": ("article", {"qk_norm": "all", "qkv_bias": True, "rope_pattern": "N"}),
    "bare": ("tiny", {"qk_norm": "none", "summary": "mean_var"}),
}
MOST_SHARED = 99 * 1024  # bytes, what any of these devices has
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
    told = [p.name for p in self.params if not p.do_not_specialize]
    # what is 1 is a constant of a kernel of its own
    one = {name: 1 for name in told if type(given[name]) is int and given[name] == 1}
    constants = one | {p.name: given[p.name] for p in self.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else kind(given[name]) for name in self.arg_names}
    anywhere = [p.name for p in self.params if p.do_not_specialize_on_alignment]
    sixteens = [name for name in told if name not in (*constants, *anywhere) and sixteen(given[name])]
    attributes = {(self.arg_names.index(name),): [["tt.divisibility", 16]] for name in sixteens}
    options = {"num_warps": named.get("num_warps", 4)}
    made = triton.compile(ASTSource(self, signature, constants, attributes), target=target, options=options)
    assert made.asm["cubin"]
    if self.__name__ == "_attend" and not given["ALONE"]:
        in_order(made.asm["ptx"], 1 + given["SHARED"])
    assert made.metadata.shared <= MOST_SHARED, f"{self.__name__} takes {made.metadata.shared} bytes of shared memory"
    launched.append(self.__name__)


def in_order(ptx: str, counts: int) -> None:
    """What makes "the last to arrive joins", and before it "the last of a team goes on", right on a device, of each that is
    counted: a barrier between what a program stores and the one thread that counts, which releases and acquires for all of a
    GPU; another before anything is read, past the first cache; and nothing read by way of it before that."""
    code = [line.split("//")[0].strip() for line in ptx.splitlines()]
    found = [at for at, line in enumerate(code) if " atom." in f" {line}"]
    assert len(found) == counts
    barriers = [at for at, line in enumerate(code) if line.startswith(("bar.sync", "barrier.sync"))]
    stores = [at for at, line in enumerate(code) if " st.global" in f" {line}"]
    loads = [at for at, line in enumerate(code) if " ld.global" in f" {line}"]
    shared = [at for at in loads if " ld.global.cg" in f" {code[at]}"]
    assert min(shared) > found[0], "what others wrote is read before it is counted"
    for begin, count, end in zip([0, *found], found, [*found[1:], len(code)], strict=False):
        assert "atom.global.gpu.acq_rel.add" in code[count], code[count]
        mine = [at for at in stores if begin < at < count]
        assert any(max(mine) < barrier < count for barrier in barriers), "nothing orders the stores"
        theirs, plain = ([at for at in each if count < at < end] for each in (shared, {*loads} - {*shared}))
        assert len(theirs) >= (1 if end < len(code) else 3), "what others wrote is read through the first cache"
        assert any(count < barrier < min(theirs) for barrier in barriers), "other threads do not wait for who counts"
        assert not plain or min(plain) > max(theirs), "all else is read as ever, and after it"


def sixteen(value: Any) -> bool:
    """Is it compiled for a multiple of 16?"""
    return isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)


def config_of(name: str) -> ModelConfig:
    """Of a preset, or of `SHAPES`."""
    preset, changes = SHAPES.get(name, (name, {}))
    return dataclasses.replace(presets.get(preset).model, image_size=0, **changes)


@torch.no_grad()
def layer(config: ModelConfig, dtype: torch.dtype, eight: bool, rows: int = 1, pages: int = 0) -> list[str]:
    """What one step launches in one layer: two requests that decode, or one of so many `rows`; only the launches are done.
    Tables have so many `pages`, or those of a context."""
    launched.clear()
    block = Block(config, 0).to(dtype)
    cache = GroupCache.zeros(config, 3, dtype, kv_dtype=torch.int8 if eight else None)
    positions = torch.tensor([config.page - 1, 0] if rows == 1 else [*range(rows)])
    starts = [0, 1, 2] if rows == 1 else [0, rows]
    tables = torch.zeros(len(starts) - 1, pages or config.context // config.page, dtype=torch.long)
    tables[:, 0] = torch.arange(1, len(starts))
    step = PagedStep(positions, positions, tables, starts, config.page, config.block)
    x = torch.zeros(len(positions), config.width, dtype=dtype)
    block.opened(x, x, step, rope_tables(positions, config, launch.fp(dtype)), cache.kv[0], cache.summaries[0])
    return [*launched]


def stored(c: ModelConfig, dtype: torch.dtype) -> list[str]:
    """What is launched for keys and values as vLLM gives them: of two requests that decode, and of one of three rows."""
    launched.clear()
    cache = GroupCache.zeros(c, 3, dtype)
    for starts in ([0, 1, 2], [0, 3]):
        at = torch.arange(starts[-1])
        k, v = torch.zeros(len(at), 2 * c.kv_heads, c.head_dim, dtype=dtype).split(c.kv_heads, dim=1)
        step = PagedStep(at, at, torch.ones(len(starts) - 1, 1, dtype=torch.long), starts, c.page, c.block)
        launch.store(k, v, cache.kv[0], cache.summaries[0], step)
    return [*launched]


def layers(c: ModelConfig, dtype: torch.dtype, eight: bool) -> dict[str, list[str]]:
    """Of each kind of a layer, with what it reads cut into pieces or not, and few blocks to choose from or many, or as many as
    there may be; a window of 1, which is a constant, in the one that has nothing else."""
    few, launch.ALONE_BLOCKS = launch.FEW_NUMBERS, 2**20
    short = min(c.context, few // c.summary_values * c.block) // c.page
    launch._pieces = lambda programs, near, far: (2, 2 * (far > 0))
    found = {"decoding": layer(c, dtype, eight, pages=short), "a few rows": layer(c, dtype, eight, 3, short)}
    launch.FEW_NUMBERS = 0
    found["many blocks"] = layer(c, dtype, eight)
    others = {"S": {"dense_length": c.page}, "L": {"window": 1}, "D": {}}
    kinds = {kind: dataclasses.replace(c, attn_pattern=kind, **more) for kind, more in others.items()}  # type: ignore[arg-type]
    found |= {kind: layer(config, dtype, eight) for kind, config in kinds.items()}
    launch._pieces = lambda programs, near, far: (1, int(far > 0))
    found |= {f"{kind} alone": layer(config, dtype, eight) for kind, config in {"H": c, **kinds}.items()}
    launch.ALONE_BLOCKS = 0
    return found | {"many alone": layer(c, dtype, eight, pages=launch.MOST_BLOCKS * c.block // c.page)}


def trained(c: ModelConfig, dtype: torch.dtype) -> dict[str, list[str]]:
    """Attention of a layer in training, forward and backward: over a row that is just long enough to choose, the same of a
    sparse layer with the smallest window, and a row of one token."""
    length, found = (c.top_k + 1) * c.block, dict[str, list[str]]()
    both = Reach(c.window, c.top_k, c.sinks, torch.full((c.heads,), 0.5))
    one = Reach(c.block, c.top_k, c.sinks, None, torch.zeros(c.heads))
    for name, tokens, reach in (
        ("H trained", length, both),
        ("S trained", length, one),
        ("one token", 1, Reach(1, 0, 0, None)),
    ):
        launched.clear()
        q, k, v = (
            torch.zeros(1, tokens, heads, c.head_dim, dtype=dtype) for heads in (c.heads, c.kv_heads, c.kv_heads)
        )
        spans = Spans.packed(torch.zeros(1, tokens, dtype=torch.long), c.block, reach.window)
        sparse.attend(q.requires_grad_(), k, v, spans, reach, c.summary == "mean_var").sum().backward()
        found[name] = [*launched]
    return found


if __name__ == "__main__":
    target = GPUTarget("cuda", int(sys.argv[3]), 32)
    JITFunction.run = compiled
    launch.ON.add("cpu")
    # as of a tensor on a GPU, where fp32 is multiplied in TF32 (`Model.on_gpu`)
    launch._precision, sparse._nearly_fp32 = (lambda x: "tf32" if x.itemsize == 4 else "ieee"), (lambda x: "tf32x3")
    sparse._runs = lambda numbers, first: numbers  # which nothing has chosen here
    asked, precision = config_of(sys.argv[1]), getattr(torch, sys.argv[2])
    told = layers(asked, precision, sys.argv[4:] == ["int8"])
    told |= trained(asked, precision)
    told["stored alone"] = stored(asked, precision)
    launched.clear()
    for few_or_many in (2, 100):
        levels = torch.zeros(64, asked.width, dtype=torch.int8)
        launch.int8_product(levels, torch.ones(64, 1))(torch.zeros(few_or_many, asked.width))
    told["int8"] = [*launched]
    launched.clear()
    for room in (8, 64):  # ranks of the largest adapter
        thin = torch.zeros(3 * room, asked.width, dtype=precision)
        bounds, of = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        rows = torch.zeros(4, asked.width, dtype=precision)
        launch.add_thin(rows, thin, thin, bounds, room, of, rows.clone())
    print(json.dumps(told | {"adapters": launched}))
