"""`shoal bench checkpoint`: what checkpoints beside training slow it by.

Turns of the same number of updates with a checkpoint and without, two of them a round, which of them is first changing from
round to round. In a turn with one it is begun before the first update and published between two later ones, as the loop does
it: copied, then written, hashed and synced by a thread; a turn ends when it has its name. So a turn is one period of `every`
seconds, rounded up to whole updates, and a checkpoint costs what its turn took longer. It is told too how far apart the loop
lets them lie, for at most `train.run.SHARE`.

How many rounds there are follows from the first `PILOT` of them: as many as their spread asks for, so that the interval of the
median is no wider than half of that share to either side, and no more than the time and `rounds` allow. Each has a line as it
ends. Updates are small where nobody says otherwise, a row each, so that a turn is little longer than its period.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.train import corpus, one_update, prepared
from benchmarks.turns import show
from shoal import presets
from shoal.evaluate import intervals
from shoal.machine import cores
from shoal.train.checkpoint import CheckpointStore, Saved
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.run import SHARE
from shoal.train.state import TrainState

# rounds, whose spread says how many there are to be; that of three is a third of the true one in one case of ten
PILOT = 5
OF_MEDIAN = 1.2533 * 1.96  # half of the 95 % interval of a median, over spread / sqrt(rounds), where that is normal


def checkpoint(
    console: Console,
    *,
    preset: str,
    tokens: int | None = None,
    every: float,
    rounds: int,
    seconds: float,
    threads: int | None = None,
) -> None:
    """A checkpoint each `every` seconds of training with `tokens` an update (default: a row of the preset), on `threads`
    (default: all cores that this process may use, so that none is left for the writer, as in a run). At most `rounds`, of which
    none but the first is begun that would not end within `seconds`."""
    until, load = time.monotonic() + seconds, os.getloadavg()[0]
    torch.set_num_threads(threads or cores())
    console.print(f"load {load:.2f} before; preparing rows, the model and its moments", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        model = presets.get(preset).model
        corpus(data, model)
        asked = tokens or model.train_length
        plan = pretrain_plan(preset, str(data), folder, steps=10**6, batch_tokens=asked, accumulate=1)
        found = _Turns(plan, Path(folder, "run"), every, console).rounds(rounds, until)
    table = Table(
        "MiB", "updates a turn", "s without", "s with", "stalled s", "to its name s", "writer's CPU s", "slowed by", "95 %",
        title=f"{preset}, {plan.train.batch_tokens} tokens an update, {torch.get_num_threads()} threads, a checkpoint every "
        f"{every:g} s",
    )  # fmt: skip
    table.add_row(
        f"{found['bytes'] / 2**20:.1f}",
        f"{found['updates']}",
        *(f"{found[name]:.2f}" for name in ("without_s", "with_s", "stalled_s", "took_s", "busy_s")),
        f"{found['slowed']:.2%}",
        intervals.between(found["slowed_interval"], ".2%", found["rounds"]),
    )
    table.caption = (
        f"{found['rounds']} pairs, of {found['wanted']} that the spread asks for; the loop lets checkpoints lie "
        f"{found['apart_s']:.0f} s apart, for at most {SHARE:.0%}"
    )
    told = {"bench": "checkpoint", "preset": preset, "batch_tokens": asked, "load_before": round(load, 2), **found}
    show(console, [table], told)


class _Turns:
    """One worker that trains, and its checkpoints."""

    def __init__(self, plan: FitPlan, run: Path, every: float, console: Console) -> None:
        self._plan, self._every, self._ranks = plan, every, Ranks(0, 1, torch.device("cpu"))
        self._feed, self._model, self._optimizer = prepared(plan, self._ranks)
        self._store, self._step, self._console = CheckpointStore(run), 0, console
        self._train(1)  # so that there are moments
        one = self._train(1)
        self._updates = max(2, math.ceil(every / one))  # between two of them it is published
        self._say(
            f"an update takes {one:.2f} s: a turn has {self._updates}, a pair takes some {2 * self._updates * one:.0f} s"
        )

    def rounds(self, most: int, until: float) -> dict[str, Any]:
        """Medians over at most `most` rounds, after a turn that is not counted."""
        without, beside, slowed, saved = list[float](), list[float](), list[float](), list[Saved]()
        wanted, longest = most, 0.0
        self._beside()
        while len(slowed) < min(most, wanted):
            began = time.monotonic()
            if slowed and began + longest > until:
                self._say("no more pairs: another would not end in time")
                break
            for with_one in (False, True) if len(slowed) % 2 else (True, False):
                if with_one:
                    seconds, one = self._beside()
                    beside.append(seconds)
                    saved.append(one)
                else:
                    without.append(self._train(self._updates))
            slowed.append((beside[-1] - without[-1]) / self._every)
            longest = max(longest, time.monotonic() - began)
            if len(slowed) == PILOT:
                wanted = max(PILOT, math.ceil((OF_MEDIAN * stdev(slowed) / (SHARE / 2)) ** 2))
            self._say(f"pair {len(slowed)}: {without[-1]:.2f} s without, {beside[-1]:.2f} with: {slowed[-1]:+.2%}")
        cost = median(one.stalled + one.busy for one in saved)
        return {
            "every_s": self._every,
            "rounds": len(slowed),
            "wanted": wanted,
            "updates": self._updates,
            "bytes": sum(file.stat().st_size for file in saved[-1].path.iterdir()),
            "without_s": median(without),
            "with_s": median(beside),
            "stalled_s": median(one.stalled for one in saved),
            "took_s": median(one.took for one in saved),
            "busy_s": median(one.busy for one in saved),
            "slowed": median(slowed),
            "slowed_interval": intervals.Figure(0.0, intervals.median(slowed), len(slowed), len(slowed)).ends,
            "apart_s": max(self._every, cost / SHARE),
        }

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False)

    def _train(self, updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            self._update()
        return time.perf_counter() - start

    def _update(self) -> None:
        one_update(self._plan, self._feed, self._model, self._optimizer, self._ranks, self._step)
        self._step += 1

    def _beside(self) -> tuple[float, Saved]:
        """Seconds of a turn with a checkpoint, and what it says of itself."""
        start, saved = time.perf_counter(), None
        alone = not self._store.begin(self._model, self._optimizer, TrainState(step=self._step), self._ranks)
        for _ in range(self._updates):
            if saved is None and (alone or self._store.ready(self._ranks)):
                saved = self._store.publish(self._ranks)
            self._update()
        if saved is None:
            saved = self._store.publish(self._ranks)
        return time.perf_counter() - start, saved
