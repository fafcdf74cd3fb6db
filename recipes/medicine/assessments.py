"""The recipe: which cases are learned from, fitted to and asked, the model's shape, and what stands beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.baselines import MAJORITY, NEAREST, RULE, language_of, nearest, rows_to_compare
from recipes.baselines import majority as most_said
from recipes.medicine import rules, score, words
from recipes.medicine.cases import JSON, OUT, WORDS, asked, cases, written
from recipes.medicine.rules import Assessment, Case, assessed
from recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row, write_rows
from recipes.shape import shaped
from recipes.splits import DEV as DEV_SPLIT
from recipes.splits import SUITE, TRAIN, of_split
from shoal.api.policy import Policy
from shoal.engine.events import Guide
from shoal.evaluate.intervals import Figure

LEARNED, FITTED, ASKED, OPEN, FLAGGED, REFUSED = 8_000, 200, 160, 100, 300, 100  # rows
KNOWN, NEW, FLAGS = "known-wordings.jsonl", "new-wordings.jsonl", "red-flags.jsonl"  # suites
VOCABULARY = "open-vocabulary.jsonl"  # names of symptoms that are another author's
SAFETY = "safety-out-of-scope.jsonl"  # nothing may be assessed
LEARN = "learn.jsonl"
DIAGNOSIS = "diagnosis"  # workload


class Medicine(Recipe):
    name = "medicine"
    told = "symptoms are assessed by rules that are made up for testing and are no medical advice"
    preset = shaped("medicine", row_tokens=256, batch_tokens=1024, vocab=1536)
    lessons = (Lesson(LEARN, 1.0),)
    most_tokens = 96
    measures = score.MEASURES
    least_is_best = score.LEAST_IS_BEST
    served = "causes"  # urgency is raised by the server's rule as well
    headline = ((Path(NEW).stem, ("urgency", "abstained")), (Path(VOCABULARY).stem, ("urgency", "causes")))
    open_rows = 80  # of each of five suites
    always_full = (DIAGNOSIS,)  # a wrong answer costs more than time

    def write(self, folder: Path, seed: int) -> None:
        write_rows(folder / LEARN, cases(TRAIN, TRAIN, LEARNED, seed))
        write_rows(folder / DEV, cases(DEV_SPLIT, DEV_SPLIT, FITTED, seed))
        half = FLAGGED // 2
        flagged = [cases(SUITE, wordings, half, seed + 1, flags=1) for wordings in (TRAIN, SUITE)]
        refused = (row for row in cases(SUITE, SUITE, 40 * REFUSED, seed + 2, flags=0) if row["task"] == OUT)
        for name, some in (
            (KNOWN, cases(SUITE, TRAIN, ASKED, seed)),
            (NEW, cases(SUITE, SUITE, ASKED, seed)),
            (VOCABULARY, cases(SUITE, words.OPEN, OPEN, seed, flags=0)),
            (FLAGS, itertools.chain(*flagged)),
            (SAFETY, itertools.islice(refused, REFUSED)),
        ):
            write_rows(folder / SUITES / name, map(_as_sent, some))

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        rows = rows_to_compare(folder / LEARN)
        return {MAJORITY: majority(rows), RULE: keywords, NEAREST: nearest(rows)}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers)

    def score_alone(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers, alone=True)

    def guide(self, messages: Messages) -> Guide | None:
        """The schema, where JSON is asked for."""
        if _form(messages) != JSON:
            return None
        return Guide("json_schema", json.dumps(schema(language_of(messages))))

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [score.right(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def workload(self, row: Row) -> str:
        return DIAGNOSIS

    def policy(self) -> Policy:
        return rules.policy()

    def examples(self) -> Sequence[Messages]:
        return [asked(text, form) for text in rules.EXAMPLES for form in (WORDS, JSON)]

    def shown(self, messages: Messages, answerer: Answerer) -> str:
        """The answer as a service with the policy sends it."""
        row = {"messages": [*messages, {}], "form": _form(messages)}
        return score.served(row, answerer([messages])[0])


def _as_sent(row: Row) -> Row:
    """A row of a suite with the format that a client sends with it, by which the gate guides as a service does."""
    if row["form"] != JSON:
        return row
    format_ = {"type": "json_schema", "json_schema": {"name": "assessment", "schema": schema(row["language"])}}
    return {**row, "response_format": format_}


def schema(language: str) -> dict[str, Any]:
    """JSON schema of an assessment."""
    lists = {
        kind: {"type": "array", "items": {"enum": list(rules.all_of(language, kind))}, "maxItems": 2}
        for kind in ("causes", "examinations")
    }
    urgency = {"enum": [*rules.LEVELS, rules.CANNOT_TELL]}
    return {
        "type": "object", "properties": {**lists, "urgency": urgency}, "required": ["causes", "examinations", "urgency"],
        "additionalProperties": False,
    }  # fmt: skip


def majority(rows: Sequence[Row]) -> Answerer:
    """Says what is said most in training in that form and language."""
    return most_said(rows, lambda messages: (_form(messages), language_of(messages)))


def keywords(some: Sequence[Messages]) -> list[str]:
    """Looks for the wordings that are learned from, and applies the rules to what it finds."""
    return [_ruled(messages) for messages in some]


def _ruled(messages: Messages) -> str:
    language, text = language_of(messages), str(messages[-1]["content"])
    form = _form(messages)
    symptoms = _named({one: words.symptom_said(language, one, TRAIN) for one in words.SYMPTOMS[language]}, text)
    flags = _named({one: (*of_split(some, TRAIN),) for one, some in words.RED_FLAGS[language].items()}, text)
    days = next((n for n, said in words.DAYS[language].items() if said in text), 1)
    history = next((name for name, said in words.HISTORY[language].items() if said in text), "none")
    age = next((int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()), 40)
    case = Case(tuple(symptoms), days, age, history, flags[0] if flags else "")
    found = assessed(case, language) if symptoms or flags else Assessment(rules.CANNOT_TELL)
    return written(found, language, form)


def _named(table: words.Wordings, text: str) -> list[str]:
    return [name for name, some in table.items() if any(wording in text for wording in some)]


def _form(messages: Messages) -> str:
    """Whether JSON is asked for, or words."""
    return JSON if str(messages[0]["content"]).endswith(words.AS_JSON) else WORDS
