"""Runs the batches of a `Store`: one process does at a time, which holds its lock, and another goes on where that one ends.

    validating ─> in_progress ─> finalizing ─> completed
         │             ├───────> cancelling ─> cancelled         what was answered until then is kept in files
         └─> failed    └──────────────────────> expired          (failed: there is nothing to run, or nobody to run it for)

Notable: each answer is appended to the batch's own files as it comes, so what an interrupted process had answered is not
asked again; the ids of the files to come are kept before the files are put in place, so a second try puts the same ones
there. Of each owner one batch runs at a time, the oldest; those of several owners run side by side.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from shoal.api.auth import ApiKeys, Key
from shoal.api.batches import lines
from shoal.api.batches.inside import Inside
from shoal.api.batches.lines import Line, LineError, Log
from shoal.api.batches.shapes import OPEN
from shoal.api.batches.store import ANYBODY, RoomError, State, Store, new_id
from shoal.api.limits import Limits
from shoal.api.wire import NotFoundError
from shoal.errors import RequestError, frames

T = TypeVar("T")

log = logging.getLogger("shoal.api")

POLL_SECONDS = 0.25  # between two looks at what has come, what was cancelled, and what is to be told of the counts
LOCK_SECONDS = 1.0  # between two tries to become the one that runs the batches
SWEEP_SECONDS = 3600.0  # between two looks for what was left aside
DISK_SECONDS = 5.0  # between two tries to write on a disk that takes nothing


class _EndError(Exception):
    """A batch ends here; `then`: its status."""

    def __init__(self, then: str) -> None:
        self.then = then


class _FailedError(RequestError):
    """A batch cannot be run at all."""


class Worker:
    """Runs batches until its task is cancelled."""

    def __init__(
        self,
        store: Store,
        inside: Inside,
        keys: ApiKeys | None,
        limits: Limits,
        *,
        at_once: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`at_once`: lines that are asked at the same time; with `stopping` no more are begun."""
        self._store, self._inside, self._keys, self._limits = store, inside, keys, limits
        self._at_once, self._stopping = at_once, stopping
        self._running: dict[str, asyncio.Task[None]] = {}  # by owner
        self._ended: dict[str, set[str]] = {}  # of each owner, the batches that need no more looking at
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is news: a batch has come, or was cancelled."""
        self._woken.set()

    async def run(self) -> None:
        """Never returns; cancelled, it leaves all as it is for the next."""
        held: IO[bytes] | None = None
        swept = _Clock()
        try:
            while True:
                try:
                    if held is None:  # else it is kept, whatever failed: batches may be running
                        held = await asyncio.to_thread(self._store.lock)
                    while held is not None:
                        if swept.passed(SWEEP_SECONDS):
                            await asyncio.to_thread(self._store.sweep)
                        await self._look()
                        await self._news(POLL_SECONDS)
                except Exception as error:  # what one batch does ends none other; this is the folder itself
                    log.error("batches: %s", error if isinstance(error, OSError) else frames(error))
                await self._news(LOCK_SECONDS)
        finally:
            for task in self._running.values():
                task.cancel()
            if self._running:
                await asyncio.wait(self._running.values())
            if held is not None:
                held.close()

    async def _look(self) -> None:
        """Starts the oldest open batch of each owner that has none running."""
        for owner, task in [*self._running.items()]:
            if task.done():
                del self._running[owner]
        for owner, name in await asyncio.to_thread(self._store.oldest, self._ended):
            if owner not in self._running and not self._stopping():
                self._running[owner] = asyncio.create_task(self._guarded(owner, name))

    async def _news(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)
        self._woken.clear()

    async def _guarded(self, owner: str, name: str) -> None:
        """Runs one batch to its end. A disk that fails is tried again; a bug ends this batch, and no other."""
        try:
            await self._batch(owner, name)
        except NotFoundError:  # forgotten meanwhile, or not to be read
            self._ended.setdefault(owner, set()).add(name)
        except (OSError, RoomError) as error:
            log.error("batch %s waits: %s", name, error)
            await asyncio.sleep(DISK_SECONDS)
        except Exception as error:
            log.error("batch %s failed\n%s", name, frames(error))
            with suppress(OSError, RequestError):
                state = await asyncio.to_thread(self._store.state, owner, name)
                await self._fail(owner, state, _internal())
            self._ended.setdefault(owner, set()).add(name)
        self.wake()  # for the next of this owner

    async def _batch(self, owner: str, name: str) -> None:
        state = await asyncio.to_thread(self._store.state, owner, name)
        if state["status"] not in OPEN:
            return
        if "then" not in state:
            job = await asyncio.to_thread(_Job, self._store, owner, state)
            try:
                then = await self._run(job)
            except (OSError, RoomError, NotFoundError):
                raise
            except Exception as error:
                known = error if isinstance(error, _FailedError) else _internal()
                if known is not error:
                    log.error("batch %s failed\n%s", name, frames(error))
                if state["status"] == "validating":
                    return await self._fail(owner, state, known)
                then, state["errors"] = "failed", _told(known)  # what was answered is kept
            finally:
                await asyncio.to_thread(job.close)
            counts = job.counts()
            files = {
                "output_file_id": new_id("file-") if counts["completed"] else None,
                "error_file_id": new_id("file-") if counts["failed"] else None,
            }
            cancelled = await asyncio.to_thread(self._store.cancelled, owner, name)
            told = {"cancelling_at": int(cancelled or time.time())} if then == "cancelled" else {}
            state |= {"status": "finalizing", "finalizing_at": int(time.time()), "then": then, **files, **told}
            state["request_counts"] = counts
            await self._write(owner, state)
        for kind, what in (("output_file_id", "answers.jsonl"), ("error_file_id", "errors.jsonl")):
            if state[kind]:
                await self._until_written(self._store.publish, owner, name, what, state[kind])
        then = state.pop("then")
        state |= {"status": then, f"{then}_at": int(time.time())}
        await self._write(owner, state)
        await asyncio.to_thread(self._store.tidy, owner, name)

    async def _run(self, job: _Job) -> str:
        """Asks what is not answered, and returns what becomes of the batch. Raises _FailedError."""
        state = job.state
        try:
            if state["status"] == "validating":
                await self._until_written(job.validate, self._limits)
                state |= {"status": "in_progress", "in_progress_at": int(time.time())}
                state["request_counts"] = job.counts()
                await self._write(job.owner, state)
            await self._ask_all(job)
        except _EndError as end:
            if end.then == "expired":
                await self._until_written(job.expire, self._limits)
            return end.then
        return "completed"

    async def _ask_all(self, job: _Job) -> None:
        """Asks for every line, as many at once as there is room for. Raises _EndError, _FailedError."""
        tasks = set[asyncio.Task[None]]()
        todo = job.todo(self._limits)
        line = await asyncio.to_thread(next, todo, None)
        told = job.counts()
        try:
            while line is not None or tasks:
                await self._check(job)
                room = max(1, self._at_once // max(1, len(self._running)))
                while line is not None and len(tasks) < room and not self._stopping():
                    tasks.add(asyncio.create_task(self._answer(job, line)))
                    line = await asyncio.to_thread(next, todo, None)
                if tasks:
                    done, tasks = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                else:
                    await asyncio.sleep(POLL_SECONDS)
                if (counts := job.counts()) != told and job.told.passed(POLL_SECONDS):
                    job.state["request_counts"] = told = counts
                    await self._write(job.owner, job.state)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            with suppress(ValueError):  # a thread is still in it, which closes it
                todo.close()

    async def _check(self, job: _Job) -> None:
        """Raises _EndError for a batch that was cancelled or whose time is over, _FailedError for one whose key has gone."""
        if job.looked.passed(POLL_SECONDS):
            cancelled = await asyncio.to_thread(self._store.cancelled, job.owner, job.name)
            if cancelled is not None:
                raise _EndError("cancelled")
        if time.time() >= job.state["expires_at"]:
            raise _EndError("expired")
        self._key(job.owner)

    def _key(self, owner: str) -> Key | None:
        """The key of `owner`. Raises _FailedError for one that is accepted no more."""
        if self._keys is None or owner == ANYBODY:
            if (self._keys is None) != (owner == ANYBODY):
                raise _gone()
            return None
        key = self._keys.known(owner)
        if key is None:
            raise _gone()
        return key

    async def _answer(self, job: _Job, line: Line) -> None:
        """Asks for one line and keeps the answer."""
        reply = await self._inside.ask(
            line.url,
            line.body,
            whose=lambda: self._key(job.owner),
            batch=job.name,
            end=job.state["expires_at"],
        )
        text = lines.answered(
            job.id_of(line.number), line.custom_id, reply.status, reply.request_id, reply.body, reply.unused
        )
        to = job.answers if reply.status == 200 else job.errors
        await self._until_written(to.append, line.number, text)

    async def _fail(self, owner: str, state: State, error: _FailedError) -> None:
        state |= {"status": "failed", "failed_at": int(time.time()), "errors": _told(error)}
        await self._write(owner, state)
        await asyncio.to_thread(self._store.tidy, owner, state["id"])

    async def _write(self, owner: str, state: State) -> None:
        await self._until_written(self._store.write, owner, dict(state))

    async def _until_written(self, work: Callable[..., T], *given: object) -> T:
        """What `work` gives, in a thread; again and again where the disk takes nothing: what was answered is not lost."""
        while True:
            done = asyncio.ensure_future(asyncio.to_thread(work, *given))
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                await asyncio.wait({done})  # it goes on in its thread, and nothing is to happen beside it
                raise
            except FileNotFoundError:
                raise
            except (OSError, RoomError) as error:
                log.error("batches: the disk takes nothing: %s", error)
            await asyncio.sleep(DISK_SECONDS)


class _Clock:
    """When something was last done."""

    def __init__(self) -> None:
        self._last = -math.inf

    def passed(self, seconds: float) -> bool:
        """Whether that was so long ago; then it is now."""
        if (now := time.monotonic()) < self._last + seconds:
            return False
        self._last = now
        return True


class _Job:
    """One batch as it is run: what it has to ask, and what was answered."""

    def __init__(self, store: Store, owner: str, state: State) -> None:
        """Raises OSError, NotFoundError for one whose folder is gone."""
        self.owner, self.state, self.name = owner, state, str(state["id"])
        self._place: Path = store.place(owner, self.name)
        self.answers = Log(self._place / "answers.jsonl")
        self.errors = Log(self._place / "errors.jsonl")
        self._total = int(state["request_counts"]["total"])
        self.told, self.looked = _Clock(), _Clock()

    def id_of(self, number: int) -> str:
        """Of the answer to a line."""
        return f"batch_req_{self.name.removeprefix('batch_')}_{number}"

    def counts(self) -> dict[str, int]:
        """How many lines there are, were answered, and failed."""
        return {"total": self._total, "completed": len(self.answers), "failed": len(self.errors)}

    def validate(self, limits: Limits) -> None:
        """Counts the lines, and keeps why those are refused that are no requests. Raises _FailedError, OSError."""
        total, seen = 0, set[str]()
        for number, text in self._texts(limits):
            total += 1
            if total > limits.batch_lines:
                what = "too many lines in the input file"
                raise _failed(what, "too_many_requests", allowed=limits.batch_lines, do="make several batches of them")
            try:
                lines.parse_new(number, text, self.state["endpoint"], seen)
            except LineError as error:
                self._refuse(number, error.custom_id, error.code or "invalid_line", error.message)
        if not total:
            raise _failed("the input file holds no lines", "empty_file", do="upload one with a request a line")
        self._total = total

    def todo(self, limits: Limits) -> Generator[Line, None, None]:
        """The requests of which nothing was kept. Raises OSError."""
        for number, text in self._texts(limits):
            if number not in self.answers.numbers and number not in self.errors.numbers:
                try:
                    yield lines.parse(number, text, self.state["endpoint"])
                except LineError as error:  # it was one to the version, or by the limits, that this batch began with
                    self._refuse(number, error.custom_id, error.code or "invalid_line", error.message)

    def expire(self, limits: Limits) -> None:
        """Keeps of each line that was not answered that its time is over. Raises OSError."""
        for line in self.todo(limits):
            self._refuse(line.number, line.custom_id, "batch_expired", "it was not run in the batch's time")

    def close(self) -> None:
        for each in (self.answers, self.errors):
            each.close()

    def _refuse(self, number: int, custom_id: str | None, code: str, message: str) -> None:
        text = lines.refused(self.id_of(number), custom_id, code, message, number)
        self.errors.append(number, text)

    def _texts(self, limits: Limits) -> Iterator[tuple[int, bytes | None]]:
        try:
            with (self._place / "input").open("rb") as file:
                yield from lines.read(file, limits.body_bytes)
        except FileNotFoundError:
            raise _failed("the batch's input is gone", "input_missing", do="upload it again") from None


def _told(error: _FailedError) -> dict[str, Any]:
    found = {"code": error.code or "failed", "message": error.message, "param": error.param, "line": None}
    return {"object": "list", "data": [found]}


def _internal() -> _FailedError:
    return _FailedError("internal error; the server's log has the details")


def _gone() -> _FailedError:
    return _failed("the key of the batch is accepted no more", "invalid_api_key", do="make it again with another key")


def _failed(what: str, code: str, **more: object) -> _FailedError:
    error = _FailedError(what, **more)  # type: ignore[arg-type]
    error.code = code
    return error
