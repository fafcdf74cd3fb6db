"""`shoal bench augment`: is a recipe better in wordings that nobody saw, once rows are augmented, or a teacher answers more?

A model that a recipe made goes on learning, for as many updates each and from as many rows of the recipe:

    plain       from these alone: what going on is worth; all else is held against it
    augmented   and from a changed copy of each, as `shoal augment --synonyms` makes it; none asks what a suite asks
    taught      and from questions in wordings that are in no row and no suite, answered by a teacher over HTTP

Each arm with each seed is a job in a process of its own, two at once. What is compared are the same answers of the suites, in
pairs; an interval is over seeds and groups of answers (`evaluate.intervals.crossed`). Of suites in
wordings that were learned from, all but those of the recipe's `headline`, the figures are told and nothing is claimed.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from shoal.bench.turns import show
from shoal.clients.teacher import Ask, NoTarget, answered
from shoal.errors import DataError, UsageError
from shoal.evaluate.intervals import LEAST, UNKNOWN, Figure, between, crossed
from shoal.machine import write_aside
from shoal.recipes.named import named
from shoal.recipes.recipe import SUITES, Messages, Recipe

PLAIN, AUGMENTED, TAUGHT = ARMS = ("plain", "augmented", "taught")
ROWS, TAUGHT_ROWS = 1_000, 600  # of the recipe that an arm goes on with, and questions that a teacher is asked
AT_ONCE, ASKED_AT_ONCE = 2, 8  # jobs, and questions
NO_CLAIM = "nothing is claimed"  # in place of a verdict
RATE = 0.25  # of the recipe's learning rate: it has learned already

Hits = dict[str, list[bool]]  # suite -> of each of its answers whether it is right


@dataclass(frozen=True)
class Job:
    """One arm with one seed; plain values, since it travels to a process."""

    run: str
    arm: str
    seed: int
    data: str
    out: str
    steps: int


def augment_bench(
    console: Console, *, runs: Sequence[Path], teachers: Sequence[Path] = (), seeds: int = LEAST, steps: int = 150
) -> None:
    """Measure and print. `runs`: folders of recipes from nothing; `teachers`: model directories, of each run one [its own
    model in fp32]. Raises UsageError, and DataError for a folder that is no run of a recipe which can be augmented."""
    if seeds < 2 or steps < 1:
        raise UsageError("--seeds and --steps", got=min(seeds, steps), allowed="2 seeds, 1 update, or more")
    if teachers and len(teachers) != len(runs):
        raise UsageError("--teacher", got=len(teachers), allowed=f"one for each --run, {len(runs)}")
    recipes = [recipe_of(run) for run in runs]
    found = {}
    for at, (run, recipe) in enumerate(zip(runs, recipes, strict=True)):
        with tempfile.TemporaryDirectory(prefix="shoal-augment-") as work:
            teacher = teachers[at] if teachers else run / "model"
            counts = prepare(recipe, run, teacher, Path(work), lambda line: console.print(line, highlight=False))
            jobs = [
                Job(str(run), arm, seed, str(Path(work) / f"{arm}.jsonl"), str(Path(work) / f"{arm}-{seed}"), steps)
                for seed in range(seeds)
                for arm in ARMS
            ]
            context = multiprocessing.get_context("spawn")
            hits = []
            with ProcessPoolExecutor(AT_ONCE, mp_context=context) as pool:
                for job, one in zip(jobs, pool.map(learned, jobs), strict=True):
                    hits.append(one)
                    console.print(f"{recipe.name}: {job.arm}, seed {job.seed}, asked", highlight=False)
        told = compared(jobs, hits, groups_of(run), {suite for suite, _ in recipe.headline})
        console.print(_table(recipe, told))  # what ends the next run loses none of this
        found[recipe.name] = {"rows": counts, "teacher": str(teacher), "suites": told}
    show(console, [], {"steps": steps, "seeds": seeds, "recipes": found})


def recipe_of(run: Path) -> Recipe:
    """The recipe that a folder is a run of. Raises DataError for one that is none, has no model, or nothing to augment."""
    try:
        told = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        if told.get("data"):
            raise UsageError("recipe", got=f"{told['recipe']}, of a user's own data")
        recipe = named(str(told["recipe"]))
    except (OSError, ValueError, KeyError, UsageError) as error:  # the last: a user's own, or of no version known
        raise DataError(f"{run} is no run of a recipe of ours", got=str(error), do="make one: shoal recipe") from error
    if told.get("model") or not (run / "model" / "config.json").exists():
        raise DataError(f"{run} has no model from nothing", do="let shoal recipe finish there, without --model")
    if not recipe.synonyms:
        raise DataError(f"{run}: recipe", got=recipe.name, allowed="one with synonyms: medicine, law")
    return recipe


def prepare(recipe: Recipe, run: Path, teacher: Path, work: Path, say: Callable[[str], None]) -> dict[str, int]:
    """Write what each arm learns from to `work`; how many rows there are of each kind."""
    from shoal.data.chats.augment import Augmenter, augment, questions
    from shoal.data.chats.wording import read_synonyms

    lines = (run / recipe.lessons[-1].file).read_text(encoding="utf-8").splitlines()[:ROWS]
    plain = work / f"{PLAIN}.jsonl"
    write_aside(plain, "".join(line + "\n" for line in lines))
    words = work / "synonyms.txt"
    write_aside(words, "".join(f"{word} = {', '.join(others)}\n" for word, others in recipe.synonyms.items()))
    never = frozenset().union(
        *(questions(path) for path in (run / SUITES).glob("*.jsonl") if path.name != "uses.jsonl")
    )
    made = augment(plain, work / f"{AUGMENTED}.jsonl", Augmenter(1.0, 0, read_synonyms(words), never))
    say(f"{recipe.name}: {made['rows']} rows, {made['copies']} copies {made['by_way']}")
    taught = answers_of(teacher, recipe.unlabelled(TAUGHT_ROWS, 1))
    say(f"{recipe.name}: {len(taught)} of {TAUGHT_ROWS} questions were answered by {teacher}")
    write_aside(
        work / f"{TAUGHT}.jsonl",
        "".join(f"{line}\n" for line in [*lines, *(json.dumps(row, ensure_ascii=False) for row in taught)]),
    )
    return {"plain": len(lines), "copies": made["copies"], "taught": len(taught)}


def answers_of(teacher: Path, asked: Iterable[Messages]) -> list[dict[str, Any]]:
    """What a model says to questions over HTTP, as `shoal teach` asks it; answers that were cut off, or are empty, are left
    out. Raises ResourceError for one that cannot be served, DataError for a question that it refuses."""
    from shoal.recipes.footprint import alone

    with alone(teacher) as service, httpx.Client() as http:
        name = http.get(f"{service.url}/models").raise_for_status().json()["data"][0]["id"]
        ask = Ask(service.url, name, max_tokens=96, depth="full")

        def one(messages: Messages) -> dict[str, Any] | None:
            try:
                return answered(http, list(messages), ask)
            except NoTarget:
                return None

        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return [row for row in pool.map(one, asked) if row is not None]


def learned(job: Job) -> Hits:
    """Go on learning as a job says, and ask the suites at full depth."""
    import torch

    from shoal.config import FULL
    from shoal.model.model import Model
    from shoal.recipes.measure import ByEngine, rows_of
    from shoal.train.loop import fit
    from shoal.train.plan import finetune_plan

    torch.set_num_threads(1)
    run, recipe = Path(job.run), recipe_of(Path(job.run))
    train = recipe.preset.train
    how = {name: getattr(train, name) for name in ("optimizer", "batch_tokens", "accumulate", "weight_decay")}
    plan = finetune_plan(
        str(run / "model"), job.data, job.out, steps=job.steps, seed=job.seed, eval_every=0,
        learning_rate=RATE * train.learning_rate, **how,
    )  # fmt: skip
    fit(plan)
    answerer = ByEngine(Model.load(Path(job.out) / "model"), FULL, recipe, [])
    found = {}
    for name, rows in rows_of(run).items():
        answers = answerer([row["messages"][:-1] for row in rows])
        found[name] = recipe.rights(rows, answers)
    return found


def groups_of(run: Path) -> dict[str, list[str]]:
    """The group of each answer of the suites, by suite."""
    from shoal.recipes.measure import rows_of

    return {name: [str(row["group"]) for row in rows] for name, rows in rows_of(run).items()}


def compared(
    jobs: Sequence[Job], hits: Sequence[Hits], groups: Mapping[str, Sequence[str]], claimed: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Of each suite and arm: the ``right`` share, and of those beside the plain one what they add: ``added``, its 95 %
    ``interval``, and of ``each`` seed. `claimed`: suites of which may be said what was ``shown`` (`verdict`)."""
    seeds = sorted({job.seed for job in jobs})
    by = {(job.arm, job.seed): one for job, one in zip(jobs, hits, strict=True)}
    found: dict[str, dict[str, Any]] = {}
    for suite in hits[0]:
        arms = {arm: np.array([by[arm, seed][suite] for seed in seeds], dtype=float) for arm in ARMS}
        counts = {"answers": arms[PLAIN].shape[1], "groups": len(set(groups[suite]))}
        found[suite] = {**counts, PLAIN: {"right": float(arms[PLAIN].mean())}}
        for arm in ARMS[1:]:
            added = arms[arm] - arms[PLAIN]
            figure = Figure(
                float(added.mean()), crossed(added, groups[suite]), added.size, min(len(seeds), counts["groups"])
            )
            found[suite][arm] = {
                "right": float(arms[arm].mean()), "added": figure.value, "interval": figure.ends,
                "each": [float(value) for value in added.mean(1)],
            }  # fmt: skip
            found[suite][arm]["shown"] = verdict(found[suite][arm]) if suite in claimed else NO_CLAIM
    return found


def verdict(told: dict[str, Any]) -> str:
    """What may be claimed of an arm."""
    low, high = told["interval"] or UNKNOWN
    return "adds" if low > 0 else "takes away" if high < 0 else "not shown"


def _table(recipe: Recipe, told: dict[str, dict[str, Any]]) -> Table:
    table = Table("suite", "arm", "right", "added, points (95 %)", "each seed", "shown", title=recipe.name)
    for suite, arms in told.items():
        table.add_row(suite, PLAIN, f"{arms[PLAIN]['right']:.1%}", "", "", "")
        for arm in ARMS[1:]:
            one = arms[arm]
            ends = one["interval"] and [100 * end for end in one["interval"]]
            each = ", ".join(f"{100 * value:+.1f}" for value in one["each"])
            table.add_row(
                "",
                arm,
                f"{one['right']:.1%}",
                f"{100 * one['added']:+.1f} ({between(ends, '+.1f')})",
                each,
                one["shown"],
            )
    return table
