"""One layer (`Block`) and a quarter of the model (`Group`), each in its parallel and in its paged form.

Letters: B rows, T tokens, N new tokens of many requests (one row each), D width, H query heads, Hk KV heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model import fused
from shoal.model.attention import Layout, attend, block_summaries
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.linears import Int8Linear, Linear
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import Reach

Rope = tuple[Tensor, Tensor]  # what x and x with its first two quarters swapped are multiplied by, [..., T, 1, d]


def linear(config: ModelConfig, inputs: int, outputs: int) -> Linear | Int8Linear:
    return (Int8Linear if config.quantization == "w8a8" else Linear)(inputs, outputs)


def rope_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """The factors of `rotate` [..., 1, d] for each position, from angles computed in float64."""
    quarter = config.head_dim // 4
    rates = config.rope_theta ** -(torch.arange(quarter, dtype=torch.float64, device=positions.device) / quarter)
    angles = positions[..., None, None].double() * rates
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    rest = cos.new_ones(*cos.shape[:-1], config.head_dim - 2 * quarter)
    return torch.cat([cos, cos, rest], dim=-1), torch.cat([-sin, sin, rest * 0], dim=-1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [..., heads, d] with its first d/2 dims turned; the rest stays position-free, for far recall."""
    quarter = x.shape[-1] // 4
    swapped = torch.cat([x[..., quarter : 2 * quarter], x[..., :quarter], x[..., 2 * quarter :]], dim=-1)
    return torch.addcmul(x * rope[0], swapped, rope[1])


