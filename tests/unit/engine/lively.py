"""A model whose answers tell requests apart."""

from __future__ import annotations

import torch

from shoal import Model
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.router import fit_router


def lively() -> Model:
    """The `test` preset in float64, random weights, its layers adding three times what they would, and logits ten times as far
    apart. As initialised, a random model with a tied head is nearly flat and repeats one token at any depth, so that a test
    of tokens would see little."""
    model = Model.from_preset("test", seed=3, dtype="float64")
    for group in model.net.groups:
        for block in group.blocks:  # type: ignore[union-attr]
            block.attention.out.weight.mul_(3)  # type: ignore[union-attr]
            block.mlp.down.weight.mul_(3)  # type: ignore[union-attr]
    for norm in model.net.exit_norms.values():
        norm.weight.mul_(10)  # type: ignore[operator,union-attr]
    return model


def with_router(model: Model) -> Model:
    """`model` with a router that was fitted to noise: its decisions differ from prompt to prompt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 2 * model.config.width + 3, generator=generator)
    gaps = torch.rand(96, len(model.config.exits) - 1, generator=generator)
    router = fit_router(model.config, x, gaps, steps=20)
    return Model(model.config, model.net, Tokenizer.bytes_only(), router=router)
