"""Fit the router of a trained model on held-out chat rows, and write it into the model directory.

Runs after fine-tuning and again after quantisation: a router fitted to other weights is out of calibration.
"""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.errors import DataError
from shoal.model.depth import LEAST_PROMPTS, fit_router
from shoal.model.model import Model
from shoal.train.evaluate import Question, gaps, questions
from shoal.train.frontier import Prompts

LEAST_ROWS = 40  # half fit the weights, a quarter calibrates, a quarter tests


def heldout_prompts(model: Model, heldout: str | Path, *, limit: int = 60) -> tuple[Prompts, Prompts] | None:
    """Prompts with measured gaps for `frontier`: at most `limit` a task of those that the router was fitted to, from the end of
    the file, and as many that it has not seen, from its start. None when there are too few to compare anything on."""
    found = questions(heldout, model.tokenizer, model.config, model.chat_template)
    parts: tuple[list[Question], list[Question]] = ([], [])
    for asked in found.values():
        usable = [q for q in asked if len(q.row.ids) <= model.config.context and any(q.row.answer)]
        parts[0].extend(usable[len(usable) // 2 :][-limit:])
        parts[1].extend(usable[: len(usable) // 2][:limit])
    if min(map(len, parts)) < LEAST_PROMPTS:
        return None
    fit, test = (
        Prompts(
            *gaps(model.net, [q.row for q in part]),
            torch.tensor([len(q.prompt.ids) for q in part]),
            tuple(q.task for q in part),
        )
        for part in parts
    )
    return fit, test


def refit(directory: str | Path, heldout: str | Path, *, limit: int = 160, seed: int = 0) -> dict[str, float]:
    """Fit and store the router of the model in `directory`; returns its calibration report.

    Of each task at most `limit` rows are taken, from the end of the file: evaluation asks from its start. Raises
    DataError when there are too few.
    """
    model = Model.load(directory)
    found = questions(heldout, model.tokenizer, model.config, model.chat_template)
    length = model.config.context
    rows = [q.row for asked in found.values() for q in asked[len(asked) // 2 :][-limit:]]
    rows = [row for row in rows if len(row.ids) <= length and any(row.answer)]
    if len(rows) < LEAST_ROWS:
        raise DataError(f"{heldout}: rows to fit the router", got=len(rows), allowed=f"at least {LEAST_ROWS}")
    model.router = fit_router(model.config, *gaps(model.net, rows), seed=seed)
    card = (Path(directory) / "README.md").read_text(encoding="utf-8")
    model.save(directory, card=card)
    return model.router.calibration.report
