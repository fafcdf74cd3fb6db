"""One update: micro-batches forward and backward, one exchange of gradients, one guarded write of the optimizer.

The loss is a sum over valid targets divided by their number in the *whole* global batch (all micro-batches, all ranks), so
8 micro-batches on one worker, 4 on two and 1 on eight give the same update.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shoal.config import TrainConfig
from shoal.data.batches import Batch
from shoal.errors import DataError, ShoalError
from shoal.train.loss import LossModel, Places, Sums, predicted_patches
from shoal.train.parallel import Ranks, precision, sync_gradients
from shoal.train.timing import Watch


@dataclass(frozen=True)
class StepReport:
    """What one update did, over all ranks. Losses are means, in nats a target."""

    loss: float  # what was minimised; of preferences a pair's mean
    ce: tuple[float, ...]  # cross-entropy at each exit, shallowest first; nan at one that was left out
    patch: float  # next-patch error; 0 when no patch was predicted
    bpb: float  # bits a byte at full depth, over text, code and chats; nan when there are none
    grad_norm: float  # before clipping
    targets: int  # tokens that took a cross-entropy
    patches: int  # patches that were predicted
    tokens: int  # tokens that were not padding


@dataclass(frozen=True)
class Counts:
    """Of one global batch; what losses are divided by."""

    targets: int
    patches: int
    tokens: int
    text_bytes: int  # UTF-8 bytes that the rows of text, code and chats predict
    rows: int  # that hold something


def count(batches: Sequence[Batch], ranks: Ranks, way: object = (), *, problem: ShoalError | None = None) -> Counts:
    """Counts over all ranks. `way`: what this rank will run of the model; `problem`: why it could not read its micro-batches.
    Raises that, DataError when ranks hold different numbers of micro-batches and ShoalError when their ways differ, each on all
    of them: they would wait for each other for ever."""
    mark = float(zlib.crc32(repr(way).encode()) % 2**20)  # its square still counts exactly
    local = torch.zeros(9, dtype=torch.float64)
    for b in batches:
        targets, patches = (b.targets >= 0).sum(), predicted_patches(b.tokens, b.docs, b.patches).sum()
        tokens, text = (b.docs >= 0).sum(), b.row_bytes[text_rows(b)].sum()
        local[:6] += torch.tensor([1, targets, patches, tokens, text, filled(b).sum()])
    local[6:] = torch.tensor([mark, mark**2, problem is not None], dtype=torch.float64)
    micro, *rest, marks, squares, problems = (int(value) for value in ranks.sum(local).tolist())
    if problems:
        with ranks.alike():
            if problem is not None:
                raise problem
    if micro != len(batches) * ranks.world:
        raise DataError(
            "micro-batches differ by worker", got=f"{len(batches)} here, {micro} in all", allowed="the same everywhere"
        )
    if squares * ranks.world != marks**2:  # equal only where all marks are
        raise ShoalError(
            "workers would leave out different layers or exits", got=way, do="report it: it must be one choice"
        )
    return Counts(*rest)


def filled(batch: Batch) -> Tensor:
    """bool [B]: rows that hold something. Those of a blank micro-batch, which keeps a rank in step with the others, do not."""
    return (batch.docs >= 0).any(1)


def text_rows(batch: Batch) -> Tensor:
    """bool [B]: rows that bits per byte is taken over. A row of images predicts a few words after many patches."""
    return torch.tensor([modality != "image" for modality in batch.modalities], device=batch.tokens.device)


def update(
    model: LossModel,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    config: TrainConfig,
    weights: Sequence[float],
    rate: float,
    ranks: Ranks,
    skip: Collection[int] = (),
    watch: Watch | None = None,
    problem: ShoalError | None = None,
) -> StepReport:
    """Train on one global batch, of which `batches` are this rank's micro-batches, wherever they lie: each is moved to the
    rank's device when its turn comes, and that is waited for once an update, before anything is written.

    `weights`: share of each of the model's exits in the loss, 0 for one that this update leaves out; `rate`: learning rate;
    `skip`: layers that it leaves out; `watch`: is told where time goes; `problem`: why this rank has no `batches`. Raises what
    `count` does, and ShoalError, on every rank and before anything is written, when the loss or a gradient is not finite.
    """
    run, watch = [e for e, weight in zip(model.exits, weights, strict=True) if weight > 0], watch or Watch()
    with watch("waiting"):
        counts = count(batches, ranks, (run, sorted(skip)), problem=problem)
    shares = torch.tensor(weights, device=ranks.device)
    divisor = max(1, counts.rows // 2 if config.dpo else counts.targets)  # pairs, or tokens
    with watch("compute"):
        optimizer.zero_grad()
        totals = torch.zeros(2 * len(model.exits) + 3, dtype=torch.float64, device=ranks.device)
        for index, given in enumerate(batches):
            sync_gradients(model, index == len(batches) - 1)
            totals += _pass(model, given, run, skip, config, shares, divisor, max(counts.patches, 1), ranks)
        _fill_gradients(model)
        norm_there = gradient_norm(model)
        _settle(ranks)
    with watch("waiting" if ranks.world > 1 else "compute"):
        *means, patch, on_patches, text_nats, norm = read(torch.cat([ranks.sum(totals), norm_there.to(totals).view(1)]))
    ce = (nats / max(counts.targets, 1) if share > 0 else math.nan for nats, share in zip(means, weights, strict=False))
    minimised = [value / divisor for value in means[len(weights) :]]
    patch, on_patches = (value / max(counts.patches, 1) for value in (patch, on_patches))
    loss = sum(share * value for share, value in zip(weights, minimised, strict=True))
    loss += config.patch_weight * on_patches
    with watch("write"):
        write(optimizer, model, loss=loss, norm=norm, rate=rate, clip=config.clip)
    return StepReport(
        loss=loss,
        ce=tuple(ce),
        patch=patch,
        bpb=text_nats / math.log(2) / counts.text_bytes if counts.text_bytes else math.nan,
        grad_norm=norm,
        targets=counts.targets,
        patches=counts.patches,
        tokens=counts.tokens,
    )


def rehearse(
    model: LossModel,
    given: Batch,
    *,
    config: TrainConfig,
    weights: Sequence[float],
    ranks: Ranks,
    skip: Collection[int],
) -> None:
    """What `update` does with a micro-batch, but that nothing comes of it: what is compiled for that is there afterwards."""
    run = [e for e, weight in zip(model.exits, weights, strict=True) if weight > 0]
    sync_gradients(model, True)
    _pass(model, given, run, skip, config, torch.tensor(weights, device=ranks.device), 1, 1, ranks)
    for p in model.parameters():
        p.grad = None


def _pass(
    model: LossModel,
    given: Batch,
    run: Sequence[int],
    skip: Collection[int],
    config: TrainConfig,
    shares: Tensor,
    divisor: int,
    patches: int,
    ranks: Ranks,
) -> Tensor:
    """A micro-batch forward, by the exits `run`, and backward; returns its `_totals`. Losses of tokens are divided by `divisor`
    and those of patches by `patches`."""
    how = {"exits": run, "skip": skip, "distill": config.distill > 0, "reference": config.dpo > 0}
    places = Places.of(given.tokens, given.targets, given.docs, given.patches).to(ranks.device)
    batch = given.to(ranks.device)
    with precision(model, ranks):
        sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid, places=places, **how)
    by_exit, by_patch = _by_exit(sums, batch, config), sums.patch + config.distill * sums.patch_apart
    on_tokens = (shares.to(sums.ce.dtype) @ by_exit) / divisor
    (on_tokens + config.patch_weight * by_patch / patches).backward()
    return _totals(sums, by_exit, by_patch, batch)


def _settle(ranks: Ranks) -> None:
    """Wait for this rank's device where there are others: what it has to do is not taken for waiting for them then."""
    if ranks.device.type == "cuda" and ranks.world > 1:
        torch.cuda.synchronize(ranks.device)


