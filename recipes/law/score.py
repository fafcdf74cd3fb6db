"""What an answer to a question about a licence is worth.

verdict     permitted, not permitted, or not said: the reference's
quote       where the text says it: that clause, word for word, and nothing else
right       both; where the text is silent, that it says so
abstained   where the text is silent; answered: where it is not
invented    quotes that do not stand in the text, in which the question is none; must be 0. A part of a clause stands there
"""

from __future__ import annotations

from collections.abc import Sequence

from recipes.law import words
from recipes.law.questions import SILENT
from recipes.recipe import Row
from shoal.evaluate.intervals import Figure, of_share

MEASURES = ("verdict", "quote", "right", "abstained", "answered", "invented")
LEAST_IS_BEST = ("invented",)


def read(answer: str, language: str) -> tuple[str, str]:
    """The verdict and the quote of an answer; no verdict where it is none."""
    if answer.strip() == words.SILENT[language]:
        return SILENT, ""
    verdict, colon, quote = answer.strip().partition(": ")
    return (verdict, quote) if colon and verdict in (words.PERMITTED[language], words.FORBIDDEN[language]) else ("", "")


def right(row: Row, answer: str) -> bool:
    return read(answer, row["language"]) == read(row["messages"][-1]["content"], row["language"])


def scored(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
    """The measures of answers to rows, by name; of those that no row is for there is none."""
    hits: dict[str, list[tuple[bool, str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        verdict, quote = read(answer, row["language"])
        wanted, clause = read(row["messages"][-1]["content"], row["language"])
        found = {"verdict": verdict == wanted, "right": right(row, answer)}
        *clauses, _ = row["messages"][-2]["content"].split("\n")
        found["invented"] = bool(quote) and not any(_stands(quote, clause) for clause in clauses)
        if wanted == SILENT:
            found["abstained"] = verdict == SILENT
        else:
            found |= {"answered": verdict not in (SILENT, ""), "quote": quote == clause}
        for name, value in found.items():
            hits.setdefault(name, []).append((value, row["group"]))
    return {name: of_share([v for v, _ in some], [group for _, group in some]) for name, some in hits.items()}


def _stands(quote: str, clause: str) -> bool:
    """Whether a clause has those words, one after the other."""
    return f" {quote.strip()} " in f" {clause} "
