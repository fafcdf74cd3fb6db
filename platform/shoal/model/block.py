"""One layer (`Block`) and a quarter of the model (`Group`), each in its parallel and in its paged form.

Letters: B rows, T tokens, N new tokens of many requests (one row each), D width, H query heads, Hk KV heads, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model import linears
from shoal.model.adapters import Beside, product
from shoal.model.attention import Layout, attend, block_summaries
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.cpu import fused
from shoal.model.cpu.parts import Form, Layer
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.linears import Int8Linear, Linear
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import ALL, Reach

# what x, and x with the dims of each turned pair swapped, are multiplied by, [..., T, 1, d]
Rope = tuple[Tensor, Tensor]
CPU = torch.device("cpu")
KNOWN = 4096  # positions whose rotation is kept
Part = tuple[tuple[Any, ...], Form, Reach]  # what `fused.layers` reads of a layer


def linear(config: ModelConfig, inputs: int, outputs: int) -> Linear | Int8Linear:
    return (Int8Linear if config.quantization == "w8a8" else Linear)(inputs, outputs)


def rope_rates(config: ModelConfig, device: torch.device) -> Tensor:
    """Of each pair of dims, float64: radians a position."""
    if config.rope_rates:
        return torch.tensor(config.rope_rates, dtype=torch.float64, device=device)
    half = pairs(config)
    return config.rope_theta ** -(torch.arange(half, dtype=torch.float64, device=device) / half)


def rope_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype, rates: Tensor | None = None) -> Rope:
    """The factors of `rotate` [..., 1, d] for each position, from angles computed in float64. `rates`: `rope_rates`, where they
    are there already."""
    half = pairs(config)
    if rates is None:
        rates = rope_rates(config, positions.device)
    angles = positions[..., None, None].double() * rates
    cos, sin = ((part * config.rope_scale).to(dtype) for part in (angles.cos(), angles.sin()))
    rest = cos.new_ones(*cos.shape[:-1], config.head_dim - 2 * half)
    return torch.cat([cos, cos, rest], dim=-1), torch.cat([-sin, sin, rest * 0], dim=-1)


def known_rope(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """`rope_tables` of `positions` [N]; on a CPU in inference those of the first `KNOWN` are looked up: to make those of one
    row takes as long as two layers of a small model."""
    may = positions.device.type == "cpu" and torch.is_inference_mode_enabled() and len(positions) > 0
    if not may or int(positions.max()) >= KNOWN:
        return rope_tables(positions, config, dtype)
    cos, sin = _first_ropes(config, dtype)
    return cos[positions], sin[positions]


@lru_cache(maxsize=8)
def _first_ropes(config: ModelConfig, dtype: torch.dtype) -> Rope:
    return rope_tables(torch.arange(KNOWN), config, dtype)


def pairs(config: ModelConfig) -> int:
    """Pairs of dims of a head that rope turns: dim i with dim i + pairs."""
    return (config.rope_dims or config.head_dim // 2) // 2


def rotate(x: Tensor, rope: Rope, half: int) -> Tensor:
    """x [..., heads, d] with its first 2 `half` dims turned; the rest stays position-free, for far recall."""
    swapped = torch.cat([x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]], dim=-1)
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
        if launch.usable(x):
            return launch.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """q, k, v from one product, QK-norm, rope, and by `kind` both branches with the learned gate between them, the window
    alone, all of the context, or one softmax over what both branches read."""

    def __init__(self, config: ModelConfig, kind: str, turned: bool = True) -> None:
        super().__init__()
        self.config, self.kind, self.turned = config, kind, turned
        heads = config.heads + 2 * config.kv_heads
        self.qkv = linear(config, config.width, heads * config.head_dim)
        self.out = linear(config, config.heads * config.head_dim, config.width)
        self.qkv_bias = nn.Parameter(torch.zeros(heads * config.head_dim)) if config.qkv_bias else None
        if config.qk_norm != "none":
            whole = config.qk_norm == "all"
            self.q_norm = Norm(config.head_dim * (config.heads if whole else 1), config.norm_eps)
            self.k_norm = Norm(config.head_dim * (config.kv_heads if whole else 1), config.norm_eps)
        self.form = Form(config.norm_eps, pairs(config) if turned else 0, config.norm_place == "after")
        self.mix_local: float | None = None  # overrides the gate at run time
        if kind == "D":
            return
        if kind == "S":  # added to the scores of the window
            self.gate = nn.Parameter(torch.zeros(config.heads))
            return
        share = min(max(config.local_weight, 1e-6), 1 - 1e-6)
        start = math.log(share / (1 - share))
        self.gate = nn.Parameter(torch.full((config.heads,), start), requires_grad=config.mix_mode == "per_head")

    def gamma(self) -> Tensor | None:
        """The local branch's share a head, [H]; None for a layer without two branches."""
        if self.kind != "H":
            return None
        if self.mix_local is not None:
            return torch.full_like(self.gate, self.mix_local)
        if self.config.mix_mode == "fixed":
            return torch.full_like(self.gate, self.config.local_weight)
        return torch.sigmoid(self.gate)

    def reach(self) -> Reach:
        """How far this layer looks in pages."""
        c = self.config
        bias = self.gate if self.kind == "S" else None
        dense = {"D": ALL, "S": c.dense_length}.get(self.kind, 0)
        return Reach(c.window, c.top_k, c.sinks, self.gamma(), bias, dense)

    def project(self, x: Tensor, rope: Rope, beside: Beside | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, d] and k, v [..., Hk, d], normed and turned."""
        c = self.config
        heads = product(self.qkv, x, beside)
        if self.qkv_bias is not None:
            heads = heads + self.qkv_bias
        heads = heads.view(*heads.shape[:-1], -1, c.head_dim)
        turned = c.heads + c.kv_heads
        qk, v = heads.split([turned, c.kv_heads], dim=-2)
        if c.qk_norm == "head":
            # q and k in one norm and one rotation: few large operators are what decoding is made of
            weight = torch.cat([self.q_norm.weight.expand(c.heads, -1), self.k_norm.weight.expand(c.kv_heads, -1)])
            qk = F.rms_norm(qk, (c.head_dim,), None, c.norm_eps) * weight
        elif c.qk_norm == "all":
            both = qk.flatten(-2).split([c.heads * c.head_dim, c.kv_heads * c.head_dim], dim=-1)
            qk = torch.cat([self.q_norm(both[0]), self.k_norm(both[1])], dim=-1).view(qk.shape)
        if self.turned:
            qk = rotate(qk, rope, pairs(c))
        q, k = qk.split([c.heads, c.kv_heads], dim=-2)
        return q, k, v

    def forward(self, x: Tensor, layout: Layout | Spans, rope: Rope, beside: Beside | None = None) -> Tensor:
        q, k, v = self.project(x, rope, beside)
        reach = self.reach()
        if isinstance(layout, Spans):
            read = sparse.attend(q, k, v, layout, reach, self.config.summary == "mean_var")
        else:
            summaries = block_summaries(k, layout, self.config.summary) if reach.chooses else None
            read = attend(q, k, v, summaries, layout, reach)
        return product(self.out, read.flatten(-2), beside)

    def beside_qkv(self, dtype: torch.dtype, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor]:
        """The bias, and the weights of the norms of q and k; of length 0 where there are none."""
        parameters, none = self._parameters, fused.none(dtype, device)  # `self.q_norm` takes a search: 0.6 us
        bias = parameters.get("qkv_bias")
        norms = [self._modules[name] for name in ("q_norm", "k_norm") if name in self._modules]
        q, k = [norm._parameters["weight"] for norm in norms] or (none, none)  # type: ignore[union-attr]
        return none if bias is None else bias, q, k  # type: ignore[return-value]

    def paged(self, x: Tensor, step: PagedStep, rope: Rope, kv: Tensor, summaries: Tensor) -> Tensor:
        if (on_cpu := fused.usable(x)) or launch.usable(x):
            heads = product(self.qkv, x, step.beside)
            store = fused.project_and_store if on_cpu else launch.project_and_store
            q = store(heads, *self.beside_qkv(x.dtype, x.device), self.form, rope, kv, summaries, step)
        else:
            q, k, v = self.project(x, rope, step.beside)
            write_kv(k, v, kv, summaries, step)
        y = paged_attention(q, kv, summaries, step, self.reach())
        return product(self.out, y.flatten(-2), step.beside)


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202), gate and up in one product."""

    def __init__(self, config: ModelConfig, inner: int) -> None:
        super().__init__()
        self.up = linear(config, config.width, 2 * inner)
        self.down = linear(config, inner, config.width)

    def forward(self, x: Tensor, beside: Beside | None = None) -> Tensor:
        both = product(self.up, x, beside)
        if fused.usable(both):
            return product(self.down, fused.swiglu(both), beside)
        if launch.usable(both):
            return product(self.down, launch.swiglu(both), beside)
        gate, up = both.chunk(2, dim=-1)
        return product(self.down, F.silu(gate) * up, beside)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.width, config.norm_eps)
        self.attention = Attention(config, config.attention_kind(layer), config.turned(layer))
        self.mlp_norm = Norm(config.width, config.norm_eps)
        self.mlp = Mlp(config, config.ffn)
        self.before = config.norm_place == "before"
        a, m = self.attention, self.mlp
        self._products = a.qkv, a.out, m.up, m.down  # `self.mlp.down` takes two searches: 1 us, at every step
        self._views = fused.Views()

    def forward(self, x: Tensor, layout: Layout | Spans, rope: Rope, beside: Beside | None = None) -> Tensor:
        return self._around(x, lambda y: self.attention(y, layout, rope, beside), beside)

    def paged(self, x: Tensor, step: PagedStep, rope: Rope, kv: Tensor, summaries: Tensor) -> Tensor:
        x, more = self.opened(x, None, step, rope, kv, summaries)
        return x if more is None else x + more

    def opened(
        self, x: Tensor, more: Tensor | None, step: PagedStep, rope: Rope, kv: Tensor, summaries: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `paged` of x + `more`; what comes back is to be added up as well. On a GPU the next layer's norm does that in its
        own launch."""

        def attention(y: Tensor) -> Tensor:
            return self.attention.paged(y, step, rope, kv, summaries)

        if not self.before or not launch.usable(x):
            return self._around(x if more is None else x + more, attention, step.beside), None
        norm = self.attention_norm
        if more is None:
            normed = norm(x)
        else:
            x, normed = launch.add_norm(x, more, norm.weight, norm.eps)
        x, normed = launch.add_norm(x, attention(normed), self.mlp_norm.weight, self.mlp_norm.eps)
        return x, self.mlp(normed, step.beside)

    def _around(self, x: Tensor, attention: Callable[[Tensor], Tensor], beside: Beside | None) -> Tensor:
        """x after `attention` and the MLP, each added to what went in, with its norm before or after it."""
        if self.before:
            if launch.usable(x):
                x, normed = launch.add_norm(
                    x, attention(self.attention_norm(x)), self.mlp_norm.weight, self.mlp_norm.eps
                )
            else:
                x = x + attention(self.attention_norm(x))
                normed = self.mlp_norm(x)
            return x + self.mlp(normed, beside)
        x = x + self.attention_norm(attention(x))
        return x + self.mlp_norm(self.mlp(x, beside))

    def arrays(self, rows: int, dtype: torch.dtype) -> tuple[Any, ...] | None:
        """What `fused.layers` reads of this layer; None where `rows` rows take another way through one of its products."""
        matrices = [each.matrix(rows, dtype) for each in self._products]
        if None in matrices:
            return None
        qkv, out, up, down = matrices
        modules = self._modules
        bias, q, k = modules["attention"].beside_qkv(dtype)  # type: ignore[union-attr, operator]
        first, second = (modules[name]._parameters["weight"] for name in ("attention_norm", "mlp_norm"))  # type: ignore[union-attr]
        return self._views.of(Layer(first, qkv, bias, q, k, out, second, up, down))  # type: ignore[arg-type]

    def added(self, beside: Beside) -> tuple[Any, ...]:
        """What `fused.layers` reads of what adapters add in this layer."""
        return beside.layer(self._products)


class ExitMlp(nn.Module):
    """What an exit of its own width adds before its norm: the half of a layer that reads one row alone, so that it stores no
    keys and values, and runs on no other rows than those that a token is drawn from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = Norm(config.width, config.norm_eps)
        self.mlp = Mlp(config, config.exit_ffn)
        self.before = config.norm_place == "before"

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.mlp(self.norm(x)) if self.before else self.norm(self.mlp(x)))


