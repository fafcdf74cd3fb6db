"""What routing at a tolerance really loses, by task: the router bounds the mean over a mix of prompts like those it was
calibrated on, and no task, let alone a prompt, by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.evaluate.intervals import of_mean, of_share
from shoal.evaluate.prompts import Prompts
from shoal.evaluate.second_look import routed
from shoal.model.router import TOLERANCES, Router

EVERY = "all together"  # the row over all tasks


def lost(config: ModelConfig, router: Router, test: Prompts) -> dict[str, Any]:
    """For the report, on prompts that nothing was fitted to. ``by_task`` at the router's default ``tolerance``,
    ``by_tolerance`` and ``by_budget`` over all: of each the prompts and their groups, the mean share of the layers (a prompt
    counts once), the mean loss in nats a token, and the share of prompts that lose more than the tolerance, both with 95 %
    intervals."""
    default = router.calibration.default_tolerance
    tasks = [EVERY, *sorted(set(test.tasks))]
    spent, losses = routed(config, router, test, default)
    by_task = []
    for task in tasks:
        of = torch.tensor([task in (EVERY, one) for one in test.tasks])
        by_task.append({"task": task, **_row(spent[of], losses[of], test.groups[of], default)})
    by_tolerance = []
    for tolerance in TOLERANCES:
        row = _row(*routed(config, router, test, tolerance), test.groups, tolerance)
        by_tolerance.append({"tolerance": tolerance, **row})
    by_budget = []
    for budget, _ in router.calibration.prices[::10]:
        row = _row(*routed(config, router, test, None, budget), test.groups, default)
        by_budget.append({"budget": budget, **row})
    return {"tolerance": default, "by_task": by_task, "by_tolerance": by_tolerance, "by_budget": by_budget}


def _row(spent: Tensor, losses: Tensor, groups: Tensor, tolerance: float) -> dict[str, Any]:
    of = groups.tolist()
    loss, above = of_mean(losses.tolist(), of), of_share((losses > tolerance).tolist(), of)
    return {
        "prompts": loss.rows,
        "groups": loss.groups,
        "depth_share": float(spent.mean()),
        "loss": loss.value,
        "loss_interval": loss.ends,
        "above": above.value,
        "above_interval": above.ends,
    }


def too_much(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose own mean is above the tolerance."""
    return [
        f"At the tolerance of {found['tolerance']:g} nats a token, {row['task']} loses {row['loss']:.3f} in the mean of its "
        f"{row['prompts']} prompts: what is bounded is the mean over all tasks."
        if row["task"] != EVERY
        else f"At the tolerance of {found['tolerance']:g} nats a token, routing loses {row['loss']:.3f} in the mean of "
        f"{row['prompts']} prompts that nothing was fitted to."
        for row in found["by_task"]
        if row["loss"] > found["tolerance"]
    ]
