"""LoRA (arXiv 2106.09685): train a product of two thin matrices beside each frozen one of the layers, and add it in at the end.

For bases that are large beside the data: gradients and moments are those of the thin matrices alone. The model that is written
has the shape of the one it started from.
Letters: I input width, O output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.model import fused
from shoal.model.linears import Linear
from shoal.model.net import Net

SCALE = 2.0  # of what is added; the paper's alpha / r


class LoraLinear(Linear):
    """`base`, frozen, plus `SCALE` B A, with A [r, I] random and B [O, r] zero at the start."""

    def __init__(self, base: Linear, rank: int, generator: torch.Generator) -> None:
        outputs, inputs = base.weight.shape
        with torch.device("meta"):
            super().__init__(inputs, outputs)
        self.weight = base.weight
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def product(self, x: Tensor) -> Tensor:
        return super().product(x) + SCALE * (x @ self.lora_a.T) @ self.lora_b.T

    def matrix(self, rows: int, dtype: torch.dtype) -> fused.Matrix | None:
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


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the net as it was before `adapt_`, with what was trained added in."""
    out = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name in [name.removesuffix(".lora_a") for name in state if name.endswith(".lora_a")]:
        out[f"{name}.weight"] = out[f"{name}.weight"] + SCALE * state[f"{name}.lora_b"] @ state[f"{name}.lora_a"]
    return out
