"""Batch inference over a Ray Dataset: questions in, the rows that a teacher answered out.

questions.jsonl ─> lines ─> ask the teacher, `concurrency` at once ─> OUT.partial ─> OUT
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray.data

from shoal.api import teacher
from shoal.api.teacher import TEACHER, Ask
from shoal.data.chats import lines
from shoal.errors import DataError

BATCH = 8  # questions that one task asks, one after the other
KEY_VARIABLE = "SHOAL_TEACHER_KEY"  # the teacher's API key; it stands in no file


def teach(
    source: str | Path,
    out: str | Path,
    ask: Ask,
    *,
    concurrency: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Write the rows of `source` with the teacher's answers to `out` (both JSONL), in any order, and return how many were
    "answered" now, taken "kept" from an interrupted run of the same request, and "refused". A Ray must be running.

    Raises DataError when `source` has no question or `out` exists, ResourceError for a teacher that does not answer.
    """
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise DataError(f"{out} exists", do="choose another --out")
    counts = {"answered": 0, "kept": 0, "refused": 0}
    asked: dict[str, list[dict[str, Any]]] = {}
    for line in lines(Path(source)):
        try:
            messages = teacher.questions(line)
        except DataError:
            counts["refused"] += 1
            continue
        asked[teacher.identity(messages, ask)] = messages
    if not asked:
        raise DataError(f"{source} holds no question", allowed='{"messages": [...]} a line')
    total, reason = len(asked), ""
    key = os.environ.get(KEY_VARIABLE)  # of this process: workers elsewhere have another
    for row in map(json.loads, lines(partial)) if partial.exists() else ():
        counts["kept"] += asked.pop(row[TEACHER]["question"], None) is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as file:
        if asked:
            todo = ray.data.from_items([{"messages": json.dumps(messages)} for messages in asked.values()])
            done = todo.map_batches(
                _Teacher,
                fn_constructor_args=(ask, key),
                batch_size=BATCH,
                compute=ray.data.ActorPoolStrategy(size=concurrency),
                num_cpus=0.1,
            )
            for row in done.iter_rows():
                if row["refused"]:
                    counts["refused"] += 1
                    reason = row["refused"]
                else:
                    file.write(row["row"] + "\n")
                    file.flush()
                    counts["answered"] += 1
                on_progress(counts["answered"] + counts["kept"], total)
    if not counts["answered"] + counts["kept"]:
        raise DataError(
            "the teacher refused all questions, the last one so", got=reason, do="ask one with `shoal chat`"
        )
    os.replace(partial, out)
    return counts


class _Teacher:
    """One connection to the teacher."""

    def __init__(self, ask: Ask, key: str | None) -> None:
        self._ask, self._http = ask, httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows, refused = [], []
        for messages in batch["messages"]:
            try:
                rows.append(
                    json.dumps(teacher.answered(self._http, json.loads(messages), self._ask), ensure_ascii=False)
                )
                refused.append("")
            except DataError as error:
                rows.append("")
                refused.append(error.message)
        return {"row": rows, "refused": refused}
