"""`shoal bench route --series`: does a second look pay, where an answer's difficulty shows only once it has begun?

An instance is a program of assignments, and its answer a series of lines, each of which reads a name, with the value after it:

    V d=1 k=d c=0 m=k ...  >  n=d 1 n=c 0 n=d 1 ...      easy: names that are set to a digit
    V ..                   >  n=k 1 n=m 1 n=b 2 ...      hard: names that lead to one over one or two others

Which of the two comes is drawn after the program, so that no prompt tells it: `KINDS` says how many lines of a series read a
name that is far from its digit. Beside them a control, in which each line is drawn by itself: there the first lines tell
nothing of the others, and no second look can pay.

A model is trained on series as the others of `shoal bench route` are. Then all is as `shoal.evaluate` does it for any model: a
router and a second look are fitted to some, and on others, which nothing has seen, two looks are held against one at equal
cost.

Letters: n series, C chains of L names, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shoal.bench.route_tasks import NAMES, WORDS, Asked, assigned
from shoal.bench.route_train import ROWS, Length, trained
from shoal.bench.turns import show
from shoal.evaluate.frontier import ends_of
from shoal.evaluate.intervals import between
from shoal.evaluate.prompts import Heldout, Prompts, measured
from shoal.evaluate.second_look import fitted, paid
from shoal.inputs.chat import Encoded
from shoal.model.net import Net
from shoal.model.router import TOLERANCES, fit_router

CHAINS, LINKS = 4, 3
LINES = 16  # of a series, each with its value
AFTER = 6  # tokens of it at the second look: three lines
KINDS = {"easy": 0.1, "hard": 0.8}  # share of a series' lines that read a name of more than one step
SERIES, CONTROL = "series", "control"


def series(draws: np.random.Generator, n: int) -> Asked:
    """`n` series of both kinds for training: all is in the instances and what is taught after each of their tokens."""
    tokens, targets, _ = drawn(draws, n)
    nothing = np.zeros((n, 0), dtype=int)
    return Asked(tokens, nothing[..., None], nothing, nothing, targets)


def drawn(draws: np.random.Generator, n: int, control: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and what is taught after each [n, T], -1: nothing; and the share of the lines of each that are hard to read, of
    which they were drawn [n]. After a line, of the program or of the series, that is its value; after a value the next line."""
    row = np.arange(n)[:, None]
    names = draws.random((n, len(NAMES) - 1)).argsort(1)[:, : CHAINS * LINKS].reshape(n, CHAINS, LINKS)
    digits = draws.integers(3, size=(n, CHAINS))
    leads = np.concatenate([digits[..., None] + len(NAMES), names[:, :, :-1]], axis=2)
    chain = np.repeat(np.arange(CHAINS), LINKS)[draws.random((n, CHAINS * LINKS)).argsort(1)]
    link = np.stack([(chain[:, : at + 1] == chain[:, at : at + 1]).sum(1) - 1 for at in range(CHAINS * LINKS)], axis=1)
    program, set_to = assigned(names[row, chain, link], leads[row, chain, link]), WORDS["0"] + digits[row, chain]
    shares = np.array(list(KINDS.values()))[draws.integers(2, size=n)]
    shares = np.full(n, mean(KINDS.values())) if control else shares
    far = np.where(draws.random((n, LINES)) < shares[:, None], draws.integers(1, LINKS, size=(n, LINES)), 0)
    read = draws.integers(CHAINS, size=(n, LINES))
    lines = assigned(np.full((n, LINES), len(NAMES) - 1), names[row, read, far])
    said = np.stack([lines, WORDS["0"] + digits[row, read]], axis=2).reshape(n, -1)
    ends = [np.full((n, 1), WORDS[word]) for word in "V>"]
    tokens = np.concatenate([ends[0], program, ends[1], said], axis=1)
    nothing = np.full((n, 1), -1)
    return tokens, np.concatenate([nothing, set_to, said, nothing], axis=1), shares


