"""Tries what a model will launch on a GPU before anything depends on it. A kernel that the device refuses, since it asks for
more shared memory or registers than there are, then ends neither loading nor training, nor a request in the middle: the log
says so in a line, and all goes on by torch's operators (`launch.give_up`), with sizes that are for these.

Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.config import ModelConfig
from shoal.model.adapters import Bank, Beside, nothing
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.gpu import launch, sparse
from shoal.model.reach import ALL, Reach


@torch.inference_mode()
def of_steps(net: Any, kv_dtype: torch.dtype | None = None) -> None:
    """Each form of a step of `net` (a `Net` on its device), with keys and values in `kv_dtype`, through all of its layers and
    exits: one request, as many as make a device busy, and a prompt. Tables are as wide as they get: sizes of kernels follow
    from that; and as wide as they are while each piece of a request, and each program of many, scores blocks for itself. And
    one request with an adapter, whose kernels have the same sizes for any."""
    c, device = net.config, net.device
    if device.type != "cuda" or not launch.able(device):
        return
    cache = GroupCache.zeros(c, 1, net.dtype, device, kv_dtype)  # the null unit, and nothing is written
    busy, widest = -(-launch.BUSY // c.kv_heads), -(-c.context // c.page)
    few, alone = launch.FEW_NUMBERS // c.summary_values * c.block // c.page, launch.ALONE_BLOCKS * c.block // c.page
    forms: list[tuple[Sequence[int], int]] = [(range(2), few), (range(busy + 1), alone), ((0, launch.LONG + 1), widest)]
    steps = {(tuple(starts), max(1, min(pages, widest))) for starts, most in forms for pages in (most, widest)}
    adapter = nothing(net)
    beside = Bank(net, [adapter]).beside([adapter], [1])
    tried: list[tuple[Sequence[int], int, Beside | None]] = [(*each, None) for each in sorted(steps)]
    for each in (*tried, (range(2), 1, beside)):
        try:
            _step(net, cache, *each)
        except Exception as error:
            launch.give_up(device, error)
            return


def _step(net: Any, cache: GroupCache, starts: Sequence[int], pages: int, beside: Beside | None) -> None:
    c, device, rows = net.config, net.device, starts[-1]
    at = torch.zeros(rows, dtype=torch.long, device=device)
    tables = torch.zeros(len(starts) - 1, pages, dtype=torch.long, device=device)
    step = PagedStep(at, at - 1, tables, list(starts), c.page, c.block, beside=beside)
    x = torch.zeros(rows, c.width, dtype=net.dtype, device=device)
    for group in net.groups:
        x = group.stepped(x, step, cache)
    for layers in c.exits:
        net.exit(x, layers)


def of_training(config: ModelConfig, length: int, device: torch.device, *, low: bool, alone: bool) -> None:
    """Attention of each kind of a layer over a row of `length` tokens, forward and backward; `low`: in bf16, by autocast where
    the GPU trains `alone`, as `train.parallel.precision` has it."""
    c, dtype = config, torch.bfloat16 if low and not alone else torch.float32
    shape = (1, length, c.heads + 2 * c.kv_heads, c.head_dim)
    row = torch.empty(1, length, 0, dtype=dtype, device=device)
    if not sparse.usable(row, c.block):
        return
    device = row.device  # with its number, as all that lies there will say
    spans = sparse.Spans.packed(
        torch.zeros(1, length, dtype=torch.long, device=device), c.block, c.window, c.dense_length
    )
    heads = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    for kind in sorted({c.attention_kind(layer) for layer in range(c.layers)}):
        share = torch.zeros(c.heads, device=device)
        gamma, bias = share if kind == "H" else None, share if kind == "S" else None
        reach = Reach(c.window, c.top_k, c.sinks, gamma, bias, {"D": ALL, "S": c.dense_length}.get(kind, 0))
        try:
            q, k, v = heads.split([c.heads, c.kv_heads, c.kv_heads], dim=2)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low and alone):
                found = sparse.attend(q, k, v, spans, reach, c.summary == "mean_var")
            found.sum().backward()
        except Exception as error:
            launch.give_up(device, error)
            return
