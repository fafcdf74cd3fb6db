"""Fit the router of a trained model on held-out prompts, and write it into the model directory.

Runs after every stage: a router fitted to other weights is out of calibration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from shoal.errors import DataError
from shoal.evaluate import second_look
from shoal.evaluate.prompts import Prompts, heldout_rows, measured
from shoal.machine import threads
from shoal.model import checkpoint, described
from shoal.model.model import Model
from shoal.model.router import LEAST_PROMPTS, fit_router

LEAST_ROWS = 40  # half fit the weights, a quarter calibrates, a quarter tests ...
LEAST_GROUPS = 4  # ... each on documents or conversations of their own
MOST_ROWS = 160  # of a task, that a router is fitted to


class TooFewRowsError(DataError):
    """There is too little held-out data to fit a router to."""


def finish(
    directory: str | Path, heldout: str | Path, say: Callable[[str], None], *, whole: bool = False, sure: bool = False
) -> dict[str, float] | None:
    """`refit` where there is something held out, and enough of it; else None, and the model stays as it is. `say` is told in a
    line how it went."""
    if not heldout:
        return None
    if len(described.read_config(directory)[1].exits) == 1:
        say("no router: the model has full depth alone, so there is nothing to choose")
        return None
    try:
        report = refit(directory, heldout, whole=whole, sure=sure)
    except TooFewRowsError as error:
        say(f'no router, so depth "auto" is full depth: {error}')
        return None
    say(
        f"router: within {report['tolerance']:g} nats a token it runs {report['depth_share']:.0%} of the layers and loses "
        f"{report['regret']:.3f}, means over {report['prompts']:.0f} prompts of {report['groups']:.0f} documents or "
        f"conversations in {heldout}, on which it was not fitted"
    )
    if "later_regret" in report:
        say(
            f"it looks again after {second_look.AFTER} tokens of an answer: beside one look at the same cost it loses "
            f"{report['later_paid_gap']:+.4f} nats a token (95 %: {report['later_paid_low']:+.4f} to "
            f"{report['later_paid_high']:+.4f}); within {report['later_tolerance']:g} it runs "
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
    directory: str | Path, heldout: str | Path, *, seed: int = 0, whole: bool = False, sure: bool = False
) -> dict[str, float]:
    """Fit and store the router of the model in `directory`; returns its calibration report.

    `heldout`: a .jsonl of chats, or a folder of shards. Of each task at most `MOST_ROWS` are taken, of the half of the groups
    that evaluation does not ask (`halves`); `whole`: of all groups, for who gives it that half alone; `sure` as of
    `fit_router`. Raises TooFewRowsError, DataError when `heldout` cannot be read, and CheckpointError when `directory` holds
    what is not the model's.
    """
    checkpoint.require_replaceable(directory)
    model = Model.load(directory)
    fit = heldout_rows(model, heldout, MOST_ROWS, asked=None if whole else False)
    count, groups = sum(map(len, fit.values())), len({held.group for some in fit.values() for held in some})
    if count < LEAST_ROWS or groups < LEAST_GROUPS:
        raise TooFewRowsError(
            f"{heldout}: held-out rows to fit the router",
            got=f"{count} of {groups} documents or conversations",
            allowed=f"at least {LEAST_ROWS} of {LEAST_GROUPS}",
        )
    with _a_core_left():
        prompts = measured(model.net, fit, second_look.AFTER)
        router = fit_router(model.config, prompts.features, prompts.gaps, prompts.groups, seed=seed, sure=sure)
        router.later = second_look.fit(model.config, router, prompts, seed=seed, sure=sure)[0]
        model.router = router
    card = (Path(directory) / "README.md").read_text(encoding="utf-8")
    model.save(directory, card=card)
    later = {} if router.later is None else router.later.calibration.report
    return {**router.calibration.report, **{f"later_{name}": value for name, value in later.items()}}


def heldout_prompts(model: Model, heldout: str | Path, *, limit: int = 100) -> tuple[Prompts, Prompts] | None:
    """Prompts with measured gaps for `frontier`: at most `limit` a task of those that the router was fitted to, and as many of
    groups that it has seen nothing of. None when there are too few to compare anything on."""
    fit, test = (heldout_rows(model, heldout, limit, asked=asked) for asked in (False, True))
    if min(sum(map(len, part.values())) for part in (test, fit)) < LEAST_PROMPTS:
        return None
    after = model.router.later.after if model.router is not None and model.router.later is not None else None
    return measured(model.net, fit), measured(model.net, test, after)


@contextlib.contextmanager
def _a_core_left() -> Iterator[None]:
    """Compute with all cores but one: a second thread beside Ray's own processes made fitting twelve times slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
