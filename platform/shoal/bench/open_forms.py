"""Which form an early exit beside a frozen net should have: each learns what full depth says, from the same rows.

    norm      a norm of its own, and nothing before it
    last      a SwiGLU that begins as the last layer's, as `shoal adapt` has it, here without its last matrix solved for
    before    a SwiGLU that begins as that of the layer before the exit
    layer     a whole layer that begins as the last one: it has keys and values of its own, so this is for comparison alone

Letters: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.bench.open_parts import TRAIN, Texts
from shoal.model.attention import Layout
from shoal.model.block import Block, ExitMlp, rope_tables
from shoal.model.net import Net
from shoal.train.exits import with_exits
from shoal.train.optim import learning_rate, make_optimizer

FORMS = ("norm", "last", "before", "layer")


class Exits(nn.Module):
    """The early exits of one `form` beside `net`, whose weights stay as they are."""

    def __init__(self, net: Net, form: str) -> None:
        super().__init__()
        self.layers = dataclasses.replace(net.config, early_exits=True).exits[:-1]
        norm = net.exit_norms[str(net.config.layers)]
        self.norms = nn.ModuleDict({str(e): copy.deepcopy(norm) for e in self.layers})
        self.bodies = nn.ModuleDict({str(e): self._body(net, form, e) for e in self.layers})
        self.requires_grad_(True)

    @staticmethod
    def _body(net: Net, form: str, layers: int) -> nn.Module:
        if form == "norm":
            return nn.Identity()
        block = block_of(net, layers - 1 if form == "before" else net.config.layers - 1)
        if form == "layer":
            return copy.deepcopy(block)
        body = ExitMlp(with_exits(net.config))
        body.norm.load_state_dict(block.mlp_norm.state_dict())
        body.mlp.load_state_dict(block.mlp.state_dict())
        return body

    def forward(self, net: Net, hidden: dict[int, Tensor]) -> dict[int, Tensor]:
        """Logits [B, T, V] at each exit, of the states [B, T, D] there."""
        said = {}
        for e in self.layers:
            x, body = hidden[e], self.bodies[str(e)]
            if isinstance(body, Block):
                c, docs = net.config, torch.zeros(x.shape[:2], dtype=torch.long)
                layout = Layout.packed(docs, window=c.window, block=c.block, sinks=c.sinks)
                x = body(x, layout, rope_tables(layout.positions, c, x.dtype), None)
            else:
                x = body(x)
            said[e] = net.logits(self.norms[str(e)](x))
        return said


def block_of(net: Net, layer: int) -> Block:
    """The layer of this number, from 0."""
    every = [block for group in net.groups for block in group.blocks]  # type: ignore[union-attr]
    found: Block = every[layer]
    return found


def learned(net: Net, texts: Texts, *, seed: int, steps: int) -> dict[str, Exits]:
    """Exits of each form after `steps` updates by KL(full depth || exit), the mean over tokens and exits."""
    train = dataclasses.replace(TRAIN, optimizer="adamw", learning_rate=1e-3)
    forms = {form: Exits(net, form) for form in FORMS}
    optimizers = {form: make_optimizer(exits, train) for form, exits in forms.items()}
    for step in range(steps):
        hidden = _states(net, texts.batch(seed, step, net.config.train_length).tokens)
        with torch.no_grad():
            full = net.head(hidden[net.config.layers], net.config.layers).log_softmax(-1)
        for form, exits in forms.items():
            losses = [
                F.kl_div(logits.log_softmax(-1), full, reduction="none", log_target=True).sum(-1).mean()
                for logits in exits(net, hidden).values()
            ]
            optimizer = optimizers[form]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            nn.utils.clip_grad_norm_(exits.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / steps, train)
            optimizer.step()
    return forms


@torch.no_grad()
def bits_of(net: Net, forms: dict[str, Exits], texts: Texts) -> dict[str, dict[str, float]]:
    """Held-out bits a byte of each form at each exit."""
    names = {layers: name for name, layers in dataclasses.replace(net.config, early_exits=True).exit_names.items()}
    nats = {form: dict.fromkeys((names[e] for e in exits.layers), 0.0) for form, exits in forms.items()}
    size = 0
    for row in texts.rows(net.config.train_length).split(8):
        hidden, targets = _states(net, row[:, :-1]), row[:, 1:]
        size += int(texts.bytes[targets].sum())
        for form, exits in forms.items():
            for e, logits in exits(net, hidden).items():
                nats[form][names[e]] += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return {
        form: {name: value / math.log(2) / max(size, 1) for name, value in each.items()} for form, each in nats.items()
    }


def _states(net: Net, tokens: Tensor) -> dict[int, Tensor]:
    """Hidden states [B, T, D] at each exit that `net` has or might have, of tokens [B, T]."""
    with torch.no_grad():
        return net(tokens, exits=dataclasses.replace(net.config, early_exits=True).exits)
