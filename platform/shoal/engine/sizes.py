"""How much an engine takes where nobody says: units of K/V memory, and rows of a step, from the memory at hand."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from shoal.config import GROUPS, ModelConfig
from shoal.engine.device import give_back
from shoal.errors import ResourceError
from shoal.model import slots
from shoal.model.attention import STRIP
from shoal.model.gpu import launch

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25  # of the free memory, for K/V
CPU_ROWS, GPU_ROWS = 512, 8192  # of a step; a GPU needs thousands to be busy with products
# of what an engine may take of a GPU: rows of a step have at most so much, and as much is left for graphs, logits and adapters
STEP_SHARE = REST_SHARE = 1 / 16


def default_rows(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    gpu_share: float = 0.9,
    kv_dtype: torch.dtype | None = None,
) -> int:
    """Rows of a step: `CPU_ROWS`; on a GPU `GPU_ROWS`, or as many as `STEP_SHARE` of `gpu_share` of its memory holds
    (`row_bytes`) beside `prompt_bytes`, if these are fewer, but never less than on a CPU."""
    if device.type != "cuda":
        return CPU_ROWS
    _, total = torch.cuda.mem_get_info(device)
    kernels = launch.able(device)
    room = int(STEP_SHARE * gpu_share * total) - prompt_bytes(config, dtype, kv_dtype or dtype, kernels)
    return max(CPU_ROWS, min(GPU_ROWS, room // row_bytes(config, dtype.itemsize, kernels)))


def row_bytes(config: ModelConfig, each: int, kernels: bool) -> int:
    """Bytes that a row of a prompt needs in a layer, of numbers of `each` bytes: what goes in and out, queries, keys and values
    before and after rotation, the MLP's inside, sums of both branches in fp32; and the masks over keys, wherever torch's
    attention reads them: in layers that read all of the context, and without the Triton `kernels` in every one."""
    c = config
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    beside = each * (4 * c.width + 2 * heads + 3 * c.ffn) + 2 * 4 * c.heads * (c.head_dim + 2)
    return beside + _mask_bytes(c, each, kernels)


def prompt_bytes(config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype, kernels: bool) -> int:
    """Bytes of the keys and values of one prompt, out of their pages, as torch's attention reads them, a request at a time and
    a layer at a time: as they are stored in `kv_dtype`; of int8 also as numbers of `dtype`, before and after their scales. And
    what `STRIP` rows of a sparse layer need there (`attention._by_strips`), however many a step has."""
    c = config
    slot = slots.width(c.head_dim, kv_dtype) * kv_dtype.itemsize
    read = 4 * c.head_dim * dtype.itemsize * (kv_dtype == torch.int8)
    # of a head what is added to its scores, in fp32 and as a number, and with the mask; of a KV head its mask, twice and as
    # a number, which is made of two others
    strip = 8 * c.heads + c.kv_heads * (3 + dtype.itemsize) + 2 if "S" in _masked(c, kernels) else 0
    return _keys(c, kernels) * (c.kv_heads * (slot + read) + STRIP * strip)


def _mask_bytes(c: ModelConfig, each: int, kernels: bool) -> int:
    """Of a row, in the layer that needs most. Where all keys are read: a bool, and the number that it becomes, for all query
    heads of a KV head (`paged._causal`). Elsewhere which are in the window, which in the block that is not complete, and which
    come before (`Layout.causal`), beside a number of each in the window; or, for each KV head, a bool and a number of those in
    chosen blocks; or two bools of those that are read always, and of which some are favoured."""
    under = {"L": 3 + each, "H": 3 + c.kv_heads * (1 + each), "S": 5}
    whole = c.heads // c.kv_heads * (1 + each) * _whole(c)
    return max([whole, *(under[kind] * c.context for kind in _masked(c, kernels))])


def _keys(c: ModelConfig, kernels: bool) -> int:
    """How many keys of a prompt torch's attention reads at most."""
    return c.context if _masked(c, kernels) else _whole(c)


