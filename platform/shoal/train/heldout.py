"""Held-out quality while training runs: bits a byte by modality and exit, on the ranks that train and through the same
forward pass, so that a sharded model needs no gathering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.data.batches import Batch
from shoal.train.loss import LossModel, predicted_patches
from shoal.train.parallel import Ranks, precision, release

Bpb = dict[str, dict[str, float]]  # modality -> exit name -> bits a byte; nan where nothing was predicted


@dataclass(frozen=True)
class HeldoutReport:
    bpb: Bpb
    patch: float | None  # next-patch error; None when no patch was predicted

    @property
    def mean_bpb(self) -> float:
        """Mean over text, code and chats of bits a byte at full depth; nan where nothing was predicted. A row of images
        predicts a few words, and counts only where there is nothing else."""
        names = [name for name in self.bpb if name != "image"] or list(self.bpb)
        found = [value for name in names if math.isfinite(value := list(self.bpb[name].values())[-1])]
        return sum(found) / len(found) if found else math.nan


@torch.no_grad()
def measure(model: LossModel, batches: Mapping[str, Sequence[Batch]], ranks: Ranks) -> HeldoutReport:
    """Quality on `batches`: modality -> this rank's micro-batches, as many on every rank."""
    names = {layers: name for name, layers in model.net.config.exit_names.items()}
    bpb: Bpb = {}
    patch_sum = patch_count = 0.0
    for modality, some in batches.items():
        totals = torch.zeros(len(model.exits) + 3, dtype=torch.float64, device=ranks.device)
        for batch in (b.to(ranks.device) for b in some):
            with precision(model, ranks):
                sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid)
            patches = predicted_patches(batch.tokens, batch.docs, batch.patches).sum()
            totals += torch.cat([sums.ce.sum(1), torch.stack([sums.patch, patches, patches.new_tensor(batch.n_bytes)])])
        *nats, patch, patches, n_bytes = ranks.sum(totals).tolist()
        values = [value / math.log(2) / n_bytes if n_bytes else math.nan for value in nats]
        bpb[modality] = {names[e]: value for e, value in zip(model.exits, values, strict=True)}
        patch_sum, patch_count = patch_sum + patch, patch_count + patches
    release(model)
    return HeldoutReport(bpb, patch_sum / patch_count if patch_count else None)
