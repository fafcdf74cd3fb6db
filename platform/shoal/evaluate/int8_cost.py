"""What INT8 costs: an INT8 model beside the fp32 model that it was made from, and beside that one rounded without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.data.shards import token_bytes
from shoal.evaluate.measures import beside
from shoal.evaluate.rounding import rounded
from shoal.evaluate.texts import modalities, rows_of
from shoal.model.model import Model

TEXTS = ("text", "code")
AGREEMENT = 0.95  # share of places in which INT8 should say the token that fp32 does: it stands in for it


def int8_cost(
    fp32: Model, int8: Model, data: Path, *, rows: int, placed: Callable[[Model], Model] = lambda model: model
) -> list[dict[str, Any]]:
    """For text and code, on at most `rows` held-out rows of the shards in `data`, or on those of a file, at full depth: bits
    per byte of `fp32`, of it rounded without training (``rounded``) and of `int8`, and how often both say the token that
    `fp32` finds likeliest; with 95 % intervals over documents, and how many places and documents there were. `placed` moves a
    model to where it is to compute."""
    alone = rounded(fp32)
    nets = [placed(model).net for model in (fp32, alone, int8)]
    found, lengths = [], token_bytes(fp32.tokenizer)
    for modality in (each for each in modalities(data) if each in TEXTS):
        exact, without, trained = beside(nets, rows_of(data, modality, fp32, rows), lengths)
        found.append(
            {
                "modality": modality,
                "places": exact.bpb.rows,
                "groups": exact.bpb.groups,
                "fp32": exact.bpb.value,
                "rounded": without.bpb.value,
                "int8": trained.bpb.value,
                "rounded_rise": without.rise.value,
                "rounded_rise_interval": without.rise.ends,
                "int8_rise": trained.rise.value,
                "int8_rise_interval": trained.rise.ends,
                "rounded_agreement": without.agreement.value,
                "rounded_agreement_interval": without.agreement.ends,
                "int8_agreement": trained.agreement.value,
                "int8_agreement_interval": trained.agreement.ends,
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
