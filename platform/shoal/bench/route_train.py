"""The model of `shoal bench route`: trained on the mix of all families by the updates and the losses of `shoal.train`.

Every update takes as many rows of each family. What is drawn follows from seed and number of the update; how long it is trained
is a number of updates or of minutes. A trained model is kept where a folder is given, and read from there again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shoal import presets
from shoal.bench.route_tasks import VOCAB, Asked, rows
from shoal.config import ModelConfig, TrainConfig
from shoal.data.batches import Batch
from shoal.errors import ConfigError
from shoal.model.net import Net
from shoal.train.loss import LossModel
from shoal.train.optim import exit_weights, learning_rate, make_optimizer, trained_exits
from shoal.train.parallel import Ranks
from shoal.train.step import update

ROWS = 48  # instances of a family in an update, where nobody says otherwise
LENGTH = 64  # tokens that the model is made for: the longest row has 27
_NARROW = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn": 128}
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "test": ("test", {}),
    "narrow": ("tiny", _NARROW),
    "tiny": ("tiny", {}),
    "mini": ("mini", {}),
}
# At 4e-3 `mini` learns no parity beyond level 1: full depth has 0.34 nats after 500 updates, and 0.31 after 1,500.
RATES = {"mini": 2e-3}
TRAIN = TrainConfig(
    learning_rate=4e-3,  # of shapes that RATES does not name
    optimizer="muon",
    betas=(0.9, 0.98),
    weight_decay=0.05,
    batch_tokens=ROWS * LENGTH,
    accumulate=1,
    exit_weights=(0.4, 0.6, 1.0),
    exit_warmup=0.0,
)


def config_of(shape: str) -> ModelConfig:
    """`narrow`, or a preset's shape; dense attention and the tasks' vocabulary. Raises ConfigError for another."""
    if shape not in SHAPES:
        raise ConfigError("shape", got=shape, allowed=sorted(SHAPES))
    preset, other = SHAPES[shape]
    mine = {"vocab": VOCAB, "image_size": 0, "train_length": LENGTH, "window": 16, "block": 4, "page": 16, "top_k": 8}
    return dataclasses.replace(presets.get(preset).model, attn_pattern="D", **mine, **other)  # type: ignore[arg-type]


Families = Mapping[str, Callable[[np.random.Generator, int], Asked]]


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a model is trained: so many updates, or so many minutes by the clock, and the update that they end in; and on
    how many instances of a family in each."""

    updates: int
    minutes: float | None = None
    rows: int = ROWS

    def __str__(self) -> str:
        said = f"{self.updates} updates" if self.minutes is None else f"{self.minutes:g} minutes"
        return said if self.rows == ROWS else f"{said} of {self.rows} rows"

    def done(self, updates: int, seconds: float) -> float:
        """The share of it with the update that comes after `updates` and `seconds`."""
        return (updates + 1) / self.updates if self.minutes is None else min(1.0, seconds / (60 * self.minutes))


def trained(
    shape: str, seed: int, length: Length, families: Families, keep: Path | None, say: Callable[[str], None]
) -> tuple[Net, int]:
    """The model after training on `families`, by name, and how many updates that were."""
    config, rate = config_of(shape), RATES.get(shape, TRAIN.learning_rate)
    net, kept = Net(config).init_(seed), None
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        of = "-".join((shape, *families, str(length).replace(" ", "-"), f"{rate:g}", str(seed), str(VOCAB)))
        kept = keep / f"{of}.safetensors"  # with rate and vocabulary: another of these is another model
        if kept.exists():
            net.load_state_dict(load_file(kept))
            with safe_open(kept, "pt") as file:
                return net.eval().requires_grad_(False), int(file.metadata()["updates"])
    train = dataclasses.replace(TRAIN, learning_rate=rate, seed=seed, batch_tokens=length.rows * LENGTH)
    model, ranks = LossModel(net, trained_exits(config.exits, train)), Ranks(0, 1, torch.device("cpu"))
    optimizer, step, done, start = make_optimizer(model, train), 0, 0.0, time.monotonic()
    while done < 1:
        draws, done = np.random.default_rng((seed, step)), length.done(step, time.monotonic() - start)
        batches = [batch(config, [family(draws, length.rows) for family in families.values()])]
        rates = {"weights": exit_weights(done, train), "rate": learning_rate(done, train)}
        report = update(model, optimizer, batches, config=train, ranks=ranks, **rates)  # type: ignore[arg-type]
        step += 1
        if step % 100 == 0:
            say(f"seed {seed}, update {step}: " + ", ".join(f"{loss:.3f}" for loss in report.ce) + " nats by exit")
    net.eval().requires_grad_(False)
    if kept is not None:
        aside = kept.with_suffix(".part")
        save_file(net.state_dict(), aside, {"updates": str(step)})
        aside.rename(kept)
    return net, step


def batch(config: ModelConfig, asked: Sequence[Asked]) -> Batch:
    """All questions about each instance, as one micro-batch; shorter rows are padded."""
    made = [rows(some) for some in asked]
    longest = max(tokens.shape[1] for tokens, _ in made)

    def padded(some: np.ndarray, value: int) -> np.ndarray:
        return np.pad(some, ((0, 0), (0, longest - some.shape[1])), constant_values=value)

    tokens, targets, docs = (
        torch.from_numpy(np.concatenate(parts))
        for parts in (
            [padded(tokens, 0) for tokens, _ in made],
            [padded(targets, -1) for _, targets in made],
            [padded(np.zeros_like(tokens), -1) for tokens, _ in made],
        )
    )
    nothing = torch.zeros(0, config.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
    return Batch(tokens, targets, docs, *nothing, torch.full((len(tokens),), longest), ("text",) * len(tokens))
