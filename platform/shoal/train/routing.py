"""Fit the router of a trained model on held-out chat rows, and write it into the model directory.

Runs after fine-tuning and again after quantisation: a router fitted to other weights is out of calibration.
"""

from __future__ import annotations

from pathlib import Path

from shoal.errors import DataError
from shoal.model.depth import fit_router
from shoal.model.model import Model
from shoal.train.evaluate import gaps, questions

LEAST_ROWS = 40  # half fit the weights, a quarter calibrates, a quarter tests


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
