"""AdamW and Muon with their parameter groups, the schedules (pure functions of the share of the run that is done), and what an
update leaves out (pure functions of seed and step): nothing here remembers, so ranks agree, and a resumed run repeats where
that share is the same, see `Run.schedule`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

from shoal.config import ModelConfig, TrainConfig

LARGE_VOCAB = 8192  # tokens; above it the head is most of an update, and early exits take turns
_TABLES = ("embed.weight", "row_embed", "col_embed")  # looked up, not multiplied: decay would only shrink rare rows


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of the trainable parameters of `model`; norms, gates and embeddings take no weight decay.

    AdamW for all of them, or Muon (kellerjordan.github.io/posts/muon) for the layers' matrices and AdamW for the rest. Muon's
    updates are scaled to the size of AdamW's (arXiv 2502.16982), so one learning rate serves both. Call it after sharding: the
    moments are then sharded like the parameters.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or name.endswith(_TABLES):
            free.append(parameter)
        elif config.optimizer == "muon" and ".blocks." in name:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    adamw = AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )
    if not matrices:
        return adamw
    rate, decay = config.learning_rate, config.weight_decay
    return Together(WholeMuon(matrices, lr=rate, weight_decay=decay), adamw)


class WholeMuon(Muon):
    """torch's Muon with other products. Of matrices that ranks hold in shards each update is gathered once, and every rank
    multiplies it whole: torch's own multiplies shards and exchanges at each of 15 products, over gloo three quarters of a small
    model's update. On a CPU the products are of fp32 (`orthogonal`)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Every matrix that has a gradient takes its update, of the size of AdamW's whatever its shape (arXiv 2502.16982)."""
        for group in self.param_groups:
            momentum, rate = group["momentum"], float(group["lr"])
            for matrix in (one for one in group["params"] if one.grad is not None):
                moments = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                moments.lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(moments, momentum)
                sharded = isinstance(update, DTensor)
                added = orthogonal(
                    update.full_tensor() if sharded else update, group["ns_coefficients"], group["ns_steps"]
                )
                added *= -rate * 0.2 * math.sqrt(max(matrix.shape))
                if sharded:  # every rank has it whole, and nothing is sent
                    added = distribute_tensor(added, matrix.device_mesh, matrix.placements, src_data_rank=None)
                matrix.mul_(1 - rate * group["weight_decay"]).add_(added)


def orthogonal(update: torch.Tensor, coefficients: Sequence[float], steps: int) -> torch.Tensor:
    """`update` [m, n] with its singular values near 1: `steps` times a x + b x^3 + c x^5 of each, by products alone
    (Newton-Schulz, kellerjordan.github.io/posts/muon). In bfloat16, which is enough; on a CPU at least in fp32: most have no
    instructions for bfloat16, and take 15 to 27 times as long."""
    precise = torch.promote_types(update.dtype, torch.float32)
    x = update.to(precise if update.is_cpu else torch.bfloat16)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(update.dtype)


class Together(Optimizer):
    """Several optimizers of different parameters as one: their groups, and one state that they share."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Every part writes."""
        for part in self.parts:
            part.step()


def learning_rate(progress: float, config: TrainConfig) -> float:
    """The rate when a share `progress` (0 to 1) of the run is done: it warms up, stays, and decays (WSD), linearly
    or as half a cosine."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    left = 1.0 - progress
    if left >= config.decay:
        return config.learning_rate
    low, height = config.min_lr_ratio, left / config.decay
    if config.decay_shape == "cosine":
        height = (1.0 - math.cos(math.pi * height)) / 2
    return config.learning_rate * (low + (1.0 - low) * height)


def trained_exits(exits: Sequence[int], config: TrainConfig) -> tuple[int, ...]:
    """The `exits` that have a weight in the loss; the others cost nothing."""
    return tuple(e for e, weight in zip(exits, config.exit_weights, strict=True) if weight > 0)


def exit_weights(progress: float, config: TrainConfig) -> tuple[float, ...]:
    """Share of each trained exit in the loss, shallowest first, summing to 1; the early exits' rise from 0 over the first
    `exit_warmup` of the run."""
    rise = min(1.0, progress / config.exit_warmup) if config.exit_warmup > 0 else 1.0
    raw = [weight * rise for weight in config.exit_weights[:-1] if weight > 0] + [config.exit_weights[-1]]
    return tuple(weight / sum(raw) for weight in raw)


def rotates(model: ModelConfig, config: TrainConfig) -> bool:
    """Does an update take the loss of one early exit only?"""
    return config.rotate_exits == "on" or (config.rotate_exits == "auto" and model.vocab > LARGE_VOCAB)


def one_early_exit(shares: Sequence[float], step: int) -> tuple[float, ...]:
    """`shares` with all early exits but one left out at update number `step`, in turn; its share is multiplied by their number,
    so that over a round each exit weighs what it did."""
    *early, last = shares
    return (*(share * len(early) * (place == step % len(early)) for place, share in enumerate(early)), last)


def left_out(model: ModelConfig, config: TrainConfig, step: int) -> frozenset[int]:
    """Layers that update number `step` leaves out: layer l with chance p (2^(l/(L-1)) - 1), p = `layer_dropout`."""
    if not config.layer_dropout:
        return frozenset()
    draws = random.Random(f"layer dropout, seed {config.seed}, step {step}")
    chances = (config.layer_dropout * (2 ** (layer / (model.layers - 1)) - 1) for layer in range(model.layers))
    return frozenset(layer for layer, chance in enumerate(chances) if draws.random() < chance)
