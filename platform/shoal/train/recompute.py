"""What backward computes again in place of keeping it: whole layers, or what is cheap of them (selective checkpointing).

Selectively a layer keeps its input, what attention gave and the products that read the residual stream (q, k and v; gate and
up), and computes again norms, rotations, masks, activations, and the product that brings attention back to the width; that of
the FFN nobody asks for. These are two of a layer's four products, which torchtitan counts (`_op_sac_save_list`) and which are
told by their shapes here, as LoRA adds others between them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shoal.config import ModelConfig
from shoal.model.cost import flops_per_token
from shoal.model.gpu import sparse  # noqa: F401  # makes the operators that are named below
from shoal.train.compiled import Compiler

Recompute = Literal[False, True, "selective"]
WAYS: tuple[Recompute, ...] = (False, "selective", True)  # the fastest first, and what holds most memory

_aten, _shoal = torch.ops.aten, torch.ops.shoal
ATTENTION = frozenset(
    {
        _shoal.near.default,
        _shoal.choose.default,
        _shoal.chosen.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def again(
    forward: Callable[..., Tensor], how: Recompute, width: int, *, compiler: Compiler | None = None
) -> Callable[..., Tensor]:
    """`forward` of a layer of a model of this `width`, as `how` says, and compiled where there is a `compiler`."""
    if how == "selective":
        forward = _selective(forward, width)  # inside: what is compiled has no operators to choose from
    ways = [forward] if compiler is None else [compiler.graph(forward), forward]
    if how and how != "selective":  # around: inside, nothing would be compiled
        ways = [partial(checkpoint, way, use_reentrant=False) for way in ways]
    # around both: what runs again in backward takes the way that it took
    return ways[0] if compiler is None else compiler.either(*ways)


def _selective(forward: Callable[..., Tensor], width: int) -> Callable[..., Tensor]:
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, width))

    def layer(*given: Any) -> Tensor:
        found: Tensor = checkpoint(forward, *given, use_reentrant=False, context_fn=contexts)
        return found

    return layer


def policy(width: int, _: object, operator: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    """Whether what `operator` makes of `given` in a layer is kept."""
    kept = operator in ATTENTION
    if operator is _aten.mm.default:
        inputs, outputs = given[1].shape
        kept = inputs == width != outputs
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def numbers_kept(config: ModelConfig, kind: str, how: Recompute, *, low: int) -> int:
    """Numbers, of `low` bytes each, that a layer of this `kind` of attention keeps of a token until it is computed again."""
    c = config
    if how != "selective":
        return c.width
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    branches = 2 if kind == "H" or (kind == "S" and low < 4) else 1
    exact = 4 // low  # numbers in one of 4 bytes
    choice = c.kv_heads * c.top_k * exact if kind in "HS" and low < 4 else 0
    return c.width + heads + branches * c.heads * (c.head_dim + exact) + choice + 2 * c.ffn


def flops_again(config: ModelConfig, how: Recompute) -> int:
    """Operations a token that layers compute again in backward, of rows of the training length."""
    c = config
    if how != "selective":
        heads = 2 * c.vocab * c.width
        return (flops_per_token(c, c.train_length) - heads) * bool(how)
    outputs = c.heads * c.head_dim + c.ffn * (c.norm_place == "after")  # whose norm asks for it, too
    return 2 * c.layers * c.width * outputs
