"""Rows drawn by seed: some clauses of a licence, a question, and the answer: permitted or not, with the clause word for word,
or that the text does not say. Licence and wording each say which split a row is of."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from recipes.law import words
from recipes.law.clauses import LICENCES, OF_SPLIT, Clause
from recipes.splits import LANGUAGES, SUITE, TRAIN

ANSWER, SILENT = KINDS = ("answer", "silent")
SHOWN = 3  # clauses
SILENT_SHARE = 0.25


def questions(split: str, wordings: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """So many different rows of the licences of a split, with the wordings of a split, in both languages by turns. Of
    what is asked in a suite, rows on one matter of a licence in one language are a group: their answers are one, or none."""
    draws = random.Random(f"questions {split} {wordings} {seed}")
    known: set[str] = set()
    tries = 0
    while len(known) < count:
        tries += 1
        row = _drawn(split, wordings, LANGUAGES[len(known) % 2], draws, f"{split}-{wordings}-{seed}-{len(known)}")
        if (key := json.dumps(row["messages"])) in known:
            if tries > 200 * count:
                raise ValueError(f"there are no {count} different questions")
            continue
        known.add(key)
        yield row


def asked(clauses: list[str], question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": words.SYSTEM},
        {"role": "user", "content": "\n".join([*clauses, question])},
    ]


def said_again(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in which words of the clauses that are learned from are said again, in any order: so is copying learned."""
    draws = random.Random(f"said again {seed}")
    spelt = [word for name in OF_SPLIT[TRAIN] for clause in LICENCES[name] for word in clause.text.split()]
    for at in range(count):
        some = draws.choices(spelt, k=draws.randrange(3, 18))
        text = " ".join(word.swapcase() if draws.random() < 0.2 else word for word in some)
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        yield {"messages": turns, "task": "said again", "group": f"again-{seed}-{at}", "synthetic": True}


def written(clause: Clause | None, matter: str, language: str) -> str:
    """The answer to a question on a matter by a clause; None where the text is silent."""
    if clause is None:
        return words.SILENT[language]
    verdict = words.PERMITTED if matter in clause.permits else words.FORBIDDEN
    return f"{verdict[language]}: {clause.text}"


def _drawn(split: str, wordings: str, language: str, draws: random.Random, name: str) -> dict[str, Any]:
    licence = draws.choice(OF_SPLIT[split])
    clauses = LICENCES[licence]
    right = None if draws.random() < SILENT_SHARE else draws.choice(clauses)
    matter = draws.choice(tuple(words.ASKED[language]) if right is None else right.matters)
    some = [] if right is None else [right]
    others = [clause for clause in clauses if matter not in clause.matters + clause.near]
    some += draws.sample(others, min(SHOWN - len(some), len(others)))
    draws.shuffle(some)
    question = words.question(language, matter, wordings, licence, draws)
    answer = {"role": "assistant", "content": written(right, matter, language)}
    group = f"{licence}-{matter}-{language}" if wordings == SUITE else name
    return {
        "messages": [*asked([clause.text for clause in some], question), answer],
        "task": SILENT if right is None else ANSWER, "group": group, "language": language, "licence": licence,
        "matter": matter, "synthetic": True,
    }  # fmt: skip
