"""Fit the router of a trained model on held-out prompts, and write it into the model directory.

Runs after every stage: a router fitted to other weights is out of calibration.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from shoal.errors import DataError
from shoal.model.depth import LEAST_PROMPTS, fit_router
from shoal.model.model import Model
from shoal.train.prompts import ByTask, Prompts, heldout_rows, measured

LEAST_ROWS = 40  # half fit the weights, a quarter calibrates, a quarter tests
MOST_ROWS = 160  # of a task, that a router is fitted to


class TooFewRowsError(DataError):
    """There is too little held-out data to fit a router to."""


def finish(directory: str | Path, heldout: str | Path, say: Callable[[str], None]) -> dict[str, float] | None:
    """`refit` where there is something held out, and enough of it; else None, and the model stays as it is. `say` is told in a
    line how it went."""
    if not heldout:
        return None
    try:
        report = refit(directory, heldout)
    except TooFewRowsError as error:
        say(f'no router, so depth "auto" is full depth: {error}')
        return None
    say(
        f"router: within {report['tolerance']:g} nats a token it runs {report['depth_share']:.0%} of the layers and loses "
        f"{report['regret']:.3f} ({report['prompts']:.0f} of the prompts in {heldout}, on which it was not fitted)"
    )
    return report


def refit(directory: str | Path, heldout: str | Path, *, seed: int = 0) -> dict[str, float]:
    """Fit and store the router of the model in `directory`; returns its calibration report.

    `heldout`: a .jsonl of chats, or a folder of shards. Of each task at most `MOST_ROWS` of the second half are taken:
    evaluation asks from the first. Raises TooFewRowsError, and DataError when `heldout` cannot be read.
    """
    model = Model.load(directory)
    _, fit = _halves(heldout_rows(model, heldout, 2 * MOST_ROWS), MOST_ROWS)
    count = sum(map(len, fit.values()))
    if count < LEAST_ROWS:
        raise TooFewRowsError(
            f"{heldout}: held-out rows to fit the router", got=count, allowed=f"at least {LEAST_ROWS}"
        )
    with _a_core_left():
        prompts = measured(model.net, fit)
        model.router = fit_router(model.config, prompts.features, prompts.gaps, seed=seed)
    card = (Path(directory) / "README.md").read_text(encoding="utf-8")
    model.save(directory, card=card)
    return model.router.calibration.report


def heldout_prompts(model: Model, heldout: str | Path, *, limit: int = 60) -> tuple[Prompts, Prompts] | None:
    """Prompts with measured gaps for `frontier`: at most `limit` a task of those that the router was fitted to, and as many
    that it has not seen. None when there are too few to compare anything on."""
    test, fit = _halves(heldout_rows(model, heldout, 2 * MOST_ROWS), limit)
    if min(sum(map(len, part.values())) for part in (test, fit)) < LEAST_PROMPTS:
        return None
    return measured(model.net, fit), measured(model.net, test)


def _halves(rows: ByTask, limit: int) -> tuple[ByTask, ByTask]:
    """Of each task the first rows of the first half, to measure on, and the last of the second, to fit to."""
    first = {task: some[: len(some) // 2][:limit] for task, some in rows.items()}
    second = {task: some[len(some) // 2 :][-limit:] for task, some in rows.items()}
    return first, second


@contextlib.contextmanager
def _a_core_left() -> Iterator[None]:
    """Compute with all cores but one: a second thread beside Ray's own processes made fitting twelve times slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 2) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
