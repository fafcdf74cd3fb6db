"""`shoal bench route`: does the router see difficulty that neither a prompt's length nor its domain tells?

A small model is trained on the mix of `route_tasks`, whose levels are known and hidden. Then: exact match by level and exit;
what the router loses beside simpler policies at equal compute, inside each family, in nats and in exact match; and whether its
calibration holds on prompts that it has not seen. All of it for each seed, with new prompts. Beside it a router that looks
again after group 2 and may only go deeper, by what that group says.

Letters: M prompts, T tokens, E exits, A early exits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shoal.bench.route_tasks import FAMILIES, LEVELS, prompts
from shoal.bench.route_train import ROWS, Length, trained
from shoal.bench.turns import show
from shoal.evaluate.frontier import BUDGETS, POLICIES, TWICE, ends_of, frontier, looked_twice
from shoal.evaluate.intervals import between, of_share
from shoal.evaluate.prompts import Prompts
from shoal.evaluate.tolerance import lost
from shoal.model.net import Net
from shoal.model.router import Router, features, fit_router, page_sums

_NAMES = (*POLICIES, TWICE)


@dataclass(frozen=True)
class Measured:
    """Prompts with what each exit makes of them."""

    prompts: Prompts  # their tasks are the families; each is a group of its own
    hits: Tensor  # bool [M, E]: is the likeliest token the answer?
    levels: Tensor  # [M]
    seen: Tensor  # [M, 2D + 3]: features of the second look


def route(
    console: Console,
    *,
    shape: str = "narrow",
    seeds: int = 3,
    seed: int = 0,
    steps: int = 3_000,
    minutes: float | None = None,
    rows: int = ROWS,
    families: Sequence[str] = tuple(FAMILIES),
    fit: int = 960,
    test: int = 400,
    keep: Path | None = None,
) -> None:
    """Train and measure `seeds` seeds from `seed` on, on `fit` prompts of a family for the router and `test` for the figures.
    Each model is trained for `steps` updates, or for `minutes` if there are any, each of `rows` instances of a family. `keep`:
    a folder for the trained models, from which a run that was cut off goes on."""
    torch.set_num_threads(1)
    runs, length = [], Length(steps, minutes, rows)
    for number in range(seed, seed + seeds):
        start = time.process_time()
        tasks = {family: FAMILIES[family] for family in families}
        net, updates = trained(shape, number, length, tasks, keep, lambda line: console.print(line, highlight=False))
        run = {"seed": number, "updates": updates, **measure(net, number, families, fit, test)}
        run["cpu_seconds"] = time.process_time() - start  # of training, too, unless that was kept
        runs.append(run)
    config, count = net.config, sum(p.numel() for p in net.parameters())
    title = f"{shape}: {config.layers} layers, {count:,} parameters, {length}, {seeds} seed(s)"
    show(
        console,
        [_matches(runs, title), _beside(runs), _calibration(runs)],
        {
            "shape": shape,
            "parameters": count,
            "steps": steps if minutes is None else None,  # each run says how many updates its minutes were
            "minutes": minutes,
            "rows": rows,
            "seeds": seeds,
            "runs": runs,
        },
    )


def measure(net: Net, seed: int, families: Sequence[str], fit: int, test: int) -> dict[str, Any]:
    """The figures of one model."""
    draws = np.random.default_rng((seed, 1_000_000))  # no update has that number
    fitted, tested = (measured(net, draws, families, count) for count in (fit, test))
    router, second = (
        fit_router(net.config, seen, fitted.prompts.gaps, seed=seed) for seen in (fitted.prompts.features, fitted.seen)
    )
    names = list(net.config.exit_names)
    found: dict[str, Any] = {"exact_match": {}, "families": {}}
    for family in families:
        of = torch.tensor([task == family for task in tested.prompts.tasks])
        found["exact_match"][family] = {
            str(level): {
                name: _share(tested.hits[of & (tested.levels == level), place]) for place, name in enumerate(names)
            }
            for level in range(1, LEVELS + 1)
        }
        found["families"][family] = policies(net, router, second, fitted, _chosen(tested, of))
    found["families"]["all"] = policies(net, router, second, fitted, tested)
    kept = lost(net.config, router, tested.prompts)
    found["tolerance"], found["calibration"] = kept["tolerance"], {row["task"]: row for row in kept["by_task"]}
    found["by_tolerance"] = kept["by_tolerance"]
    return found


def policies(net: Net, router: Router, second: Router, fitted: Measured, tested: Measured) -> dict[str, Any]:
    """At equal compute: the loss of each policy (nats a token above full depth), mean over `BUDGETS` with how far it lies
    behind the router's, and at each of them, with 95 % intervals over the prompts; and the same of exact match (what is
    missed that full depth hits). `second`: the router's second look."""
    looks = looked_twice(net.config, router(tested.prompts.features)[0], second(tested.seen)[0])
    nats = frontier(net.config, router, fitted.prompts, tested.prompts, looks=looks)
    missed = (tested.hits[:, -1:].float() - tested.hits[:, :-1].float()).float()
    match = frontier(net.config, router, fitted.prompts, tested.prompts, lost=missed, looks=looks)
    return {
        what: {
            "mean": {name: mean(row["gap"] for row in some["at"][name]) for name in _NAMES},
            "behind": some["behind"],
            "fixed": some["fixed"],
            "at": some["at"],
        }
        for what, some in (("nats", nats), ("missed", match))
    } | {"full_match": float(tested.hits[:, -1].float().mean())}


