"""LoRA (arXiv 2106.09685): train a product of two thin matrices beside each frozen one of the layers, and add it in at the end.

For bases that are large beside the data: gradients and moments are those of the thin matrices alone. The model that is written
has the shape of the one it started from.
Letters: I input width, O output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.machine import aside
from shoal.model.cpu.parts import Matrix
from shoal.model.linears import Linear
from shoal.model.net import Net

SCALE = 2.0  # of what is added; the paper's alpha / r
FILE = "lora.safetensors"  # in a run's folder: what was trained


class LoraLinear(Linear):
    """`base`, frozen by `adapt_`, plus `SCALE` B A, with A [r, I] random and B [O, r] zero at the start."""

    def __init__(self, base: Linear, rank: int, generator: torch.Generator) -> None:
        outputs, inputs = base.weight.shape
        with torch.device("meta"):
            super().__init__(inputs, outputs)
        self.weight = base.weight
        self.lora_a = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) + SCALE * (x @ self.lora_a.T) @ self.lora_b.T

    def matrix(self, rows: int, dtype: torch.dtype) -> Matrix | None:
        return None  # one matrix is not the whole product


def adapt_(net: Net, rank: int, seed: int) -> None:
    """Freeze `net` and put thin matrices of `rank` beside those of its layers, in place."""
    net.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for group in net.groups:
        for module in list(group.modules()):
            for name, child in list(module.named_children()):
                if type(child) is Linear:
                    setattr(module, name, LoraLinear(child, rank, generator))


def count(config: ModelConfig, rank: int) -> int:
    """How many numbers `adapt_` adds to a net of `config`."""
    c = config
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    sides = (c.width, heads), (c.heads * c.head_dim, c.width), (c.width, 2 * c.ffn), (c.ffn, c.width)
    return c.layers * rank * sum(inputs + outputs for inputs, outputs in sides)


def is_thin(name: str) -> bool:
    """Is a tensor of a net of `adapt_` one that was put there?"""
    return name.endswith((".lora_a", ".lora_b"))


def merged(name: str, tensor: Tensor, thin: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the net as it was before `adapt_`, with what was trained added in: the `thin` matrices, by name."""
    base = name.removesuffix(".weight")
    if f"{base}.lora_a" not in thin:
        return tensor
    return tensor + SCALE * thin[f"{base}.lora_b"] @ thin[f"{base}.lora_a"]


def save(run: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write the thin matrices in the `state` of a net of `adapt_` to a run's folder, as ``NAME.lora_a`` [r, I] and
    ``NAME.lora_b`` [O, r]; `SCALE` is not in them."""
    thin = {name: tensor.contiguous() for name, tensor in state.items() if is_thin(name)}
    with aside(Path(run) / FILE) as beside:
        save_file(thin, str(beside), metadata={"format": "pt"})
