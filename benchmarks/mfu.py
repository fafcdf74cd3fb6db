"""`shoal bench train --parts mfu`: which share of a device's rate of products an update of training reaches, beside a plain GPT
of as many layers, of the same width and vocabulary, with flash attention (torch's scaled_dot_product_attention).

Utilisation (MFU) is the operations that the model asks for, over the time and the rate: recomputing counts as nothing;
attention of ours counts what it reads, of the plain one half of all, as it is causal. `tests/unit/bench/test_mfu.py` holds both
formulas against torch's counter. HFU counts what is computed again as well: it is what `shoal scale --utilisation` asks for. Of
the ways to compute again the first is taken that fits the memory.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.plain import PlainGPT
from shoal import presets
from shoal.config import ModelConfig, TrainConfig
from shoal.data.batches import Batch
from shoal.errors import UsageError
from shoal.inputs.tokenizer import END_ID
from shoal.model.gpu import trial
from shoal.model.net import Net
from shoal.train.loss import LossModel
from shoal.train.meter import matmul_rate, training_flops
from shoal.train.optim import make_optimizer, one_early_exit, rotates, trained_exits
from shoal.train.parallel import Ranks, shard_
from shoal.train.recompute import WAYS, Recompute, flops_again
from shoal.train.step import update

ROWS = 2  # micro-batches of an update, a row each
TOLD = {False: "", "selective": ", recomputed selectively", True: ", recomputed"}
WARM = 3  # updates that are not counted: they compile, and make the optimizer's moments
# FLOP/s of dense products in bf16 as the vendor states them, by words of the device's name
STATED = {
    "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12,
}  # fmt: skip


class Made(NamedTuple):
    """An update that is to be measured."""

    run: Callable[[], object]
    tokens: int
    flops: int  # of a token, as the model asks for
    again: int  # of a token, what is computed again
    parameters: int


def device_of(name: str) -> torch.device:
    """The device called `name`. Raises UsageError for one that is not there."""
    if name not in ("cpu", "cuda"):
        raise UsageError("--device", got=name, allowed="cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda", got="no CUDA device", do="run it on a machine with a GPU, or with --device cpu"
        )
    return torch.device(name)


def stated(device: str) -> float:
    """FLOP/s that the vendor states of the device of that name; 0 where they are not in `STATED`."""
    return next((rate for words, rate in STATED.items() if re.search(rf"\b{words}\b", device)), 0.0)


def mfu(
    names: tuple[str, ...], lengths: tuple[int, ...], device: torch.device, rounds: int
) -> tuple[Table, list[dict[str, Any]]]:
    """The table, a row a preset, row length and model, and its values; these are None where it does not fit the memory."""
    rate = matmul_rate(device, 1.0)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    peak = stated(kind)
    told = f"; stated {peak / 1e12:,.0f}" if peak else ""
    table = Table(
        "preset", "tokens a row", "model", "parameters", "tokens/s", "of the products' rate", "MFU", "HFU",
        title=f"updates of training on {kind}: products reach {rate / 1e12:,.2f} TFLOP/s{told}",
    )  # fmt: skip
    rows = []
    for name in names:
        for length in lengths:
            for model, prepare, ways in (("ours", ours, WAYS), ("plain", plain, (False, True))):
                row: dict[str, Any] = {"preset": name, "length": length, "model": model}
                rows.append(row)
                row |= measured(partial(prepare, name, length, device), rounds, device, ways)
                fits = row["flops"] is not None
                row |= {
                    "of_rate": row["flops"] / rate if fits else None,
                    "mfu": row["flops"] / peak if fits and peak else None,
                    "hfu": row["computed"] / peak if fits and peak else None,
                }
                if not fits:
                    table.add_row(name, f"{length:,}", model, "", "does not fit", "", "", "")
                    continue
                shares = [f"{row[key]:.1%}" if peak else "-" for key in ("mfu", "hfu")]
                speed = f"{row['tokens_per_s']:,.0f}"
                table.add_row(
                    name, f"{length:,}", model + TOLD[row["recomputed"]], f"{row['parameters']:,}", speed,
                    f"{row['of_rate']:.1%}", *shares,
                )  # fmt: skip
    return table, rows


def measured(
    prepare: Callable[[Recompute], Made], rounds: int, device: torch.device, ways: Sequence[Recompute] = WAYS
) -> dict[str, Any]:
    """Tokens and operations a second of what `prepare` makes, without what is computed again ("flops") and with it
    ("computed"). It is told what backward computes again: the first of `ways` that fits. Where none does: None."""
    for how in ways:
        gc.collect()  # a model whose layers are compiled holds itself: the next one would not fit beside it
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            made: Made | None = prepare(how)
            assert made is not None
            took = []
            for _ in range(WARM + rounds):
                start = time.perf_counter()
                made.run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                took.append(time.perf_counter() - start)
            speed = made.tokens / statistics.median(took[WARM:])
            rates = {"flops": speed * made.flops, "computed": speed * (made.flops + made.again)}
            return {"parameters": made.parameters, "tokens_per_s": speed, **rates, "recomputed": how}
        except torch.OutOfMemoryError:
            pass
        finally:
            made = None  # what it holds is large
    return dict.fromkeys(("parameters", "tokens_per_s", "flops", "computed")) | {"recomputed": ways[-1]}


def ours(name: str, length: int, device: torch.device, how: Recompute) -> Made:
    """An update of preset `name` on rows of `length` tokens, one document each, as `shoal pretrain` does it."""
    config, train = at(name, length)
    ranks, model = Ranks(0, 1, device), LossModel(Net(config).init_(0), trained_exits(config.exits, train))
    trial.of_training(config, length, device, low=model.low, alone=True)
    shard_(model, ranks, recompute=how, compiled=device.type == "cuda")
    optimizer = make_optimizer(model, train)
    batches = [batch(config, length, seed) for seed in range(ROWS)]
    total = sum(train.exit_weights)
    weights = tuple(weight / total for weight in train.exit_weights)
    heads = len(model.exits)
    if rotates(config, train):
        weights, heads = one_early_exit(weights, 0), min(2, heads)
    count = sum(p.numel() for p in model.parameters())
    given: dict[str, Any] = {"config": train, "weights": weights, "rate": 1e-4, "ranks": ranks}
    work, again = training_flops(config, heads), flops_again(config, how)
    return Made(lambda: update(model, optimizer, batches, **given), ROWS * length, work, again, count)


def plain(name: str, length: int, device: torch.device, how: Recompute) -> Made:
    """The same of a plain GPT; bf16 by autocast on a GPU, each layer compiled."""
    config, train = at(name, length)
    made = PlainGPT(vocab=config.vocab, layers=config.layers, width=config.width, heads=config.heads, length=length)
    model = made.to(device)
    optimizer = model.optimizer(train.learning_rate, train.betas, train.weight_decay)
    for layer in model.layers:
        if device.type == "cuda":
            layer.forward = torch.compile(layer.forward)
        if how:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    rows = [batch(config, length, seed).tokens.to(device) for seed in range(ROWS)]

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        for row in rows:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(row[:, :-1], row[:, 1:])
            (loss / len(rows)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        return norm

    work, head = (
        plain_flops(config.layers, config.width, config.vocab, length),
        plain_flops(0, config.width, config.vocab, length),
    )
    again = (work - head) // 3 if how else 0
    return Made(run, ROWS * length, work, again, sum(p.numel() for p in model.parameters()))


def plain_flops(layers: int, width: int, vocab: int, length: int, *, causal: bool = True) -> int:
    """Floating-point operations to train a plain GPT on a token in a row of `length`; not `causal`: of all pairs of tokens."""
    attention = 4 * length * width // (2 if causal else 1)
    return 3 * (layers * (24 * width**2 + attention) + 2 * vocab * width)


def at(name: str, length: int) -> tuple[ModelConfig, TrainConfig]:
    """Model and training of a preset, with rows of `length` tokens."""
    preset = presets.get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a length that the global branch reads whole
        return dataclasses.replace(preset.model, train_length=length, image_size=0), preset.train


def batch(config: ModelConfig, length: int, seed: int) -> Batch:
    """A row of one document of random tokens."""
    tokens = torch.randint(END_ID + 1, config.vocab, (1, length), generator=torch.Generator().manual_seed(seed))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    nothing = torch.zeros(0, config.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
    return Batch(tokens, targets, torch.zeros_like(tokens), *nothing, torch.tensor([length]), ("text",))
