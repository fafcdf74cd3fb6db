"""The recipe: which exercises are learned from, fitted to and asked, and the model's shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from shoal import presets
from shoal.config import Preset
from shoal.errors import ResourceError
from shoal.evaluate.intervals import Figure
from shoal.machine import write_aside
from shoal.recipes.code import baselines, score, words
from shoal.recipes.code.exercises import EXPLAIN, REPAIR, WRITE, code_of, exercises, named, said_again
from shoal.recipes.customer_service.baselines import MAJORITY, NEAREST, RULE, majority, nearest
from shoal.recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row
from shoal.sandbox import refused

LEARNED, FITTED, ASKED = 12_000, 150, 50  # rows: to learn from, for the router, and of each kind in a suite
COMPARED = 4_000  # rows that the nearest is looked for in
KNOWN, NEW = "known-wordings.jsonl", "new-wordings.jsonl"  # suites
AGAIN, WHOLE = "learn-said-again.jsonl", "learn.jsonl"
# of a row: what it is judged by, which nothing learns from
_JUDGED = ("function", "cases", "slots", "wrong")
EXAMPLE = "Write quicksort in Python and explain."  # the mission's; its wording is not learned from


def _shape() -> Preset:
    """`tiny`, whose rows hold an exercise, with many small updates: copying begins after so many of them."""
    tiny = presets.get("tiny")
    model = dataclasses.replace(tiny.model, train_length=320, window=64, block=8, image_size=0)
    train = dataclasses.replace(tiny.train, learning_rate=4e-3, optimizer="muon", batch_tokens=1280, accumulate=1)
    return Preset("code", model, train)


class Code(Recipe):
    name = "code"
    told = "functions from a description, explained and mended; programs are run in a sandbox"
    preset = _shape()
    lessons = (Lesson(AGAIN, 0.2), Lesson(WHOLE, 0.8))
    most_tokens = 192
    measures = score.MEASURES
    least_is_best = score.LEAST_IS_BEST
    served = "pass@1"

    def write(self, folder: Path, seed: int) -> None:
        """Raises ResourceError where programs could not be run later on."""
        if why := refused():
            raise ResourceError(why)
        _write(folder / AGAIN, said_again(words.TRAIN, LEARNED, seed))
        rows = exercises(words.TRAIN, words.TRAIN, LEARNED, seed)
        _write(folder / WHOLE, ({key: row[key] for key in row if key not in _JUDGED} for row in rows))
        _write(folder / DEV, exercises(words.DEV, words.DEV, FITTED, seed, (WRITE, REPAIR, EXPLAIN)))
        for name, wordings in ((KNOWN, words.TRAIN), (NEW, words.SUITE)):
            some = [exercises(words.SUITE, wordings, ASKED, seed, (kind,)) for kind in (WRITE, REPAIR, EXPLAIN)]
            _write(folder / SUITES / name, (row for kind in some for row in kind))

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        with (folder / WHOLE).open(encoding="utf-8") as lines:
            rows: list[dict[str, Any]] = [json.loads(line) for line in islice(lines, COMPARED)]
        return {MAJORITY: majority(rows), RULE: baselines.rule, NEAREST: nearest(rows)}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers)

    def play(self, rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
        return score.round_trip(rows, answerer, seed)

    def workload(self, row: Row) -> str:
        return str(row["task"])

    def examples(self) -> Sequence[Messages]:
        return [[{"role": "user", "content": EXAMPLE}]]

    def shown(self, messages: Messages, answerer: Answerer) -> str:
        """The answer, and how many cases of quicksort come out when it is run."""
        answer = answerer([messages])[0]
        row = named("quicksort")
        (became,) = score.ran([row], [code_of(answer)])
        right = [wanted for _, wanted in row["cases"]]
        passed = sum(one == wanted for one, wanted in zip(became.values, right, strict=False))
        return f"{answer}\n(run in the sandbox: {passed} of {len(right)} cases come out)"


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