class Norm(nn.Module):
    """RMS norm over the last axis (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if fused.usable(x):
            return fused.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """q, k, v from one product, QK-norm, rope, both branches, and the learned gate between them."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        heads = config.heads + 2 * config.kv_heads
        self.qkv = linear(config, config.width, heads * config.head_dim)
        self.out = linear(config, config.heads * config.head_dim, config.width)
        self.q_norm = Norm(config.head_dim, config.norm_eps)
        self.k_norm = Norm(config.head_dim, config.norm_eps)
        self.mix_local: float | None = None  # overrides the gate at run time
        share = min(max(config.local_weight, 1e-6), 1 - 1e-6)
        start = math.log(share / (1 - share))
        self.gate = nn.Parameter(torch.full((config.heads,), start), requires_grad=config.mix_mode == "per_head")

    def gamma(self) -> Tensor | None:
        """The local branch's share a head, [H]; None for a layer that reads the window only."""
        if self.kind == "L":
            return None
        if self.mix_local is not None:
            return torch.full_like(self.gate, self.mix_local)
        if self.config.mix_mode == "fixed":
            return torch.full_like(self.gate, self.config.local_weight)
        return torch.sigmoid(self.gate)

    def reach(self) -> Reach:
        """How far this layer looks in pages."""
        return Reach(self.config.window, self.config.top_k, self.config.sinks, self.gamma())

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, d] and k, v [..., Hk, d], normed and turned."""
        c = self.config
        heads = self.qkv(x)
        heads = heads.view(*heads.shape[:-1], -1, c.head_dim)
        turned = c.heads + c.kv_heads
        # q and k in one norm and one rotation: few large operators are what decoding is made of
        weight = torch.cat([self.q_norm.weight.expand(c.heads, -1), self.k_norm.weight.expand(c.kv_heads, -1)])
        qk, v = heads.split([turned, c.kv_heads], dim=-2)
        qk = rotate(F.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * weight, rope)
        q, k = qk.split([c.heads, c.kv_heads], dim=-2)
        return q, k, v

    def forward(self, x: Tensor, layout: Layout, rope: Rope) -> Tensor:
        q, k, v = self.project(x, rope)
        gamma = self.gamma()
        summaries = block_summaries(k, layout, self.config.summary) if gamma is not None else None
        return self.out(attend(q, k, v, summaries, layout, self.config.top_k, gamma).flatten(-2))

    def paged(self, x: Tensor, step: PagedStep, rope: Rope, kv: Tensor, summaries: Tensor) -> Tensor:
        c = self.config
        if fused.usable(x):
            weights = self.q_norm.weight, self.k_norm.weight
            q = fused.project_and_store(self.qkv(x), *weights, c.norm_eps, rope, kv, summaries, step)
        else:
            q, k, v = self.project(x, rope)
            write_kv(k, v, kv, summaries, step)
        y = paged_attention(q, kv, summaries, step, self.reach())
        return self.out(y.flatten(-2))


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202), gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = linear(config, config.width, 2 * config.ffn)
        self.down = linear(config, config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        if fused.usable(both):
            return self.down(fused.swiglu(both))
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_eps)
        self.attention = Attention(config, config.attention_kind(layer))
        self.mlp_norm = Norm(config.width, config.norm_eps)
        self.mlp = Mlp(config)
        a, m = self.attention, self.mlp
        self._products = a.qkv, a.out, m.up, m.down  # `self.mlp.down` takes two searches: 1 us, at every step
        self._norms = self.attention_norm, a.q_norm, a.k_norm, self.mlp_norm
        self._views = fused.Views()

    def forward(self, x: Tensor, layout: Layout, rope: Rope) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layout, rope)
        return x + self.mlp(self.mlp_norm(x))

    def paged(self, x: Tensor, step: PagedStep, rope: Rope, kv: Tensor, summaries: Tensor) -> Tensor:
        x = x + self.attention.paged(self.attention_norm(x), step, rope, kv, summaries)
        return x + self.mlp(self.mlp_norm(x))

    def arrays(self, rows: int, dtype: torch.dtype) -> list[Any] | None:
        """What `fused.layers` reads of this layer; None where `rows` rows take another way through one of its products."""
        matrices = [product.matrix(rows, dtype) for product in self._products]
        if None in matrices:
            return None
        qkv, out, up, down = matrices
        before, q_norm, k_norm, between = [norm._parameters["weight"] for norm in self._norms]
        return self._views.of((before, *qkv, q_norm, k_norm, *out, between, *up, *down))  # type: ignore[arg-type, misc]


class Group(nn.Module):
    """A quarter of the layers: what a depth adds, what FSDP shards as one, and what a unit of K/V memory serves."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.first = index * config.group_layers
        self.blocks = nn.ModuleList(Block(config, self.first + j) for j in range(config.group_layers))

    def forward(self, x: Tensor, layout: Layout, rope: Rope, skip: Collection[int] = ()) -> Tensor:
        """x [B, T, D] after these layers, but for those in `skip`."""
        for layer, block in enumerate(self.blocks, self.first):
            if layer not in skip:
                x = block(x, layout, rope)
        return x

    def paged(self, x: Tensor, step: PagedStep, cache: GroupCache) -> Tensor:
        """x [N, D] after these layers; the new K/V are written to `cache` at ``step.slots``."""
        rope = step.rows.once("rope", lambda: rope_tables(step.positions, self.config, x.dtype))
        if parts := self._in_one_call(x, step):
            return fused.layers(x, parts, self.config.norm_eps, rope, cache, step)
        for j, block in enumerate(self.blocks):
            x = block.paged(x, step, rope, cache.kv[j], cache.summaries[j])  # type: ignore[operator]
        return x

    def _in_one_call(self, x: Tensor, step: PagedStep) -> list[tuple[list[Any], Reach]]:
        """What `fused.layers` reads; empty where rows like those of `x` [N, D] take another way."""
        parts = []
        for block in self.blocks if step.rows.longest <= fused.SHORT and fused.usable(x) else ():
            arrays = block.arrays(len(x), x.dtype)  # type: ignore[operator]
            if arrays is None:
                return []
            parts.append((arrays, block.attention.reach()))  # type: ignore[operator, union-attr]
        return parts
