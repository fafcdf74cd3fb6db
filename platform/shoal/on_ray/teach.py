"""Batch inference over a Ray Dataset: questions in, the rows that a teacher answered out.

questions.jsonl ─> lines ─> ask the teacher, `concurrency` at once ─> OUT.partial ─> OUT
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import ray.data

from shoal.clients import teacher
from shoal.clients.teacher import TEACHER, Ask
from shoal.data.chats.rows import lines
from shoal.errors import DataError
from shoal.on_ray.each import as_raised

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
    "answered" now, taken "kept" from an interrupted run of the same request, and "refused"; left out since their answer was
    "cut_off" or "empty", or their question "repeated" another. A Ray must be running.

    Raises DataError when `source` has no question, `out` exists, or ``OUT.partial`` is of another request or command,
    ResourceError for a teacher that does not answer.
    """
    out, partial = Path(out), Path(f"{out}.partial")
    if out.exists():
        raise DataError(f"{out} exists", do="choose another --out")
    counts = {"answered": 0, "kept": 0, "refused": 0, "cut_off": 0, "empty": 0, "repeated": 0}
    asked = _asked(Path(source), ask, counts)
    total, reason = len(asked), ""
    out.parent.mkdir(parents=True, exist_ok=True)
    with alone(partial) as file:
        if out.exists():  # another command finished it since
            if not os.fstat(file.fileno()).st_size:
                partial.unlink()
            raise DataError(f"{out} exists", do="choose another --out")
        for question in _kept(file, partial, asked):
            del asked[question]
            counts["kept"] += 1
        for row in _answers(asked.values(), ask, concurrency):
            counts[row["kind"]] += 1
            if row["kind"] == "answered":
                file.write(row["row"].encode() + b"\n")
                file.flush()
            else:
                reason = row["row"]
            on_progress(counts["answered"] + counts["kept"], total)
        if not counts["answered"] + counts["kept"]:
            raise DataError(
                "the teacher refused all questions, the last one so", got=reason, do="ask one with `shoal chat`"
            )
        os.replace(partial, out)  # while it is held: another command would find it gone
    return counts


def _asked(source: Path, ask: Ask, counts: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The questions of `source` by their identity, each once; `counts` is told of those "refused" and "repeated". Raises
    DataError where there is none."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for line in lines(source):
        try:
            messages = teacher.questions(line)
        except DataError:
            counts["refused"] += 1
            continue
        question = teacher.identity(messages, ask)
        counts["repeated"] += question in asked
        asked[question] = messages
    if not asked:
        raise DataError(f"{source} holds no question", allowed='{"messages": [...]} a line')
    return asked


def _answers(asked: Collection[list[dict[str, Any]]], ask: Ask, concurrency: int) -> Iterator[dict[str, str]]:
    """What `_Teacher` gives for each of `asked`, as it comes."""
    if not asked:
        return
    key = os.environ.get(KEY_VARIABLE)  # of this process: workers elsewhere have another
    with as_raised("ask the teacher"):
        todo = ray.data.from_items([{"messages": json.dumps(messages)} for messages in asked])
        done = todo.map_batches(
            _Teacher,
            fn_constructor_args=(ask, key),
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=concurrency),
            num_cpus=0.1,
        )
        yield from done.iter_rows()


@contextmanager
def alone(partial: Path) -> Iterator[IO[bytes]]:
    """The file, to read and to append to, with no other command at it. Raises DataError."""
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                raise FileNotFoundError(partial)  # the command that held it has just put it in place
        except OSError as error:
            raise DataError(
                f"{partial} is being written", do="wait for that command, or choose another --out"
            ) from error
        yield file


def _kept(file: IO[bytes], partial: Path, asked: Container[str]) -> set[str]:
    """The questions that an interrupted run of the same request had answered. A last line that was torn is taken away, so that
    the next begins on its own. Raises DataError for what another request left there."""
    found, end = set[str](), 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            question = json.loads(line)[TEACHER]["question"]
        except (ValueError, LookupError, TypeError, RecursionError):
            question = None
        if question not in asked or question in found:
            raise DataError(
                f"{partial}, line {number}", got="no answer to this request", do="move it away, or choose another --out"
            )
        found.add(question)
    file.truncate(end)
    return found


class _Teacher:
    """One connection to the teacher."""

    def __init__(self, ask: Ask, key: str | None) -> None:
        self._ask, self._http = ask, httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`row`: the answered row, or why there is none; `kind`: as what it is counted."""
        rows, kinds = [], []
        for messages in batch["messages"]:
            try:
                row = teacher.answered(self._http, json.loads(messages), self._ask)
                rows.append(json.dumps(row, ensure_ascii=False))
                kinds.append("answered")
            except DataError as error:
                rows.append(error.message)
                kinds.append(getattr(error, "kind", "refused"))
        return {"row": rows, "kind": kinds}
