"""Early exits beside a backbone that stays as it is to the bit: how they begin, and what shows that nothing else changed.

An exit is a SwiGLU and a norm of its own in front of the shared head. It begins as a copy of what stands behind the last
layer's attention, whose last matrix is then solved for: ridge regression of full depth's states (decision 0004). From there it
learns to say what full depth says (`TrainConfig.trains`, `cross_entropy` 0).

Letters: M tokens, F inner width of an exit, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from shoal.config import GROUPS, ModelConfig
from shoal.data.batches import Batch
from shoal.errors import CheckpointError
from shoal.model.block import ExitMlp
from shoal.model.net import Net
from shoal.train.parallel import Ranks

T = TypeVar("T")

SOLVED_ON = 2.7  # tokens for each inner channel of an exit that its last matrix is solved on
RIDGE = 3e-3  # of the mean channel's energy, added to each: the best of 3e-4 to 1 for SmolLM2-135M


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


JUDGED_ON = 512  # tokens that say whether the solution is kept


def begins_solved(before: ModelConfig, after: ModelConfig) -> bool:
    """Can the exits that `after` has more be solved for? Not those that had a norm of their own, which reads other states, and
    not where the norm behind the matrix makes the sum no linear one."""
    return not before.early_exits and after.exit_ffn > 0 and after.norm_place == "before"


def updates_solved_on(config: ModelConfig, batch_tokens: int, most: int) -> int:
    """Of how many updates, of `most`, the batches are read to `solve_`; the last is judged on."""
    return min(most, max(2, math.ceil(SOLVED_ON * config.exit_ffn / batch_tokens)))


@torch.no_grad()
def solve_(net: Net, updates: Sequence[Sequence[Batch]], ranks: Ranks) -> None:
    """Set the last matrix of each early exit, in place and alike on all ranks, to what brings its states closest to those of
    full depth over `updates`, each the batches of this rank; or leave it, where what it says of the last, which was not solved
    on, is closer as it is: however many workers and batches an update is cut into. Each token weighs the inverse square of its
    state's length at full depth, since the norm that comes next takes lengths away."""
    c = net.config
    sums = {e: _Sums(c.exit_ffn, c.width, ranks.device) for e in c.exits[:-1]}
    for batch in (batch for update in updates[:-1] or updates for batch in update):
        states = _states(net, batch)
        full = states[c.layers].double()
        weight = 1 / full.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        for e, each in sums.items():
            read = _channels(net.exit_mlps[str(e)], states[e])  # type: ignore[arg-type]
            each.add(weight * read.double(), weight * (full - states[e].double()))
    said = [_states(net, batch) for batch in updates[-1]]
    judged = {e: torch.cat([states[e] for states in said]) for e in c.exits}
    for e, each in sums.items():
        weights, found = net.exit_mlps[str(e)].mlp.down.weight, each.solved(ranks)  # type: ignore[union-attr]
        before, copied = _apart(net, judged, e, ranks), weights.clone()  # type: ignore[operator]
        weights.copy_(found)  # type: ignore[operator]
        if not _apart(net, judged, e, ranks) < before:
            weights.copy_(copied)  # type: ignore[operator]


def _states(net: Net, batch: Batch) -> dict[int, Tensor]:
    """Hidden states [M, D] of the tokens of `batch` at each exit."""
    found = net(batch.tokens, batch.patches, batch.grid, batch.docs, exits=net.config.exits)
    return {e: states[batch.docs >= 0] for e, states in found.items()}


def _apart(net: Net, states: Mapping[int, Tensor], exit_: int, ranks: Ranks) -> float:
    """KL(full depth || exit), nats, summed over some tokens of all ranks."""
    some = {e: states[e][:JUDGED_ON] for e in (exit_, net.config.layers)}
    theirs, ours = (net.head(some[e], e).float().log_softmax(-1) for e in (net.config.layers, exit_))
    return float(ranks.sum((theirs.exp() * (theirs - ours)).sum().double()))


def _channels(exit_mlp: ExitMlp, states: Tensor) -> Tensor:
    """[M, F]: what the last matrix of an exit reads of `states` [M, D]."""
    seen: list[Tensor] = []
    hook = exit_mlp.mlp.down.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        exit_mlp(states)
    finally:
        hook.remove()
    return seen[0]


class _Sums:
    """What a regression of wanted on read values needs of them, over all tokens, in float64."""

    def __init__(self, read: int, wanted: int, device: torch.device) -> None:
        self.squares = torch.zeros(read, read, dtype=torch.float64, device=device)
        self.products = torch.zeros(read, wanted, dtype=torch.float64, device=device)

    def add(self, read: Tensor, wanted: Tensor) -> None:
        """Take in `read` [M, F] and what they are to give, `wanted` [M, D]."""
        self.squares += read.T @ read
        self.products += read.T @ wanted

    def solved(self, ranks: Ranks) -> Tensor:
        """The matrix [D, F], rank 0's on all of them."""
        squares, products = ranks.sum(self.squares), ranks.sum(self.products)
        energy = squares.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)  # of zeros where nothing was read
        squares.diagonal().add_(RIDGE * energy)
        found = torch.linalg.solve(squares, products).T
        return ranks.sum(found if ranks.first else torch.zeros_like(found))


def freeze_(net: Net) -> None:
    """Let training change the early exits alone, in place."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_exits(name, net.config))


def is_exits(name: str, config: ModelConfig) -> bool:
    """Does a tensor belong to an early exit, so that full depth does not read it?"""
    kind, _, rest = name.partition(".")
    return kind == "exit_mlps" or (kind == "exit_norms" and rest.partition(".")[0] != str(config.layers))


def backbone(state: Mapping[str, T], config: ModelConfig) -> dict[str, T]:
    """What the `state` of a net of `config` has, by name, of the tensors that full depth reads."""
    return {name: tensor for name, tensor in state.items() if not is_exits(name, config)}


def need_unchanged(before: str, after: str) -> None:
    """Raises CheckpointError where the `digest` of the backbone is not the one from `before`."""
    if after != before:
        raise CheckpointError(
            "training changed the backbone, so nothing is written", got=after[:16], allowed=before[:16],
            do="report it: it must stay as it was",
        )  # fmt: skip
