"""Cost arithmetic: parameters, floating-point operations and K/V bytes of a configuration, by depth.

The scheduler, the benchmarks and the report ask here, so that one formula serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from shoal.config import GROUPS, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part."""

    embedding: int  # tied: also the head
    blocks: int  # all layers
    images: int  # patch projection, row and column embeddings, next-patch head
    norms: int  # the exits' norms

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.images + self.norms


def parameters(config: ModelConfig) -> Parameters:
    """Counts from the configuration alone; `check` holds them against a built model."""
    c = config
    heads = (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    layer = c.width * heads + 3 * c.width * c.ffn + 2 * c.width + 2 * c.head_dim + c.heads
    side = c.image_size // c.patch
    return Parameters(
        embedding=c.vocab * c.width,
        blocks=c.layers * layer,
        images=2 * c.patch_values * c.width + 2 * side * c.width,
        norms=len(c.exits) * c.width,
    )


def check(net: nn.Module, config: ModelConfig) -> None:
    """Assert that no parameter of `net` was left out of the count."""
    built = sum(p.numel() for p in net.parameters())
    counted = parameters(config).total
    assert built == counted, f"cost.py counts {counted} parameters, the network has {built}"


def flops_per_token(config: ModelConfig, length: int, depth: int | None = None) -> int:
    """Multiply-adds times two for one token of a forward pass at context `length`, run to `depth` layers, with its head.

    Training costs about three times this (forward, and twice as much backward).
    """
    c = config
    layers = c.layers if depth is None else depth
    projections = c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.width * c.ffn
    return 2 * (layers * (projections + c.heads * c.head_dim * _keys_read(c, length) * 2) + c.vocab * c.width)


def kv_bytes_stored(config: ModelConfig, length: int, depth: int | None = None, bytes_each: int = 4) -> int:
    """Bytes of whole units that a request of `length` tokens at `depth` owns, block means included."""
    c = config
    groups = GROUPS if depth is None else depth // c.group_layers
    page = c.group_layers * c.kv_heads * c.head_dim * (2 * c.page * bytes_each + c.page // c.block * max(4, bytes_each))
    return groups * -(-length // c.page) * page


def vectors_read(config: ModelConfig, length: int) -> int:
    """Key, value and mean vectors that one decoded token reads a KV head a layer, at context `length`."""
    c = config
    blocks = length // c.block
    return blocks + 2 * min(length, c.window) + 2 * min(length, c.top_k * c.block + length % c.block)


def _keys_read(c: ModelConfig, length: int) -> int:
    return min(length, c.window) + min(length, (c.top_k + 1) * c.block) + length // (2 * c.block)
