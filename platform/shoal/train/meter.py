"""How fast a run is, against how fast this machine multiplies matrices: utilisation that means something on a CPU too."""

from __future__ import annotations

import time

import torch

from shoal.config import ModelConfig
from shoal.model.cost import flops_per_token, scoring_flops

BACKWARD = 2  # a backward pass costs twice its forward


def training_flops(
    config: ModelConfig,
    heads: int | None = None,
    length: int | None = None,
    *,
    frozen: bool = False,
    exits_only: bool = False,
) -> int:
    """Floating-point operations to train on one token of a row of `length` tokens [the training length], with `heads` exits'
    losses (default: all). Blocks are scored forward alone. `frozen`: the weights stay as they are, beside thin matrices, and
    the half of a backward pass that is their gradients is left out; `exits_only`: it ends at the early exits."""
    c, length = config, length or config.train_length
    early = (len(c.exits) if heads is None else heads) - 1
    head, own = 2 * c.vocab * c.width, 2 * 3 * c.width * c.exit_ffn
    forward = flops_per_token(c, length) + early * (head + own)
    if exits_only:
        return forward + early * (head + BACKWARD * own)
    back = BACKWARD // 2 if frozen else BACKWARD
    return (1 + back) * forward - back * scoring_flops(c, length)


def matmul_rate(device: torch.device, seconds: float = 0.1, size: int = 512) -> float:
    """Floating-point operations a second of this process in square matrix products: best of several."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 4096 if device.type == "cuda" else size
    a, b = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Meter:
    """Tokens a second, smoothed over the last steps, and the share of the matmul rate that they amount to."""

    def __init__(self, flops_per_token: int, rate: float, world: int, memory: float = 0.9) -> None:
        self.flops_per_token, self.rate, self.memory = flops_per_token, rate * world, memory
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """One step of `seconds` over `tokens` tokens, all ranks together."""
        self._tokens = self.memory * self._tokens + tokens
        self._seconds = self.memory * self._seconds + seconds

    def read(self) -> dict[str, float]:
        """`tokens_per_second`, and `utilisation`: achieved operations over those of pure matrix products."""
        rate = self._tokens / self._seconds if self._seconds else 0.0
        return {"tokens_per_second": rate, "utilisation": rate * self.flops_per_token / self.rate}
