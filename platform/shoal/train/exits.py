"""Early exits beside a backbone that stays as it is to the bit: how they begin, and what shows that nothing else changed.

An exit is a SwiGLU and a norm of its own in front of the shared head. It begins as a copy of what stands behind the last
layer's attention, and learns to say what full depth says (`TrainConfig.trains`, `cross_entropy` 0).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.config import GROUPS, ModelConfig
from shoal.errors import CheckpointError
from shoal.model.net import Net


def with_exits(config: ModelConfig) -> ModelConfig:
    """`config` with early exits that have a SwiGLU of the layers' width; as it is where they have one already."""
    return dataclasses.replace(config, early_exits=True, exit_ffn=config.exit_ffn or config.ffn)


def added(net: Net, config: ModelConfig) -> Net:
    """The net of `config`, which is `net`'s `with_exits`: what an exit has not yet is a copy of the last layer's, all other
    tensors are those of `net`. Raises CheckpointError for a `net` of another shape."""
    if with_exits(net.config) != config:
        raise CheckpointError("the model to adapt is of another configuration", do="plan with the model's own")
    with torch.device("meta"):
        whole = Net(config)
    there = net.state_dict()
    layer = f"groups.{GROUPS - 1}.blocks.{config.ends[-1] - config.ends[-2] - 1}"
    begins = {"norm": f"{layer}.mlp_norm", "mlp": f"{layer}.mlp"}
    state: dict[str, Tensor] = {}
    for name in whole.state_dict():
        copied = f"exit_norms.{config.layers}.weight"
        if name.startswith("exit_mlps."):
            _, _, part, *rest = name.split(".")
            copied = ".".join([begins[part], *rest])
        state[name] = there[name] if name in there else there[copied].clone()
    whole.load_state_dict(state, assign=True)
    return whole


def freeze_(net: Net) -> None:
    """Let training change the early exits alone, in place."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_exits(name, net.config))


def is_exits(name: str, config: ModelConfig) -> bool:
    """Does a tensor belong to an early exit, so that full depth does not read it?"""
    kind, _, rest = name.partition(".")
    return kind == "exit_mlps" or (kind == "exit_norms" and rest.partition(".")[0] != str(config.layers))


def backbone(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a net of `config` that full depth reads."""
    return {name: tensor for name, tensor in state.items() if not is_exits(name, config)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def need_unchanged(before: str, state: Mapping[str, Tensor], config: ModelConfig) -> str:
    """The `digest` of the backbone in `state`. Raises CheckpointError where it is not the one from `before`."""
    after = digest(backbone(state, config))
    if after != before:
        raise CheckpointError(
            "training the exits changed the backbone, so nothing is written", got=after[:16], allowed=before[:16],
            do="report it: full depth must stay as it was",
        )  # fmt: skip
    return after