@torch.inference_mode()
def measured(net: Net, draws: np.random.Generator, families: Sequence[str], count: int) -> Measured:
    """`count` prompts of each family, all of one length, with features, gaps and hits."""
    exits, parts = net.config.exits, []
    for family in families:
        ids, answers, levels = (torch.from_numpy(some) for some in prompts(family, draws, count))
        hidden = net(ids, exits=exits)
        says = torch.stack([net.head(hidden[e][:, -1], e) for e in exits], dim=1)  # [count, E, V]
        losses = F.cross_entropy(says.flatten(0, 1), answers.repeat_interleave(len(exits)), reduction="none")
        losses = losses.view(count, len(exits))
        seen, again = (
            torch.stack(
                [
                    features(page_sums(net, state, row, nll=False), state[-1], len(row))
                    for state, row in zip(hidden[layers], ids, strict=True)
                ]
            )
            for layers in exits[:2]
        )
        lengths = torch.full((count,), ids.shape[1])
        gaps, said = losses[:, :-1] - losses[:, -1:], torch.ones(count, dtype=torch.long)
        of = Prompts(seen, gaps, lengths, said, (family,) * count, torch.arange(count))
        parts.append(Measured(of, says.argmax(-1) == answers[:, None], levels, again))
    every = Prompts(
        torch.cat([part.prompts.features for part in parts]),
        torch.cat([part.prompts.gaps for part in parts]),
        torch.cat([part.prompts.lengths for part in parts]),
        torch.cat([part.prompts.answers for part in parts]),
        tuple(task for part in parts for task in part.prompts.tasks),
        torch.arange(count * len(parts)),
    )
    return Measured(every, *(torch.cat([getattr(part, name) for part in parts]) for name in ("hits", "levels", "seen")))


def _chosen(some: Measured, of: Tensor) -> Measured:
    """Those prompts of `some` for which `of` [M] holds."""
    return Measured(some.prompts.some(of), some.hits[of], some.levels[of], some.seen[of])


def _share(hits: Tensor) -> dict[str, Any]:
    figure = of_share(hits.tolist(), list(range(len(hits))))
    return {"share": figure.value, "interval": figure.ends, "prompts": figure.rows}


def _matches(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Exact match by family, exit and level, mean over seeds."""
    levels = range(1, LEVELS + 1)
    table = Table("family", "exit", *map(str, levels), title=f"exact match by level; {title}", box=SIMPLE_HEAD)
    for family, found in runs[0]["exact_match"].items():
        for name in found["1"]:
            shares = [mean(run["exact_match"][family][str(level)][name]["share"] for run in runs) for level in levels]
            table.add_row(family, name, *(f"{share:.2f}" for share in shares))
    return table


def _beside(runs: Sequence[Mapping[str, Any]]) -> Table:
    """By family and policy: what is lost, mean over seeds, and how much more than the router loses, in each seed."""
    title = f"lost beside full depth, mean over {BUDGETS[0]:.0%} to {BUDGETS[-1]:.0%} of the FLOPs"
    behind = "beyond the router, by seed (95 %)"
    table = Table("family", "policy", "nats", behind, "exact match", behind, title=title, box=SIMPLE_HEAD)
    for family in [*runs[0]["exact_match"], *["all"] * (len(runs[0]["exact_match"]) > 1)]:
        for name in _NAMES:
            cells = []
            for what in ("nats", "missed"):
                of = [run["families"][family][what] for run in runs]
                apart = [some["behind"][name] for some in of if name in some["behind"]]  # the router has none
                cells += [
                    f"{mean(some['mean'][name] for some in of):.3f}",
                    "\n".join(f"{row['gap']:.3f} ({between(ends_of(row), '.3f')})" for row in apart),
                ]
            table.add_row(family, name, *cells)
        table.add_section()
    return table


def _calibration(runs: Sequence[Mapping[str, Any]]) -> Table:
    """What the router promised at the default tolerance, and what came of it on new prompts."""
    title = f"tolerance {runs[0]['tolerance']:g}: what is promised is the mean loss, in 95 % of calibrations"
    table = Table("seed", "prompts", "share of the layers", "loss (95 %)", "above (95 %)", title=title, box=SIMPLE_HEAD)
    for run in runs:
        row = run["calibration"]["all together"]
        table.add_row(
            str(run["seed"]),
            str(row["prompts"]),
            f"{row['depth_share']:.2f}",
            f"{row['loss']:.3f} ({between(row['loss_interval'], '.3f', row['groups'])})",
            f"{row['above']:.1%} ({between(row['above_interval'], '.1%', row['groups'])})",
        )
    return table
