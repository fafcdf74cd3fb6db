"""Requests from a file, answered into a file, over a Ray Dataset: an engine in each worker, and no server between.

    IN (JSONL, as of `/v1/batches`) ─> checked, once ─> places of lines ─> workers: an engine behind the API's routes ─┐
    OUT <─ OUT.partial, OUT.errors <─ OUT.errors.partial   as answers come; the same command goes on  <────────────────┘

Notable: workers read the lines themselves, so IN has to lie where all nodes see it. They take a few dozen lines at a time and
several such lots at once, so an engine is full until the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray.data

from shoal.api.batches import lines
from shoal.api.batches.lines import LineError, Log
from shoal.api.limits import Limits
from shoal.data.models import here
from shoal.data.sources.s3 import is_remote
from shoal.errors import DataError, ResourceError
from shoal.machine import sha256_of, threads
from shoal.on_ray.each import Tries, as_raised
from shoal.on_ray.teach import alone

LOT = 64  # lines that one task asks
LOTS = 3  # that a worker has at once
LOTS_EACH = 8  # for each worker at least, so that all end together
SECONDS = 7 * 86400.0  # longest time of one request


def batch(
    source: str | Path,
    out: str | Path,
    model: str | Path,
    *,
    name: str | None = None,
    workers: int = 1,
    gpu: bool = False,
    max_batch: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Answers the lines of `source` into `out`, in any order; those that are refused or fail stand in ``OUT.errors``. Returns
    how many were "answered", "failed", and of both how many were "kept" from an interrupted run. A Ray must be running.

    Raises DataError for a source without lines, an `out` that exists, errors of a run that ended, or a partial one of another
    command or request; CheckpointError for a model that cannot be served; ResourceError for an engine that fails.
    """
    source, out = Path(source).resolve(), Path(out)
    model = model if is_remote(model) else Path(model).resolve()
    errors, partial = Path(f"{out}.errors"), Path(f"{out}.partial")
    if out.exists():
        raise DataError(f"{out} exists", do="choose another OUT")
    mark = _mark(source, model, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    if errors.exists() and not partial.exists():  # of a run that ended: what failed in it is to be asked again
        raise DataError(f"{errors} exists", do="move it away, or choose another OUT")
    with alone(partial):
        if out.exists():  # another command finished it since
            partial.unlink()
            raise DataError(f"{out} exists", do="choose another OUT")
        for each in (partial, errors, Path(f"{errors}.partial")):
            _must_be_ours(each, mark)
        if errors.exists():  # it was ended between the two renames
            os.replace(errors, f"{errors}.partial")
        answers, failures = Log(partial), Log(Path(f"{errors}.partial"))
        kept = len(answers) + len(failures)
        try:
            todo, total = _todo(source, mark, answers, failures)
            for row in _answers(todo, source, model, name, mark, workers, gpu, max_batch):
                (answers if row["good"] else failures).append(row["number"], row["line"])
                on_progress(len(answers) + len(failures), total)
        finally:
            answers.close()
            failures.close()
        if len(failures):
            os.replace(f"{errors}.partial", errors)
        else:
            Path(f"{errors}.partial").unlink()
        os.replace(partial, out)  # while it is held: another command would find it gone
    return {"answered": len(answers), "failed": len(failures), "kept": kept}


def _mark(source: Path, model: str | Path, name: str | None) -> str:
    """What answers to `source` by `model`, asked for by `name`, have in their ids. Raises DataError, CheckpointError."""
    from shoal.model.files import weights_sha256

    try:
        text = sha256_of(source)
    except OSError as error:
        raise DataError(f"cannot read {source}", got=error.strerror, do="give a JSONL file of requests") from error
    return hashlib.sha256(f"{text} {weights_sha256(here(model, weights=False))} {name}".encode()).hexdigest()[:16]


def _must_be_ours(partial: Path, mark: str) -> None:
    """Raises DataError for a file that begins with what another request or model was answered."""
    with suppress(FileNotFoundError), partial.open("rb") as file:
        first = file.readline()
        if first.endswith(b"\n") and f'"id":"batch_req_{mark}_'.encode() not in first[:80]:
            do = "move it away, or choose another OUT"
            raise DataError(f"{partial}", got="answers to another file, or of another model or name", do=do)


def _todo(source: Path, mark: str, answers: Log, failures: Log) -> tuple[list[tuple[int, int]], int]:
    """(number, byte at which it begins) of each line that is to be asked, and how many lines there are in all; those that are
    no requests are among the `failures` after it. Raises DataError where there is none."""
    todo, seen, total, most = list[tuple[int, int]](), set[str](), 0, Limits().body_bytes
    with source.open("rb") as file:
        for number, start, text in lines.read_at(file, most):
            total += 1
            try:
                lines.parse_new(number, text, None, seen)
            except LineError as error:
                code = error.code or "invalid_line"
                line = lines.refused(f"batch_req_{mark}_{number}", error.custom_id, code, error.message, number)
                failures.append(number, line)
            if number not in answers.numbers and number not in failures.numbers:
                todo.append((number, start))
    if not total:
        raise DataError(f"{source} holds no lines", allowed='{"custom_id", "method", "url", "body"} a line')
    return todo, total


def _answers(
    todo: list[tuple[int, int]],
    source: Path,
    model: str | Path,
    name: str | None,
    mark: str,
    workers: int,
    gpu: bool,
    max_batch: int,
) -> Iterator[dict[str, Any]]:
    """What `_Engine` gives of each of `todo`, as it comes. Raises ResourceError."""
    if not todo:
        return
    size = max(1, min(LOT, len(todo) // (workers * LOTS_EACH)))
    lots = [todo[at : at + size] for at in range(0, len(todo), size)]
    items = [{"numbers": [n for n, _ in lot], "starts": [at for _, at in lot], "lot": n} for n, lot in enumerate(lots)]
    with as_raised("answer the lines"):
        asked = ray.data.from_items(items, override_num_blocks=len(items))
        done = asked.flat_map(
            _Engine,
            fn_constructor_args=(
                str(source),
                str(model),
                name,
                mark,
                gpu,
                max_batch,
                workers,
                Tries("answer the lines"),
            ),
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=2 * LOTS,
                max_concurrent_calls_per_actor=LOTS,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
        )
        yield from done.iter_rows()


class _Engine:
    """An engine, and the routes over it. Its calls come in several threads."""

    def __init__(
        self,
        source: str,
        model: str,
        name: str | None,
        mark: str,
        gpu: bool,
        max_batch: int,
        workers: int,
        tries: Tries,
    ) -> None:
        import torch

        from shoal.api.app import offline
        from shoal.api.served import ServedModel
        from shoal.api.service import Hosted
        from shoal.engine.engine import Engine
        from shoal.engine.front import AsyncEngine, settle
        from shoal.model.model import Model

        torch.set_num_threads(threads(None) if workers == 1 else 1)
        place = here(model)
        loaded = Model.load(place)
        if gpu:
            loaded.on_gpu()
        # nobody reads an answer before it has ended, and each reader that is woken takes the time of a token
        engine = AsyncEngine(Engine(loaded, max_batch=max_batch), backlog=sys.maxsize, gap=SECONDS)
        limits = Limits(seconds=SECONDS)
        self._source, self._mark, self._most = source, mark, limits.body_bytes
        self._inside = offline([Hosted(ServedModel.load(place, name), engine)], limits)
        self._tries, self._loop = tries, asyncio.new_event_loop()
        settle()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __call__(self, lot: dict[str, Any]) -> list[dict[str, Any]]:
        """`number` of each line, `line`: what is said of it, `good`: whether it was answered. Raises ResourceError
        for a lot whose process died too often."""
        self._tries.begin(int(lot["lot"]))
        return asyncio.run_coroutine_threadsafe(self._all(lot), self._loop).result()

    async def _all(self, lot: dict[str, Any]) -> list[dict[str, Any]]:
        with open(self._source, "rb") as file:
            texts = []
            for number, start in zip(lot["numbers"], lot["starts"], strict=True):
                file.seek(start)
                _, text = next(lines.read(file, self._most))
                texts.append((int(number), text))
        return list(await asyncio.gather(*(self._one(number, text) for number, text in texts)))

    async def _one(self, number: int, text: bytes | None) -> dict[str, Any]:
        line = lines.parse(number, text, None)
        reply = await self._inside.ask(line.url, line.body, waits=(429,))
        if reply.status == 503:
            raise ResourceError("an engine has failed", got=reply.body[:200], do="run the same command again")
        said = lines.answered(
            f"batch_req_{self._mark}_{number}",
            line.custom_id,
            reply.status,
            reply.request_id,
            reply.body,
            reply.unused,
        )
        return {"number": number, "line": said, "good": reply.status == 200}
