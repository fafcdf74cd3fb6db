"""The recipe: which exercises are learned from, fitted to and asked, and the model's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.baselines import MAJORITY, NEAREST, RULE, majority, nearest, rows_to_compare
from recipes.code import baselines, score, words
from recipes.code.exercises import EXPLAIN, REPAIR, WRITE, code_of, exercises, named, said_again
from recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row, write_rows
from recipes.shape import shaped
from shoal.api.policy import ChatPage, Policy
from shoal.errors import ResourceError
from shoal.evaluate.intervals import Figure
from shoal.sandbox import refused

LEARNED, FITTED, ASKED = 12_000, 150, 50  # rows: to learn from, for the router, and of each kind in a suite
# share of what is learned to be written: each of eleven must be met some hundred times to be known by heart
NAMED_LEARNED = 0.35
COMPARED = 4_000  # rows that the nearest is looked for in
KNOWN, NEW = "known-wordings.jsonl", "new-wordings.jsonl"  # suites
AGAIN, WHOLE = "learn-said-again.jsonl", "learn.jsonl"
# of a row: what it is judged by, which nothing learns from
_JUDGED = ("function", "cases", "slots", "wrong")
EXAMPLE = "Write quicksort in Python and explain."  # the mission's; its wording is not learned from
OTHER_EXAMPLES = (  # of the page
    "Write a Python function evens that returns the sum of the even numbers in a list.",
    "Explain this function:\n```python\ndef larger(numbers):\n    count = 0\n    for number in numbers:\n"
    "        if number > 5:\n            count += 1\n    return count\n```",
    "This function is wrong:\n```python\ndef last(numbers):\n    last = None\n    for number in numbers:\n"
    "        if number < 3:\n            last = number\n    return last\n```\n"
    "The test assert last([2, 5, 1]) == 5 fails, since it gives 1. Mend it.",
)


class Code(Recipe):
    name = "code"
    told = "functions from a description, explained and mended; programs are run in a sandbox"
    preset = shaped("code", row_tokens=320, batch_tokens=1280)  # a row holds an exercise
    lessons = (Lesson(AGAIN, 0.2), Lesson(WHOLE, 0.8))
    most_tokens = 192
    measures = score.MEASURES
    least_is_best = score.LEAST_IS_BEST
    served = "pass@1"
    headline = ((Path(NEW).stem, ("pass@1", "repair rate")),)

    def write(self, folder: Path, seed: int) -> None:
        """Raises ResourceError where programs could not be run later on."""
        if why := refused():
            raise ResourceError(why)
        write_rows(folder / AGAIN, said_again(words.TRAIN, LEARNED, seed))
        rows = exercises(words.TRAIN, words.TRAIN, LEARNED, seed, named_share=NAMED_LEARNED)
        write_rows(folder / WHOLE, ({key: row[key] for key in row if key not in _JUDGED} for row in rows))
        write_rows(folder / DEV, exercises(words.DEV, words.DEV, FITTED, seed, (WRITE, REPAIR, EXPLAIN)))
        for name, wordings in ((KNOWN, words.TRAIN), (NEW, words.SUITE)):
            some = [exercises(words.SUITE, wordings, ASKED, seed, (kind,)) for kind in (WRITE, REPAIR, EXPLAIN)]
            write_rows(folder / SUITES / name, (row for kind in some for row in kind))

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        rows = rows_to_compare(folder / WHOLE, COMPARED)
        return {MAJORITY: majority(rows, baselines.kind), RULE: baselines.rule, NEAREST: nearest(rows)}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers)

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return score.rights(rows, answers)

    def play(self, rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
        return score.round_trip(rows, answerer, seed)

    def workload(self, row: Row) -> str:
        return str(row["task"])

    def policy(self) -> Policy:
        """The page's words: none before a question, as in what is learned from."""
        return Policy(page=ChatPage("code", "", (EXAMPLE, *OTHER_EXAMPLES)))

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
