"""A plain GPT in PyTorch (learned positions, LayerNorm, GELU, full attention), as nanoGPT has it: what ours is measured beside.

Written for this comparison from the GPT-2 paper's description; no options, no tricks, so that it is what a reader expects.
Letters: B rows, T tokens, D width, H heads of d numbers, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class PlainLayer(nn.Module):
    """Attention over all earlier tokens, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.asked(x)
        return self.answered(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def asked(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, d] of `x` [B, T, D]."""
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        return q, k, v

    def answered(self, x: Tensor, read: Tensor) -> Tensor:
        """The layer's output [B, T, D], from its input `x` and what attention `read` [B, H, T, d]."""
        x = x + self.attention_out(read.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class PlainGPT(nn.Module):
    """`layers` layers over a table of tokens and one of positions; the head is tied to the first."""

    def __init__(self, *, vocab: int, layers: int, width: int, heads: int, length: int, seed: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(PlainLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith(("attention_out.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of `tokens` [B, T]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, nats a token, of `targets` [B, T]."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def optimizer(self, rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with decay on all matrices, tables included, as nanoGPT has it."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class PlainDecoder:
    """`model` token by token, on B rows side by side, with memory for keys and values of `length` tokens each. Flash attention
    reads them, as torch has it for the device."""

    def __init__(self, model: PlainGPT, batch: int, length: int) -> None:
        table = model.tokens.weight
        shape = batch, model.heads, length, table.shape[1] // model.heads
        self.model, self.kv = model, [(table.new_zeros(shape), table.new_zeros(shape)) for _ in model.layers]

    @torch.no_grad()
    def step(self, tokens: Tensor, place: int) -> Tensor:
        """Logits [B, V] after `tokens` [B], which stand at `place`, counted from 0; their keys and values are kept."""
        model, up_to = self.model, place + 1
        x = (model.tokens(tokens) + model.positions.weight[place])[:, None]
        for layer, (keys, values) in zip(model.layers, self.kv, strict=True):
            # one is written and all are read by kernels of torch, outside of what may be compiled: none copies the whole memory
            q, keys[:, :, place:up_to], values[:, :, place:up_to] = layer.asked(x)  # type: ignore[operator]
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                read = F.scaled_dot_product_attention(q, keys[:, :, :up_to], values[:, :, :up_to])
            x = layer.answered(x, read)  # type: ignore[operator]
        return F.linear(model.norm(x[:, 0]), model.tokens.weight)
