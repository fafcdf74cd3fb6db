"""One depth of an adapted model as a model of its family: the layers up to the exit, and one more that is the exit.

The SwiGLU of an exit is a layer whose attention gives nothing: its last matrix is zero, so that zeros are added. Where a model
must have more layers than that, the rest give nothing at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shoal.config import GROUPS, ModelConfig
from shoal.errors import CheckpointError

BY_LAYER = ("layer_types", "no_rope_layers")  # keys of a config.json with an entry for each layer
_OF_EXIT = {
    "mlp_norm.weight": "norm.weight",
    "mlp.up.weight": "mlp.up.weight",
    "mlp.down.weight": "mlp.down.weight",
}


def alone(config: ModelConfig, depth: str | int) -> ModelConfig:
    """The shape of the model that an exit of `config` is by itself. Raises ConfigError for a `depth` that is none,
    CheckpointError for an exit that is no layer of this model."""
    layers = config.depth(depth)
    if layers == config.layers:
        return dataclasses.replace(config, early_exits=False, exit_ffn=0)
    if config.exit_ffn != config.ffn:
        got, allowed = f"a width of {config.exit_ffn}", f"{config.ffn}, the layers'"
        raise CheckpointError(f"exit {depth}, as a layer", got=got, allowed=allowed)
    count = max(layers + 1, GROUPS)
    kinds = [config.attention_kind(min(layer, layers - 1)) for layer in range(count)]
    turned = ["R" if config.turned(min(layer, layers - 1)) else "N" for layer in range(count)]
    return dataclasses.replace(
        config, layers=count, attn_pattern="".join(kinds), rope_pattern="".join(turned), early_exits=False, exit_ffn=0
    )


def origin(ours: str, config: ModelConfig, layers: int, cut: ModelConfig) -> str | float:
    """Which tensor of a model of `config` a tensor of its `cut` at the exit after `layers` layers is, or the number that
    it is filled with."""
    if layers == config.layers:
        return ours
    if ours.startswith("exit_norms."):
        return f"exit_norms.{layers}.weight"
    place = _places(cut)
    prefix, _, rest = ".".join(ours.split(".")[:4]), "", ".".join(ours.split(".")[4:])
    if prefix not in place:
        return ours
    number = place.index(prefix)
    if number < layers:
        return f"{_places(config)[number]}.{rest}"
    if number == layers and rest in _OF_EXIT:
        return f"exit_mlps.{layers}.{_OF_EXIT[rest]}"
    return 1.0 if rest.endswith("norm.weight") else 0.0


def described(told: Mapping[str, Any], layers: int, cut: ModelConfig) -> dict[str, Any]:
    """The config.json of the source of a model as that of its `cut`."""
    if told.get("num_hidden_layers") == cut.layers:
        return dict(told)
    found = {**told, "num_hidden_layers": cut.layers}
    for key in BY_LAYER:
        if isinstance(told.get(key), list):
            found[key] = [told[key][min(layer, layers - 1)] for layer in range(cut.layers)]
    return found


def _places(config: ModelConfig) -> list[str]:
    """Where each layer stands."""
    starts = (0, *config.ends)
    return [
        f"groups.{group}.blocks.{layer - starts[group]}"
        for group in range(GROUPS)
        for layer in range(starts[group], starts[group + 1])
    ]
