"""`shoal bench decode --device cuda`: decoding steps of an engine's runner beside the bandwidth of a copy, by batch and
context; and vLLM in the same table, where a Python that has it is named.

The least that a step can take is what it must read over the bandwidth: every weight of layers and head once, and of each
request the keys, values and summaries that its attention reads (`bytes_of_step`). The memory holds random keys: prompts of
128k tokens of 256 requests would take longer than all else.

Letters: S block, K blocks read, w window.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoal import presets
from shoal.bench import peers
from shoal.bench.turns import show
from shoal.config import GROUPS, ModelConfig
from shoal.engine.events import Request, Sampling
from shoal.engine.plan import Plan, Work
from shoal.engine.runner import Runner
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import ResourceError, UsageError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.cost import kv_bytes_stored, parameters
from shoal.model.model import Model
from shoal.model.net import Net

BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192, 32768, 131072)
TOKENS = 32  # of an answer of a peer, beyond the first


def bytes_of_step(config: ModelConfig, batch: int, length: int, each: int = 2) -> int:
    """Bytes that a decoding step of `batch` requests of `length` tokens, the new one among them, must read at full depth, of
    weights, keys and values of `each` bytes: weights once, and of each request what its layers read. Summaries are fp32."""
    c, own = config, parameters(config)
    # of a table that is not tied a row a request, which is nothing
    weights = own.blocks + own.embedding // (1 if c.tied else 2) + c.width
    read = sum(_reads(c, length, c.attention_kind(layer), each) for layer in range(c.layers))
    return weights * each + batch * c.kv_heads * read


def _reads(c: ModelConfig, length: int, kind: str, each: int) -> int:
    """Bytes of a KV head of one layer: tokens that either branch reads, no more than there are, and summaries where there are
    more blocks than are read."""
    if kind == "D" or (kind == "S" and length <= c.dense_length):
        tokens, blocks = length, 0
    elif kind == "L":
        tokens, blocks = min(length, c.window), 0
    else:
        # with one softmax only blocks that begin before the window are chosen among
        blocks = length // c.block if kind == "H" else max(0, length - 1 - c.window + c.block) // c.block
        chosen = min(c.top_k, blocks) * c.block + (length % c.block if kind == "H" else 0)
        tokens = min(length, min(length, c.window) + chosen)
    return 2 * tokens * c.head_dim * each + (blocks if blocks > c.top_k else 0) * c.summary_values * max(4, each)


def need_cuda(device: str) -> torch.device:
    """Raises UsageError for another device than these, and ResourceError where there is none."""
    if device != "cuda":
        raise UsageError("--device", got=device, allowed=["cpu", "cuda"])
    if not torch.cuda.is_available():
        raise ResourceError(
            "--device cuda", got="no CUDA device here", do="run it on a machine with a GPU, or with --device cpu"
        )
    return torch.device("cuda")


def bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.zeros(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), device)


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Of one `run`: the median; the first three are not counted."""
    took = []
    for _ in range(3 + rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took[3:])


def model_of(config: ModelConfig, device: torch.device) -> Model:
    """Random weights; on a GPU in bf16, as it is served."""
    model = Model(config, Net(config).init_(0), Tokenizer.bytes_only(), name="bench")
    return model.on_gpu() if device.type == "cuda" else model


def units_of(config: ModelConfig, batch: int, length: int) -> int:
    """Of so many requests of that length at full depth, and the null unit."""
    return 1 + batch * GROUPS * -(-length // config.page)


def step_seconds(model: Model, batch: int, length: int, rounds: int = 20) -> float:
    """Of one decoding step of `batch` greedy requests of `length` tokens, as an engine takes it: from plan to tokens."""
    config, pages = model.config, -(-length // model.config.page)
    runner = Runner(model, units_of(config, batch, length), graph_rows=batch)
    runner.cache.kv.normal_()
    runner.cache.summaries.normal_()
    works = []
    for number in range(batch):
        request = Request(
            [20 + number % 200], Sampling(temperature=0, max_tokens=length, ignore_eos=True), depth="full"
        )
        running = Running(
            request=request, tokens=[20 + number % 200] * length, prompt_len=1, page=config.page, order=(0, 0, 0),
            arrival=0.0, text=TextStream(model.tokenizer), seed=0, groups=GROUPS, layers=config.layers,
        )  # fmt: skip
        for group in range(GROUPS):
            first = 1 + (number * GROUPS + group) * pages
            running.holding.give(group, list(range(first, first + pages)))
            running.holding.computed[group] = length - 1
        works.append(Work(running, length - 1, 1, 0, GROUPS, sample=True))
    return seconds(lambda: runner.run(Plan(works)), model.device, rounds)


def on_device(
    console: Console, *, device: str, shape: str, batches: tuple[int, ...], rounds: int, peer: dict[str, str],
    contexts: tuple[int, ...] = CONTEXTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """The table, and its rows as JSON. What does not fit the memory is left out, and so said."""
    there = need_cuda(device)
    config = presets.get(shape).model
    config = dataclasses.replace(config, max_length=max(*contexts, config.context))
    model, moved = model_of(config, there), bandwidth(there)
    title = f"decode, {shape} on {torch.cuda.get_device_name(there)}, bf16; a copy moves {moved / 1e9:,.0f} GB/s"
    names = [name for name in peer if name.startswith("vllm")]
    columns = (
        "batch",
        "context",
        "ms a step",
        "tokens/s",
        "GB read",
        "of bandwidth",
        *(f"{name} ms" for name in names),
    )
    table, rows = Table(*columns, title=title), list[dict[str, Any]]()
    told = {"length": max(contexts) + 2 * TOKENS, "dtype": "bfloat16"}
    with peers.running({name: peer[name] for name in names}, model, more=told) as others:
        for batch, length in ((batch, length) for batch in batches for length in contexts):
            must = bytes_of_step(config, batch, length)
            row: dict[str, Any] = {"batch": batch, "context": length, "bytes": must}
            unit = kv_bytes_stored(config, 1, config.group_layers, torch.bfloat16)
            if units_of(config, batch, length) * unit > 0.8 * torch.cuda.mem_get_info(there)[0]:
                table.add_row(
                    str(batch), f"{length:,}", "does not fit", "", f"{must / 1e9:.2f}", "", *("" for _ in names)
                )
                rows.append(row)
                continue
            took = step_seconds(model, batch, length, rounds)
            torch.cuda.empty_cache()
            each = [peer_seconds(other, batch, length) for other in others]
            row |= {"seconds": took, "share": must / moved / took} | dict(zip(names, each, strict=True))
            numbers = f"{1e3 * took:.2f}", f"{batch / took:,.0f}", f"{must / 1e9:.2f}", f"{row['share']:.0%}"
            table.add_row(str(batch), f"{length:,}", *numbers, *(f"{1e3 * one:.2f}" for one in each))
            rows.append(row)
    show(console, [table], {"bench": "decode", "device": device, "shape": shape, "bandwidth": moved, "rows": rows})
    return rows


def peer_seconds(peer: peers.Peer, batch: int, length: int) -> float:
    """Of one step of a peer: what `TOKENS` tokens of an answer take beyond the first, for which it reads the prompt."""
    return (peer.seconds(batch, length, 1 + TOKENS) - peer.seconds(batch, length, 1)) / TOKENS
