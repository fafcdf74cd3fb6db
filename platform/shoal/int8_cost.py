"""What INT8 costs: an INT8 model beside the fp32 model that it was made from, and beside that one rounded without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.data.batches import heldout_batches
from shoal.data.shards import open_index
from shoal.model.model import Model
from shoal.train.evaluate import beside

TEXTS = ("text", "code")
AGREEMENT = 0.95  # share of places in which INT8 should say the token that fp32 does: it stands in for it


def int8_cost(fp32: Model, int8: Model, data: Path, *, rows: int) -> list[dict[str, Any]]:
    """For text and code, on at most `rows` held-out rows of the shards in `data` at full depth: bits per byte of `fp32`, of it
    rounded without training (``rounded``) and of `int8`, and how often both say the token that `fp32` finds likeliest."""
    nets = [fp32.net, fp32.quantized().net, int8.net]
    index, found = open_index(data), []
    for modality in TEXTS:
        if not index.total("rows", "heldout", modality):
            continue
        exact, rounded, trained = beside(nets, heldout_batches(data, modality, batch_rows=8, limit=rows))
        found.append(
            {
                "modality": modality,
                "fp32": exact[0],
                "rounded": rounded[0],
                "int8": trained[0],
                "rounded_rise": rounded[0] / exact[0] - 1,
                "int8_rise": trained[0] / exact[0] - 1,
                "rounded_agreement": rounded[1],
                "int8_agreement": trained[1],
            }
        )
    return found


def said(row: dict[str, Any]) -> str:
    """One row of `int8_cost` in a line."""
    return (
        f"{row['modality']} {row['fp32']:.3f} > {row['int8']:.3f} ({row['int8_rise']:+.2%}; "
        f"rounding alone {row['rounded_rise']:+.2%}), same token {row['int8_agreement']:.1%} "
        f"(rounding alone {row['rounded_agreement']:.1%})"
    )


def too_far(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each row of `int8_cost` in which INT8 is no longer the model that it was made from."""
    return [
        f"INT8 says another token than fp32 in {1 - row['int8_agreement']:.1%} of the places in {row['modality']}."
        for row in rows
        if row["int8_agreement"] < AGREEMENT
    ]