def run(
    console: Console,
    *,
    shape: str,
    seeds: int,
    seed: int,
    steps: int,
    minutes: float | None,
    rows: int = ROWS,
    keep: Path | None = None,
    fit: int = 640,
    test: int = 600,
) -> None:
    """As `route.route`: train and measure `seeds` seeds from `seed` on, on `fit` prompts and `test` others."""
    torch.set_num_threads(1)
    runs, length = [], Length(steps, minutes, rows)
    for number in range(seed, seed + seeds):
        start = time.process_time()
        net, updates = trained(
            shape, number, length, {SERIES: series}, keep, lambda line: console.print(line, highlight=False)
        )
        found = {name: measure(net, number, fit, test, name == CONTROL) for name in (SERIES, CONTROL)}
        runs.append({"seed": number, "updates": updates, **found, "cpu_seconds": time.process_time() - start})
    title = f"{shape}: {net.config.layers} layers, {length}, looked at again after {AFTER} of {2 * LINES} tokens"
    show(console, [_gaps(runs, title), _paid(runs)], {"shape": shape, "after": AFTER, "runs": runs})


def measure(net: Net, seed: int, fit: int, test: int, control: bool) -> dict[str, Any]:
    """The figures of one model: gaps by kind and exit on the rest of the answers, and what a second look is worth."""
    draws = np.random.default_rng((seed, 2_000_000 + control))  # no update has that number
    (known, _), (new, shares) = (prompts(net, draws, count, control) for count in (fit, test))
    router = fit_router(net.config, known.features, known.gaps, known.groups, seed=seed)
    later = fitted(net.config, router, known, seed=seed)
    assert new.rest is not None
    gaps = {
        kind: new.rest.gaps[torch.from_numpy(shares == share)].mean(0).tolist()
        for kind, share in KINDS.items()
        if (shares == share).any()
    }
    found = {"gaps": gaps or {CONTROL: new.rest.gaps.mean(0).tolist()}, "used": False, "paid": None}
    if later is None:  # one look does as well at every tolerance
        return found
    table = later.calibration
    found |= {"used": table.report.get("paid_high", 0.0) < 0, "offset": table.offset, "fit": table.report}
    return found | {"paid": paid(net.config, router, later, new)}


def prompts(net: Net, draws: np.random.Generator, count: int, control: bool) -> tuple[Prompts, np.ndarray]:
    """`count` series as the router and its second look see them, each a group of its own, and how hard each is."""
    tokens, _, shares = drawn(draws, count, control)
    answer = np.arange(tokens.shape[1]) >= tokens.shape[1] - 2 * LINES
    rows = [Heldout(Encoded(ids, [], answer.tolist()), place) for place, ids in enumerate(tokens.tolist())]
    return measured(net, {SERIES: rows}, AFTER), shares


def _gaps(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    names = ["shallow", "middle"]
    table = Table("kind", *names, title=f"nats a token above full depth, after the look; {title}")
    for kind in (*KINDS, CONTROL):
        rows = [run[CONTROL if kind == CONTROL else SERIES]["gaps"][kind] for run in runs]
        table.add_row(kind, *(f"{mean(row[place] for row in rows):.3f}" for place in range(len(names))))
    return table


def _paid(runs: Sequence[Mapping[str, Any]]) -> Table:
    """By tolerance what two looks cost and lose beside one at that cost, and over all tolerances with the interval."""
    table = Table("seed", "prompts", "at the fit", "two looks less one (95 %)", *map(str, TOLERANCES[::3]))
    table.title = "nats a token at equal cost, mean over tolerances; by tolerance FLOPs of full depth, two looks, one"
    for run in runs:
        for name in (SERIES, CONTROL):
            found = run[name]["paid"]
            at = {} if found is None else {row["tolerance"]: row for row in found["at"]}
            table.add_row(
                str(run["seed"]),
                name,
                "used" if run[name]["used"] else "not used",
                "-" if found is None else f"{found['gap']:+.4f} ({between(ends_of(found), '+.4f')})",
                *(
                    f"{at[t]['flops_share']:.2f}: {at[t]['twice']:.3f}, {at[t]['once']:.3f}" if t in at else "-"
                    for t in TOLERANCES[::3]
                ),
            )
    return table
