"""Fit the router of a trained model on held-out prompts, and write it into the model directory.

Runs after every stage: a router fitted to other weights is out of calibration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoal.data.models import changed, here, need_replaceable
from shoal.data.sources.s3 import is_remote
from shoal.errors import DataError
from shoal.evaluate import pieces, second_look
from shoal.evaluate.intervals import between
from shoal.evaluate.pieces import Models, Piece, Run, wherever
from shoal.evaluate.prompts import (
    ByTask,
    Heldout,
    Prompts,
    Rest,
    encoded,
    heldout_rows,
    looked_at,
    measured,
    together,
)
from shoal.inputs.chat import Encoded
from shoal.machine import threads
from shoal.model import checkpoint, described
from shoal.model.model import Model
from shoal.model.router import LEAST_PROMPTS, fit_router

LEAST_ROWS = 40  # half fit the weights, a quarter calibrates, a quarter tests ...
LEAST_GROUPS = 4  # ... each on documents or conversations of their own
MOST_ROWS = 160  # of a task, that a router is fitted to
LOT = 16  # prompts that are measured at a time


class TooFewRowsError(DataError):
    """There is too little held-out data to fit a router to."""


def finish(
    place: str | Path,
    heldout: str | Path,
    say: Callable[[str], None],
    *,
    whole: bool = False,
    run: Run = pieces.here,
) -> dict[str, float] | None:
    """`refit` where there is something held out, and enough of it; else None, and the model stays as it is. `say` is told in a
    line how it went."""
    if not heldout:
        return None
    if len(described.read_config(here(place, weights=False))[1].exits) == 1:
        say("no router: the model has full depth alone, so there is nothing to choose")
        return None
    try:
        report = refit(place, heldout, whole=whole, run=run)
    except TooFewRowsError as error:
        say(f'no router, so depth "auto" is full depth: {error}')
        return None
    say(
        f"router: within {report['tolerance']:g} nats a token it runs {report['depth_share']:.0%} of the layers and loses "
        f"{report['regret']:.3f}, means over {report['prompts']:.0f} prompts of {report['groups']:.0f} documents or "
        f"conversations in {heldout}, on which it was not fitted"
    )
    if "later_regret" in report:
        paid = [report[f"later_paid_{end}"] for end in ("low", "high") if f"later_paid_{end}" in report] or None
        say(
            f"it looks again after {second_look.AFTER} tokens of an answer: beside one look at the same cost it loses "
            f"{report['later_paid_gap']:+.4f} nats a token "
            f"({between(paid, '+.4f')}); within {report['later_tolerance']:g} it runs "
            f"{report['later_depth_share']:.0%} of the layers and loses {report['later_regret']:.3f}"
        )
    return report


def take_over(directory: str | Path, of: str | Path, say: Callable[[str], None]) -> None:
    """Give the model in `directory` the router of the one in `of`, from which it was trained, if that has one. Nothing of it is
    fitted anew: the gate looks whether its promise still holds. Raises CheckpointError."""
    router = Model.load(of).router
    if router is None:
        return
    model = Model.load(directory)
    model.router = router
    model.save(directory, card=(Path(directory) / "README.md").read_text(encoding="utf-8"))
    say("router: the one of before is kept, fitted to the model that this one was trained from")


def refit(
    place: str | Path,
    heldout: str | Path,
    *,
    seed: int = 0,
    whole: bool = False,
    run: Run = pieces.here,
) -> dict[str, float]:
    """Fit and store the router of the model at `place`, a directory or s3://; returns its calibration report.

    `heldout`: a .jsonl of chats, or a folder of shards. Of each task at most `MOST_ROWS` are taken, of the half of the groups
    that evaluation does not ask (`halves`); `whole`: of all groups, for who gives it that half alone. `run` measures
    them, `LOT` a piece, fits and stores; neither the model nor its weights are held here. Raises TooFewRowsError, DataError
    when `heldout` cannot be read, and CheckpointError when `place` holds what is not the model's.
    """
    need_replaceable(str(place)) if is_remote(place) else checkpoint.require_replaceable(place)
    fit = heldout_rows(described.read(here(place, weights=False)), heldout, MOST_ROWS, asked=None if whole else False)
    count, groups = sum(map(len, fit.values())), len({held.group for some in fit.values() for held in some})
    if count < LEAST_ROWS or groups < LEAST_GROUPS:
        raise TooFewRowsError(
            f"{heldout}: held-out rows to fit the router",
            got=f"{count} of {groups} documents or conversations",
            allowed=f"at least {LEAST_ROWS} of {LEAST_GROUPS}",
        )
    with _a_core_left():
        found = together(fit, list(run(asked_gaps(place, fit, second_look.AFTER))))
        (report,) = run([Piece(_fitted, (wherever(place), found, seed))])
    return dict(report)


def asked_gaps(place: str | Path, rows: Mapping[str, Sequence[Heldout]], after: int | None = None) -> list[Piece]:
    """What gives `together` the parts of `rows`, of the model at `place`."""
    every = encoded(rows)
    return [Piece(_lost, (wherever(place), every[at : at + LOT], after)) for at in range(0, len(every), LOT)]


def _lost(models: Models, place: str, rows: Sequence[Encoded], after: int | None) -> tuple[Tensor, Tensor, Rest | None]:
    (model,) = models(place)
    return looked_at(model.net, rows, after)


def _fitted(models: Models, place: str, prompts: Prompts, seed: int) -> dict[str, float]:
    """Fits a router and writes it into the model at `place`, whose weights pass by a file at a time; its report."""
    with changed(place) as folder:
        checkpoint.require_replaceable(folder)  # and back in its place, where a process was killed that wrote it
        config = described.read_config(folder)[1]
        router = fit_router(config, prompts.features, prompts.gaps, prompts.groups, seed=seed)
        router.later = second_look.fit(config, router, prompts, seed=seed)[0]
        checkpoint.give_router(folder, router)
    later = {} if router.later is None else router.later.calibration.report
    return {**router.calibration.report, **{f"later_{name}": value for name, value in later.items()}}


def heldout_prompts(model: Model, heldout: str | Path, *, limit: int = 100) -> tuple[Prompts, Prompts] | None:
    """Prompts with measured gaps for `frontier`: at most `limit` a task of those that the router was fitted to, and as many of
    groups that it has seen nothing of. None when there are too few to compare anything on."""
    sides = heldout_sides(model, heldout, limit=limit)
    later = None if model.router is None else model.router.later
    after = None if later is None else later.calibration.after
    return (measured(model.net, sides[0]), measured(model.net, sides[1], after)) if sides else None


def heldout_sides(model: Model | described.Described, heldout: str | Path, *, limit: int = 100) -> list[ByTask]:
    """The rows that `heldout_prompts` measures, of either side; none when there are too few."""
    sides = [heldout_rows(model, heldout, limit, asked=asked) for asked in (False, True)]
    return sides if min(sum(map(len, part.values())) for part in sides) >= LEAST_PROMPTS else []


@contextlib.contextmanager
def _a_core_left() -> Iterator[None]:
    """Compute with all cores but one: a second thread beside Ray's own processes made fitting twelve times slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
