"""A model whose answers tell requests apart."""

from __future__ import annotations

from shoal import Model


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
