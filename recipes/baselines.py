"""What a model is held against in every recipe: the commonest answer, and the answer to what was most like it in training.
Beside them stands a keyword rule of the recipe's own.

Each is asked as a model is, and answers as a model does (`recipe.Answerer`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.recipe import Answerer, Messages
from shoal.inputs.tools import call as written

MAJORITY, RULE, NEAREST = NAMES = ("majority", "keyword rule", "nearest")
GRAMS, BUCKETS = 3, 4096  # characters that are compared at once, and numbers that they are counted under
MOST_TURNS = 6_000  # of training that the nearest is looked for in
ALL = object()  # what is of no kind that training has
_CJK = re.compile(r"[\u4e00-\u9fff]")


def rows_to_compare(path: Path, most: int = MOST_TURNS) -> list[dict[str, Any]]:
    """The first rows of a file to learn from."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, most)]


def reference(message: Mapping[str, Any]) -> str:
    """A message of the assistant as a model would write it."""
    calls = (one["function"] for one in message.get("tool_calls", ()))
    return (message.get("content") or "") + "".join(written(one["name"], one["arguments"]) for one in calls)


def majority(turns: Sequence[Mapping[str, Any]], kind: Callable[[Messages], object] = lambda _: "") -> Answerer:
    """Says what is said most in training where a question is of the same `kind`, such as its language [all are of one]."""
    said: dict[object, Counter[str]] = {}
    for turn in turns:
        for of in (kind(turn["messages"][:-1]), ALL):
            said.setdefault(of, Counter())[reference(turn["messages"][-1])] += 1
    return lambda asked: [said.get(kind(messages), said[ALL]).most_common(1)[0][0] for messages in asked]


def language_of(messages: Messages) -> str:
    """Of what the user said last; what tools gave may be in another."""
    said = [str(message["content"]) for message in messages if message["role"] == "user"]
    return "zh" if said and _CJK.search(said[-1]) else "en"


def nearest(turns: Sequence[Mapping[str, Any]]) -> Answerer:
    """Says what was said in training where the last two messages were most like these."""
    some = turns[:MOST_TURNS]
    known = np.stack([_counts(turn["messages"][:-1]) for turn in some])
    rarity = np.log(len(known) / (1.0 + (known > 0).sum(0)))
    known = _unit(known * rarity)

    def answer(asked: Sequence[Messages]) -> list[str]:
        given = _unit(np.stack([_counts(messages) for messages in asked]) * rarity)
        return [reference(some[place]["messages"][-1]) for place in (given @ known.T).argmax(1).tolist()]

    return answer


def _counts(messages: Messages) -> np.ndarray:
    """How often each run of characters is in the last two messages, float32 [BUCKETS]."""
    counts = np.zeros(BUCKETS, dtype=np.float32)
    for message in messages[-2:]:
        text = f"{message['role']}: {message.get('content') or reference(message)}"
        for start in range(max(1, len(text) - GRAMS + 1)):
            counts[xxhash.xxh3_64_intdigest(text[start : start + GRAMS].encode()) % BUCKETS] += 1
    return counts


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
