"""Sparse attention of dense layers: the shape of such a model, and the biases that it learns beside weights that stay.

A dense layer becomes one of kind S: one softmax over window, sinks and best blocks in place of all of the context
(`attention`), and all of it up to `dense_length`. `evaluate.sparsity` says which layers may be so. The biases of their windows
learn what the dense model says (`TrainConfig.trains`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from shoal.config import ModelConfig, TrainConfig
from shoal.data.models import here
from shoal.errors import CheckpointError, UsageError
from shoal.model import described
from shoal.model.net import Net
from shoal.train.plan import FitPlan, planned, run_beside

T = TypeVar("T")

DENSE_LENGTH = 8192  # tokens, where a quarter of the context is no less
LONGER = 4  # dense lengths in the longest row that is measured and learned from


def with_sparse(config: ModelConfig, dense_length: int = 0) -> ModelConfig:
    """`config` with every dense layer sparse beyond `dense_length` tokens [a quarter of the context, at most 8,192]: it then
    reads a window of a quarter of that, or of as much as layers with a window, and the best blocks of half of it. Raises
    UsageError for a model without dense layers, and for a length that is none."""
    kinds = _kinds(config)
    if "D" not in kinds or set(kinds) & set("HS"):
        got = {"S": "sparse layers", "H": "hybrid layers"}.get(max(kinds), "a window in each layer")
        raise UsageError("--sparse", got=got, allowed="a model with dense layers, as imported ones have")
    page = config.page
    length = dense_length or min(DENSE_LENGTH, config.context // 4) // page * page
    if not 2 * page <= length < config.context or length % page:
        allowed = f"a multiple of {page} from {2 * page} on, below the context ({config.context})"
        raise UsageError("--dense-length", got=length, allowed=allowed)
    return dataclasses.replace(
        config,
        attn_pattern=kinds.replace("D", "S"),
        dense_length=length,
        window=config.window if "L" in kinds else max(config.block, length // 4),
        top_k=max(2, length // 2 // config.block),
        sinks=1,
        summary="mean_var",
    )


def made(net: Net, config: ModelConfig) -> Net:
    """The net of `config`, some of whose layers are sparse where those of `net` are dense: the same tensors, and biases of 0.
    Raises CheckpointError for a `net` of another shape."""
    if _dense(config) != _dense(net.config):
        raise CheckpointError("the model to make sparse is of another configuration", do="plan with the model's own")
    with torch.device("meta"):
        whole = Net(config)
    there = net.state_dict()
    none = torch.zeros(config.heads, dtype=there["embed.weight"].dtype)
    whole.load_state_dict({name: there.get(name, none.clone()) for name in whole.state_dict()}, assign=True)
    return whole


def freeze_(net: Net) -> None:
    """Let training change the biases of sparse layers alone, in place."""
    biases = bias_names(net.config)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in biases)


def backbone(state: Mapping[str, T], config: ModelConfig) -> dict[str, T]:
    """What the `state` of a net of `config` has, by name, of the tensors that the dense one has as well."""
    biases = bias_names(config)
    return {name: tensor for name, tensor in state.items() if name not in biases}


def bias_names(config: ModelConfig) -> set[str]:
    """The tensors that a sparse model has and the dense one, which it was made of, has not."""
    with torch.device("meta"):
        net = Net(config)
    return {
        f"groups.{group}.blocks.{place}.attention.gate"
        for group, part in enumerate(net.groups)
        for place, block in enumerate(part.blocks)  # type: ignore[arg-type]
        if block.attention.kind == "S"
    }


def dense_(net: Net) -> Net:
    """`net` with its sparse layers dense, in place."""
    for attention in attentions(net):
        if attention.kind == "S":
            attention.kind = "D"
    return net


def longest(config: ModelConfig) -> int:
    """Tokens of the longest row of a sparse model that is measured and learned from."""
    return min(config.context, LONGER * config.dense_length)


def sparse_plan(model: str, data: str, out: str, found: Mapping[str, Any], **more: Any) -> FitPlan:
    """Biases of the layers that `evaluate.sparsity.chosen` has `found`, beside the frozen weights of a model directory, held to
    what the dense model says."""
    name, config = described.read_config(here(model, weights=False))
    whole = dataclasses.replace(with_sparse(config, found["dense_length"]), attn_pattern=found["pattern"])
    length = longest(whole)
    train = TrainConfig(
        trains="biases",
        cross_entropy=0.0,
        distill=1.0,
        patch_weight=0.0,
        learning_rate=3e-2,
        warmup=0.02,
        decay=0.98,
        decay_shape="cosine",
        weight_decay=0.0,
        batch_tokens=length,
        accumulate=1,
        exit_warmup=0.0,
        exit_weights=(*(0.0 for _ in whole.exits[:-1]), 1.0),
        rotate_exits="off",
    )
    own = {"name": name, "data": data, "run": run_beside(out), "out": out, "init": model, "row_tokens": length}
    return planned(whole, train, {**own, **more}, minutes=10.0)


def attentions(net: Net) -> list[Any]:
    """Of all layers, in order."""
    return [block.attention for group in net.groups for block in group.blocks]  # type: ignore[union-attr]


def _kinds(config: ModelConfig) -> str:
    return "".join(config.attention_kind(layer) for layer in range(config.layers))


def _dense(config: ModelConfig) -> ModelConfig:
    """`config` but for what sparse layers add to it."""
    plain: Mapping[str, Any] = {"dense_length": 0, "window": 1, "top_k": 1, "sinks": 0, "summary": "mean"}
    return dataclasses.replace(
        config, attn_pattern=_kinds(config).replace("S", "D"), **{**plain, "window": config.block}
    )