def read(values: Tensor) -> list[float]:
    """`values` on the host: the one wait of an update for its device."""
    found: list[float] = values.tolist()
    return found


def _totals(sums: Sums, by_exit: Tensor, by_patch: Tensor, batch: Batch) -> Tensor:
    """What a report is made of, [2E + 3]: losses and what is minimised, of each exit; of patches both; and of text."""
    text = (sums.ce[-1] * text_rows(batch)).sum()
    return torch.cat([sums.ce.sum(1), by_exit, torch.stack([sums.patch, by_patch, text])]).detach()


def _by_exit(sums: Sums, batch: Batch, config: TrainConfig) -> Tensor:
    """[E]: what is minimised at each exit, summed over the targets or pairs of `batch`."""
    if sums.reference is not None:
        return preference_losses(sums.ce, sums.reference, config.dpo, filled(batch)[::2])
    return config.cross_entropy * sums.ce.sum(1) + config.distill * sums.kl


def preference_losses(ce: Tensor, reference: Tensor, beta: float, counted: Tensor) -> Tensor:
    """[E]: the losses of DPO, -log sigmoid(`beta` times how much more the preferred answer has gained on the reference than the
    other), nats, summed over the pairs that are `counted`, bool [B / 2]. `ce` and `reference` [E, B]: rows 2i and 2i + 1 are a
    pair, the preferred one first."""
    gained = reference - ce  # log of how much likelier each answer has become
    return -(F.logsigmoid(beta * (gained[:, ::2] - gained[:, 1::2])) * counted).sum(1)


def _fill_gradients(model: LossModel) -> None:
    """A parameter that this update left out (a layer, an exit's norm) has a gradient of zero: its moments go on, alike on every
    rank and in every checkpoint."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


def gradient_norm(model: LossModel) -> Tensor:
    """2-norm of all gradients, over all ranks and therefore equal on all of them."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def write(optimizer: Optimizer, model: LossModel, *, loss: float, norm: float, rate: float, clip: float) -> None:
    """Clip the gradients and let the optimizer write, unless something is not finite: then raise ShoalError.

    Loss and norm are equal on all ranks, so all of them stop together, with the last good weights in memory.
    """
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise ShoalError(
                f"the {name} is not finite, so the weights were left as they were",
                got=value,
                do="start again with a lower train.learning_rate and --resume never, or with another --out",
            )
    if norm > clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, torch.tensor(norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