def _whole(c: ModelConfig) -> int:
    """How many keys rows of a prompt read at most of which each reads all before it."""
    kinds = {c.attention_kind(layer) for layer in range(c.layers)}
    return c.context if "D" in kinds else min(c.context, max(c.window, c.dense_length * ("S" in kinds)))


def _masked(c: ModelConfig, kernels: bool) -> set[str]:
    """Kinds of layers in which torch's attention reads a prompt under masks of which keys each row reads."""
    kinds = {c.attention_kind(layer) for layer in range(c.layers)} - {"D"}
    many = -(-c.context // c.page) * c.page // c.block > launch.MOST_BLOCKS
    return kinds - {"L"} if kernels and many else set() if kernels else kinds


@dataclass(frozen=True)
class Needs:
    """What of a GPU's memory an engine has for other things than keys and values, in bytes."""

    weights: int = 0  # that are there
    step: int = 0  # that its largest step will need in a layer

    @classmethod
    def of(
        cls,
        net: nn.Module,
        config: ModelConfig,
        rows: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
    ) -> Needs:
        """Of an engine with the weights of `net`, whose steps have at most `rows` rows, among them a prompt."""
        held, kernels = sum(each.nbytes for each in (*net.parameters(), *net.buffers())), launch.able(device)
        prompt = prompt_bytes(config, dtype, kv_dtype or dtype, kernels)
        return cls(held, rows * row_bytes(config, dtype.itemsize, kernels) + prompt)


def default_units(
    config: ModelConfig,
    max_batch: int,
    unit_bytes: int,
    device: torch.device,
    gpu_share: float = 0.9,
    needs: Needs | None = None,
) -> int:
    """Units for `max_batch` requests of full context at full depth, or what `MEMORY_SHARE` of the free memory holds; on a GPU
    as `_gpu_room` has it, whatever the batch, as later requests find again what fits. Never less than one request of full
    context needs, and always with the null unit. Raises ResourceError, with the arithmetic, where the memory does not hold
    these."""
    one, on_gpu = 1 + GROUPS * -(-config.context // config.page), device.type == "cuda"
    if on_gpu:
        free, own, counted, do = _gpu_room(device, gpu_share, needs or Needs())
    else:
        free = own = psutil.virtual_memory().available
        counted, do = "that are free", ""
    if one * unit_bytes > free:
        raise ResourceError(
            f"keys and values of one text of {config.context} tokens in {config.layers} layers do not fit the memory",
            got=_gb(one * unit_bytes), allowed=f"{_gb(free)} {counted}",
            do=f"{do}store them in int8 (kv_cache_dtype), or import the model with a shorter --context",
        )  # fmt: skip
    if free < own // 2:
        log.warning("keys and values get %s of the GPU's memory, not %s: others hold the rest", _gb(free), _gb(own))
    if on_gpu:
        return free // unit_bytes
    return max(one, 1 + min((one - 1) * max_batch, int(free * MEMORY_SHARE) // unit_bytes))


def _gpu_room(device: torch.device, share: float, needs: Needs) -> tuple[int, int, str, str]:
    """Bytes of a GPU for keys and values, and how many they would be if nothing else ran there: its memory times `share`, less
    the engine's own weights and what its steps need; where others hold so much, what is free less what its steps need. Also
    how that was counted, and what may be done about it. What engines that are gone have left to torch is given back first:
    it is in pieces."""
    give_back()
    free, total = torch.cuda.mem_get_info(device)
    most = int(share * total)
    step = needs.step + int(REST_SHARE * most)
    own, left = max(0, most - needs.weights - step), max(0, free - step)
    if own <= left:
        less = f"less {_gb(needs.weights)} of weights, {_gb(step)} for steps"
        return own, own, f"(gpu_share {share:.2f} of {_gb(total)}, {less})", "give the engine more of it (gpu_share), "
    counted = f"({_gb(free)} free beside the weights, less {_gb(step)} for steps)"
    return left, own, counted, "give what runs beside it less (gpu_share: 0.45 each for two engines), "


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
