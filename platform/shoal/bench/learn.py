"""`shoal bench learn`: characters of one text file, learned at nanoGPT's published setting for a CPU, by three models.

4 layers, 4 heads, width 128, 64 characters, 12 rows an update, 2,000 updates, no dropout; the first 90 % of the text is trained
on, the loss is that of the whole rest. `plain` is nanoGPT's own kind of model, which should come to the published figure: it
tells that the setting is right. `dense` is ours with full attention and no early exit; `hybrid` ours with both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shoal.bench.plain import PlainGPT
from shoal.bench.turns import show
from shoal.config import ModelConfig, TrainConfig
from shoal.data.batches import Batch
from shoal.errors import DataError
from shoal.inputs.tokenizer import SPECIAL
from shoal.model.net import Net
from shoal.train.loss import LossModel
from shoal.train.optim import exit_weights, learning_rate, make_optimizer, trained_exits
from shoal.train.parallel import Ranks
from shoal.train.step import update

ROWS, LENGTH = 12, 64  # of an update
TRAINED = 0.9  # share of the text
PUBLISHED = 1.88  # nanoGPT's README: validation loss of tiny Shakespeare at this setting, nats a character
TRAIN = TrainConfig(
    learning_rate=1e-3,
    min_lr_ratio=0.1,
    warmup=0.05,
    decay=0.95,
    decay_shape="cosine",
    betas=(0.9, 0.99),
    batch_tokens=ROWS * LENGTH,
    accumulate=1,
    exit_warmup=0.0,
)
_SHAPE: dict[str, Any] = {"layers": 4, "width": 128, "heads": 4, "head_dim": 32, "ffn": 344, "train_length": LENGTH}
_SPARSE: dict[str, Any] = {"block": 4, "page": 16, "top_k": 4}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"kv_heads": 4, "window": LENGTH, "attn_pattern": "L", **_SPARSE},  # a window of the whole row
    "hybrid": {"kv_heads": 4, "window": 16, **_SPARSE},
}


class Text:
    """A file's characters as numbers from 0, cut into what is trained on and what is measured on."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}", got=str(error), do="give a UTF-8 text file") from error
        self.characters = sorted(set(text))
        places = {character: place for place, character in enumerate(self.characters)}
        every = torch.tensor([places[character] for character in text])
        cut = int(TRAINED * len(every))
        self.train, self.rest = every[:cut], every[cut:]
        if len(self.rest) <= LENGTH:
            raise DataError(f"{path} is too short", got=f"{len(every)} characters", allowed=f"{20 * LENGTH} or more")

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets [ROWS, LENGTH] of an update, from random places."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        starts = torch.randint(len(self.train) - LENGTH, (ROWS, 1), generator=generator)
        at = starts + torch.arange(LENGTH)
        return self.train[at], self.train[at + 1]

    def measured(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of the rest as rows, some hundred at a time."""
        rows = (len(self.rest) - 1) // LENGTH
        tokens, targets = (self.rest[i : i + rows * LENGTH].view(rows, LENGTH) for i in (0, 1))
        return zip(tokens.split(256), targets.split(256), strict=True)


def learn(console: Console, *, text: Path, steps: int, seeds: int, models: tuple[str, ...]) -> None:
    """Train each of `models` with each seed and print the losses on the rest of the text, nats a character."""
    torch.set_num_threads(1)
    read = Text(text)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for seed in range(seeds):
        for name in models:
            run = _plain(read, seed, steps) if name == "plain" else _ours(read, name, seed, steps)
            found[name].append(run)
            losses = ", ".join(f"{exit_name} {loss:.3f}" for exit_name, loss in run["loss"].items())
            console.print(f"{name}, seed {seed}: {losses}; {run['seconds']:.0f} s", highlight=False)
    table = Table(
        "model", "parameters", "loss, mean", "least", "most", "shallow", "middle", "seconds",
        title=f"nats a character after {steps} updates, {seeds} seed(s); published for `plain`: {PUBLISHED}",
    )  # fmt: skip
    rows = []
    for name, runs in found.items():
        full = [run["loss"]["full"] for run in runs]
        early = {
            e: mean(run["loss"][e] for run in runs) if e in runs[0]["loss"] else None for e in ("shallow", "middle")
        }
        cells = [
            f"{value:.3f}" if value is not None else "" for value in (mean(full), min(full), max(full), *early.values())
        ]
        seconds = mean(run["seconds"] for run in runs)
        table.add_row(name, f"{runs[0]['parameters']:,}", *cells, f"{seconds:.0f}")
        row = {"model": name, "parameters": runs[0]["parameters"], "losses": full, "mean": mean(full), **early}
        rows.append(row | {"seconds": seconds})
    sizes = {"characters": len(read.characters), "trained_on": len(read.train), "measured_on": len(read.rest)}
    show(console, [table], {"bench": "learn", "steps": steps, "seeds": seeds, **sizes, "rows": rows})


def _plain(text: Text, seed: int, steps: int) -> dict[str, Any]:
    shape = {key: _SHAPE[key] for key in ("layers", "width", "heads")}
    net = PlainGPT(vocab=len(text.characters), length=LENGTH, seed=seed, **shape)
    optimizer = net.optimizer(TRAIN.learning_rate, TRAIN.betas, TRAIN.weight_decay)

    def train(step: int, done: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, TRAIN)
        optimizer.zero_grad()
        net.loss(*text.batch(seed, step)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), TRAIN.clip)
        optimizer.step()

    seconds = _run(steps, train)
    count = sum(p.numel() for p in net.parameters())
    return {"parameters": count, "seconds": seconds, "loss": {"full": _loss(text, net)}}


def _ours(text: Text, name: str, seed: int, steps: int) -> dict[str, Any]:
    config = ModelConfig(vocab=len(text.characters) + len(SPECIAL), **_SHAPE, **MODELS[name])
    weights = TRAIN.exit_weights if name == "hybrid" else (0.0, 0.0, 1.0)
    train_config = TrainConfig(**{**vars(TRAIN), "exit_weights": weights, "seed": seed})
    model = LossModel(Net(config).init_(seed), trained_exits(config.exits, train_config))
    optimizer, ranks = make_optimizer(model, train_config), Ranks(0, 1, torch.device("cpu"))

    def train(step: int, done: float) -> None:
        rates = {"weights": exit_weights(done, train_config), "rate": learning_rate(done, train_config)}
        update(model, optimizer, [_batch(config, *text.batch(seed, step))], config=train_config, ranks=ranks, **rates)  # type: ignore[arg-type]

    seconds, net = _run(steps, train), model.net

    def logits(tokens: Tensor, e: int) -> Tensor:
        return net.head(net(tokens + len(SPECIAL), exits=[e])[e], e)[..., len(SPECIAL) :]

    exits = {exit_name: e for exit_name, e in config.exit_names.items() if e in model.exits}
    losses = {exit_name: _loss(text, partial(logits, e=e)) for exit_name, e in exits.items()}
    return {"parameters": sum(p.numel() for p in net.parameters()), "seconds": seconds, "loss": losses}


def _batch(config: ModelConfig, tokens: Tensor, targets: Tensor) -> Batch:
    """One micro-batch of ours; the first ids are the control tokens'."""
    nothing = torch.zeros(0, config.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
    size = torch.full((len(tokens),), tokens.shape[1])
    rows = ("text",) * len(tokens)
    return Batch(tokens + len(SPECIAL), targets + len(SPECIAL), torch.zeros_like(tokens), *nothing, size, rows)


def _run(steps: int, train: Callable[[int, float], None]) -> float:
    """Seconds that `steps` updates took."""
    start = time.perf_counter()
    for step in range(steps):
        train(step, (step + 1) / steps)
    return time.perf_counter() - start


@torch.inference_mode()
def _loss(text: Text, logits: Callable[[Tensor], Tensor]) -> float:
    """Nats a character on the rest of the text."""
    total, count = 0.0, 0
    for tokens, targets in text.measured():
        total += float(F.cross_entropy(logits(tokens).flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count if count else math.nan
