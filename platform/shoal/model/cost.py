"""Cost arithmetic: parameters, floating-point operations and K/V bytes of a configuration, by depth.

The scheduler, the benchmarks and the report ask here, so that one formula serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shoal.config import GROUPS, ModelConfig
from shoal.model.reach import ALL, way
from shoal.model.router import EXTRA, HIDDEN, sample_stride
from shoal.model.slots import width as slot_width


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part."""

    embedding: int  # tied: also the head; else both
    blocks: int  # all layers
    images: int  # patch projection, row and column embeddings, next-patch head
    exits: int  # their norms, and what early ones have before them

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.images + self.exits


def parameters(config: ModelConfig) -> Parameters:
    """Counts from the configuration alone; `check` holds them against a built model."""
    c = config
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    normed = {"head": 2, "all": c.heads + c.kv_heads, "none": 0}[c.qk_norm] * c.head_dim
    bias = (c.heads + 2 * c.kv_heads) * c.head_dim * c.qkv_bias
    layer = c.width * heads + 3 * c.width * c.ffn + 2 * c.width + normed + bias
    gates = sum(c.heads for layer in range(c.layers) if c.attention_kind(layer) != "D")
    side = c.image_size // c.patch
    return Parameters(
        embedding=c.vocab * c.width * (1 if c.tied else 2),
        blocks=c.layers * layer + gates,
        images=2 * c.patch_values * c.width + 2 * side * c.width if side else 0,
        exits=len(c.exits) * c.width + (len(c.exits) - 1) * (3 * c.exit_ffn + 1) * c.width * bool(c.exit_ffn),
    )


def check(net: nn.Module, config: ModelConfig) -> None:
    """Assert that no parameter of `net`, in fp32 or in INT8 (without its scales), was left out of the count."""
    built = sum(t.numel() for name, t in net.state_dict().items() if not name.endswith("weight_scale"))
    counted = parameters(config).total
    assert built == counted, f"cost.py counts {counted} parameters, the network has {built}"


def flops_per_token(config: ModelConfig, length: int, depth: int | None = None) -> int:
    """Multiply-adds times two for one token of a forward pass at context `length`, run to `depth` layers, with its head.

    Training costs about three times this (forward, and twice as much backward).
    """
    return layer_flops(config, length, depth) + head_flops(config, depth)


def layer_flops(config: ModelConfig, length: int, depth: int | None = None) -> int:
    """Those of `flops_per_token` without what is behind the layers."""
    c = config
    layers = c.layers if depth is None else depth
    projections = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.width * c.ffn
    attention = sum(_attention_flops(c, length, c.attention_kind(layer)) for layer in range(layers))
    return 2 * layers * projections + attention


def head_flops(config: ModelConfig, depth: int | None = None) -> int:
    """Those of `flops_per_token` behind the layers: the head, and what an early exit of an adapted model has before it."""
    c = config
    early = depth is not None and depth < c.layers
    return 2 * (3 * c.width * c.exit_ffn * early + c.vocab * c.width)


def request_flops(config: ModelConfig, prompt: int, answer: int, depth: int | None = None) -> int:
    """Multiply-adds times two of a request as the engine runs it: the layers for every token of its `prompt` and of its
    `answer` but the last, and the head for those that a token is drawn from, which are as many as `answer` has. At the context
    of the training length, whatever its own is."""
    rows = prompt + max(0, answer - 1)
    return rows * layer_flops(config, config.train_length, depth) + answer * head_flops(config, depth)


def _attention_flops(c: ModelConfig, length: int, kind: str) -> int:
    """Scores and sums over what one query reads; a block's summary is scored and not summed."""
    if kind == "D" or (kind == "S" and length <= c.dense_length):
        return 4 * c.heads * length * c.head_dim
    keys, summaries = min(length, c.window), 0
    if kind in "HS":
        keys += min(length, (c.top_k + 1) * c.block)
        summaries = length // c.block * c.summary_values
    return 2 * c.heads * (2 * keys * c.head_dim + summaries)


def scoring_flops(config: ModelConfig, length: int) -> int:
    """Those of `flops_per_token` that score blocks, at full depth: they take no gradient."""
    c = config
    kinds = [c.attention_kind(layer) for layer in range(c.layers)]
    layers = kinds.count("H") + kinds.count("S") * (length > c.dense_length)
    return layers * 2 * c.heads * (length // c.block) * c.summary_values


def routing_flops(config: ModelConfig, length: int, nll: bool) -> int:
    """Multiply-adds times two to route one prompt of `length` tokens: the router's two layers and, where it reads the prompt's
    loss (`nll`), the head at the places that this is sampled at. Group 1 runs anyway."""
    early = len(config.exits) - 1
    router = (2 * config.width + EXTRA) * HIDDEN + 2 * HIDDEN * early
    places = length // sample_stride(config.page) if nll else 0
    return 2 * (places * config.vocab * config.width + router)


def kv_bytes_stored(
    config: ModelConfig,
    length: int,
    depth: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of whole units that a request of `length` tokens at `depth` owns, block summaries included, when the model computes
    in `dtype` and stores keys and values in `kv_dtype` [`dtype`]."""
    c = config
    groups = GROUPS if depth is None else c.groups(depth)
    stored = kv_dtype or dtype
    tokens = c.page * slot_width(c.head_dim, stored) * stored.itemsize
    summaries = c.page // c.block * c.summary_values * _exact(dtype.itemsize)
    return groups * -(-length // c.page) * c.group_layers * c.kv_heads * (tokens + summaries)


def kv_bytes_read(config: ModelConfig, length: int, depth: int | None = None, bytes_each: int = 4) -> int:
    """Bytes of K/V and summaries that decoding one token reads, when its pages hold `length` tokens with it, run to `depth`."""
    c, total = config, 0
    for layer in range(c.layers if depth is None else depth):
        tokens, summaries = _reads(c, length, c.attention_kind(layer))
        total += c.kv_heads * (2 * tokens * c.head_dim * bytes_each + summaries * c.summary_values * _exact(bytes_each))
    return total


def vectors_read(config: ModelConfig, length: int, kind: str = "H") -> int:
    """Vectors of d numbers (keys, values, summaries) that decoding one token reads a KV head in a layer of `kind`, when its
    pages hold `length` tokens with it. Dense attention reads 2 `length`."""
    tokens, summaries = _reads(config, length, kind)
    return 2 * tokens + summaries * config.summary_values // config.head_dim


def _reads(c: ModelConfig, length: int, kind: str) -> tuple[int, int]:
    """Tokens and summaries that decoding reads of pages with `length` tokens; whole pages where it reads all."""
    chooses, slots = kind in "HS", -(-length // c.page) * c.page
    dense = {"D": ALL, "S": c.dense_length}.get(kind, 0)
    how = way(slots, window=c.window, block=c.block, top_k=c.top_k, chooses=chooses, dense=dense)
    tokens = c.window + (c.top_k + 1) * c.block * chooses if how == "chosen" else slots
    return tokens, slots // c.block if chooses and how != "whole" else 0


def _exact(bytes_each: int) -> int:
    """Bytes of a number of a summary: fp32 or better."""
    return max(4, bytes_each)
