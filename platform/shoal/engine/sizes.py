"""How much an engine takes where nobody says: units of K/V memory, and rows of a step, from the memory at hand."""

from __future__ import annotations

import psutil
import torch

from shoal.config import GROUPS, ModelConfig
from shoal.errors import ResourceError
from shoal.model.gpu import launch

MEMORY_SHARE = 0.25  # of the free memory, for K/V
CPU_ROWS, GPU_ROWS = 512, 8192  # of a step; a GPU needs thousands to be busy with products
STEP_SHARE = 0.5  # of what a GPU has beside weights, keys and values; the rest is for graphs and logits


def default_rows(config: ModelConfig, device: torch.device, dtype: torch.dtype, gpu_share: float = 0.9) -> int:
    """Rows of a step: `CPU_ROWS`; on a GPU `GPU_ROWS`, or as many as `STEP_SHARE` of the memory outside `gpu_share` holds
    (`row_bytes`), if these are fewer, but never less than on a CPU."""
    if device.type != "cuda":
        return CPU_ROWS
    _, total = torch.cuda.mem_get_info(device)
    room = int(STEP_SHARE * (1 - gpu_share) * total)
    return max(CPU_ROWS, min(GPU_ROWS, room // row_bytes(config, dtype.itemsize, launch.able(device))))


def row_bytes(config: ModelConfig, each: int, kernels: bool) -> int:
    """Bytes that a row of a prompt needs in a layer, of numbers of `each` bytes: what goes in and out, queries, keys and values
    before and after rotation, the MLP's inside, sums of both branches in fp32; and a mask over the keys, for all query heads
    of a KV head, wherever torch's attention reads it: in layers that read all of the context, and without the Triton
    `kernels` in every one."""
    c = config
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    beside = each * (4 * c.width + 2 * heads + 3 * c.ffn) + 2 * 4 * c.heads * (c.head_dim + 2)
    kinds = {c.attention_kind(layer) for layer in range(c.layers)}
    keys = min(c.context, max(c.window, c.dense_length * ("S" in kinds)))
    if "D" in kinds or not kernels:
        keys = c.context
    return beside + c.heads // c.kv_heads * keys * (1 + each)


def default_units(
    config: ModelConfig, max_batch: int, unit_bytes: int, device: torch.device, gpu_share: float = 0.9
) -> int:
    """Units for `max_batch` requests of full context at full depth, or what `MEMORY_SHARE` of the free memory holds; on a GPU
    what is left of `gpu_share` of its memory, whatever the batch, as later requests find again what fits. Never less than one
    request of full context needs. Raises ResourceError, with the arithmetic, where the memory does not hold one."""
    one = GROUPS * -(-config.context // config.page)
    free, on_gpu = psutil.virtual_memory().available, device.type == "cuda"
    if on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        free = max(0, free - int((1 - gpu_share) * total))
    if one * unit_bytes > free:
        raise ResourceError(
            f"keys and values of one text of {config.context} tokens in {config.layers} layers do not fit the memory",
            got=f"{one * unit_bytes / 1e9:.1f} GB", allowed=f"{free / 1e9:.1f} GB that are free",
            do="store them in int8 (kv_cache_dtype), or import the model with a shorter --context",
        )  # fmt: skip
    return 1 + max(one, free // unit_bytes if on_gpu else min(one * max_batch, int(free * MEMORY_SHARE) // unit_bytes))
