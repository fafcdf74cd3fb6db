"""INT8 of weights that were not trained with its rounding: what activations have too much of, the weights take over.

The activations of a token share one scale (`quant`), so a channel a hundred times as large as the others leaves them no levels.
It is divided by s where it comes from, and the weights that read it are multiplied by s: the network computes the same.

    s_j = a_j^STRENGTH / w_j^(1 - STRENGTH)      a_j, w_j: largest activation and weight of channel j

SmoothQuant, arXiv 2211.10438, which does so for norms alone. Channels come from the gain of a norm (qkv, up, head), from the
rows of `up` that are not the gate (down), and from v (out). A tied head becomes one of its own, since rows of the token table
may not change.

Letters: T tokens, O outputs, I inputs of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from shoal.model.block import Attention, Block, ExitMlp, Mlp, Norm
from shoal.model.linears import Linear
from shoal.model.net import Net

STRENGTH = 0.7  # the best of 0.3, 0.5, 0.7 and 0.85 for SmolLM2-135M
LEAST = 1e-3  # of the largest: a channel that was never seen to be used may be, later
HEAD = "output"

Factors = dict[str, Tensor]  # by name in the state of a network: what the tensor is multiplied by


@torch.inference_mode()
def largest(net: Net, rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """The largest magnitude [I] of each channel that each `Linear` of `net` reads, and its head (`HEAD`), over `rows` of
    ids [T]."""
    found: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        now = x.abs().flatten(0, -2).amax(0)
        found[name] = torch.maximum(found[name], now) if name in found else now

    products = {name: module for name, module in net.named_modules() if isinstance(module, Linear) and name != HEAD}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, module in products.items()
    ]
    try:
        for row in rows:
            for layers, hidden in net(row[None], exits=net.config.exits).items():
                see(HEAD, net.exit(hidden, layers))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def factors(net: Net, seen: Mapping[str, Tensor]) -> Factors:
    """What the tensors of `net` are multiplied by, from what `largest` found."""
    made: Factors = {}
    for name, by in _pairs(net, seen):
        made[name] = made[name] * by if name in made else by
    return made


def smoothed(state: Mapping[str, Tensor], by: Factors) -> dict[str, Tensor]:
    """`state` with the channels of `by` moved: that of a network whose head is its own, which computes the same. At least in
    fp32."""
    whole = {HEAD + ".weight": state["embed.weight"], **state}
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * by[name] if name in by else tensor
        for name, tensor in whole.items()
    }


def _pairs(net: Net, seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, module in net.named_modules():
        if isinstance(module, Block):
            yield from _attention(f"{name}.attention", module.attention, seen)
            yield from _mlp(f"{name}.mlp", module.mlp, seen)
            if module.before:
                qkv = f"{name}.attention.qkv"
                yield from _normed(f"{name}.attention_norm", qkv, module.attention.qkv, seen)
                yield from _normed(f"{name}.mlp_norm", f"{name}.mlp.up", module.mlp.up, seen)
        elif isinstance(module, ExitMlp):
            yield from _mlp(f"{name}.mlp", module.mlp, seen)
            if module.before:
                yield from _normed(f"{name}.norm", f"{name}.mlp.up", module.mlp.up, seen)
    by = _scale(seen[HEAD], (net.embed if net.output is None else net.output).weight.abs().amax(0))
    yield f"{HEAD}.weight", by
    for name, module in net.exit_norms.named_children():
        assert isinstance(module, Norm)
        yield f"exit_norms.{name}.weight", 1 / by


def _normed(norm: str, name: str, product: nn.Module, seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    by = _scale(seen[name], product.weight.abs().amax(0))  # type: ignore[operator]
    yield f"{norm}.weight", 1 / by
    yield f"{name}.weight", by


def _mlp(name: str, mlp: Mlp, seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    by = _scale(seen[f"{name}.down"], mlp.down.weight.abs().amax(0))
    yield f"{name}.up.weight", torch.cat([torch.ones_like(by), 1 / by])[:, None]  # the gate stays
    yield f"{name}.down.weight", by


def _attention(name: str, attention: Attention, seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A K/V head is read by several heads: they share the scale of its channels."""
    c = attention.config
    heads = c.kv_heads, c.heads // c.kv_heads, c.head_dim
    weight = attention.out.weight.abs().amax(0)
    by = _scale(seen[f"{name}.out"].view(heads).amax(1).flatten(), weight.view(heads).amax(1).flatten())
    values = torch.cat([by.new_ones((c.heads + c.kv_heads) * c.head_dim), 1 / by])
    yield f"{name}.qkv.weight", values[:, None]
    if attention.qkv_bias is not None:
        yield f"{name}.qkv_bias", values
    shared = by.view(c.kv_heads, 1, c.head_dim).expand(heads)
    yield f"{name}.out.weight", shared.flatten()


def _scale(activation: Tensor, weight: Tensor) -> Tensor:
    """s [I], 1 in the geometric mean, at least in fp32."""
    a, w = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (activation, weight))
    a, w = (x.clamp(min=max(LEAST * x.max().item(), torch.finfo(x.dtype).tiny)) for x in (a, w))
    logs = STRENGTH * a.log() - (1 - STRENGTH) * w.log()
    return (logs - logs.mean()).exp()