class Group(nn.Module):
    """A quarter of the layers: what a depth adds, what FSDP shards as one, and what a unit of K/V memory serves."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.first, end = (0, *config.ends)[index : index + 2]
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(self.first, end))
        self._attentions: list[Attention] = [block.attention for block in self.blocks]  # type: ignore[misc]
        self._weights = linears.Held(self.blocks)
        # what the weights were, and what is made of these; together, as engines in other threads may share this
        self._seen: tuple[list[object], dict[tuple[Any, ...], list[Part]]] = [], {}

    def forward(
        self, x: Tensor, layout: Layout | Spans, rope: Rope, skip: Collection[int] = (), beside: Beside | None = None
    ) -> Tensor:
        """x [B, T, D] after these layers, but for those in `skip`."""
        for layer, block in enumerate(self.blocks, self.first):
            if layer not in skip:
                x = block(x, layout, rope, beside)
        return x

    def paged(self, x: Tensor, step: PagedStep, cache: GroupCache) -> Tensor:
        """x [N, D] after these layers; the new K/V are written to `cache` at ``step.slots``."""
        try:
            return self.stepped(x, step, cache)
        except Exception as error:
            launch.give_up(x.device, error)
            return self.stepped(x, step, cache)

    def stepped(self, x: Tensor, step: PagedStep, cache: GroupCache) -> Tensor:
        """As `paged`; raises Triton's error where a GPU refuses a kernel."""
        kind = launch.fp(x.dtype) if launch.usable(x) else x.dtype
        rope = step.rows.by_row(("rope", kind), lambda: known_rope(step.positions, self.config, kind))
        if parts := self._in_one_call(x, step):
            added = [block.added(step.beside) for block in self.blocks] if step.beside is not None else []  # type: ignore[operator]
            return fused.layers(x, parts, rope, cache, step, added)
        more: Tensor | None = None
        for j, block in enumerate(self.blocks):
            x, more = block.opened(x, more, step, rope, cache.kv[j], cache.summaries[j])  # type: ignore[operator]
        return x if more is None else x + more

    def _in_one_call(self, x: Tensor, step: PagedStep) -> list[Part]:
        """What `fused.layers` reads; empty where rows like those of `x` [N, D] take another way."""
        if step.rows.longest > fused.SHORT or not fused.usable(x):
            return []
        return self._parts(len(x), x.dtype)

    def _parts(self, rows: int, dtype: torch.dtype) -> list[Part]:
        """What `fused.layers` reads for so many `rows`; empty where these take another way. What it is made of is looked for
        once, and again when a weight has changed: a step of 30 layers would spend a third of its time on that."""
        now, (seen, parts) = self._weights.state(), self._seen
        if now != seen:
            self._seen = now, (parts := {})
        key = rows, dtype, torch.get_num_threads(), *[each.mix_local for each in self._attentions]
        found = parts.get(key)
        if found is None:
            arrays = [block.arrays(rows, dtype) for block in self.blocks]  # type: ignore[operator]
            each = zip(arrays, self._attentions, strict=True)
            found = [] if None in arrays else [(part, layer.form, layer.reach()) for part, layer in each]
            # a gate that may change without a trace: what follows from it is not kept
            gates = [layer._parameters.get("gate") for layer in self._attentions]
            if not any(gate is not None and gate.is_inference() for gate in gates):
                parts[key] = found
        return found

    def stretch(
        self, positions: np.ndarray, slots: np.ndarray, tables: np.ndarray, cache: GroupCache, dtype: torch.dtype
    ) -> fused.Stretch | None:
        """To run one row of each of R requests through these layers, K times one after the other, at `positions` [K, R] and to
        `slots` [K, R], with the pages `tables` [R, M]; int64 all. None where rows of `dtype` take another way."""
        rope = known_rope(torch.from_numpy(positions.ravel()), self.config, dtype)
        if not fused.usable(rope[0]) or not (parts := self._parts(positions.shape[1], dtype)):
            return None
        return fused.Stretch(parts, rope, cache, positions, slots, tables)
