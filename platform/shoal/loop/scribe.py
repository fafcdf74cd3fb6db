"""The scribe: the process that makes rows of what a gateway hands over (`outbox`), and writes them (`writer`).

    pipe ─ all that came in 50 ms ─> rows ─> one write to the journal ─> counts, in memory that the gateway sees

It ends when the pipe does, and all is written: when its gateway has closed it or was killed. Where a child of the gateway has
inherited the pipe, which then never ends, it ends when the gateway is gone and the pipe is empty.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from shoal.data.sources.s3 import is_remote
from shoal.errors import ShoalError
from shoal.loop.capture import JOURNAL, ROWS, Capture, lines_of
from shoal.loop.facts import Frames, row, unpacked
from shoal.loop.outbox import DROPPED, Shared
from shoal.loop.parts import frames_of
from shoal.loop.rows import Row
from shoal.loop.surprisal import Learned
from shoal.loop.writer import Bounds, Writer

log = logging.getLogger("shoal.loop")

PAUSE_SECONDS = 0.05  # after a read: what comes meanwhile is one batch, made while the code is warm
LOOK_SECONDS = 0.5  # between two looks where nothing comes
READ = 2**18  # bytes at a time
DAYS = 2  # of parts that may have the rows of a moment ago
NICE = 5  # answers come first


class Scribe:
    """Makes rows of frames and gives them to a writer, which it owns."""

    def __init__(self, capture: Capture, writer: Writer, shared: Shared, known: set[int]) -> None:
        """`known`: frames that were handed over to another before, and whose rows are in its journals."""
        self._capture, self._writer, self._shared, self._known = capture, writer, shared, known
        self._frames = Frames()
        self._tables: dict[tuple[str, int], Learned] = {}
        self._before = {name: shared[name] for name in ("taken", "rows", *DROPPED)}
        self._taken = self._faults = self._found = 0

    def take(self, data: bytes) -> None:
        """What came out of the pipe."""
        rows = dict[int, Row]()
        for frame in self._frames.take(data):
            self._taken += 1
            number = self._before["taken"] + self._taken
            if number in self._known:
                self._found += 1
                continue
            try:
                rows[number] = row(unpacked(frame), self._surprisal)
            except Exception as error:  # one row is worth less than those after it
                self._fault(error)
        try:
            self._writer.put(*rows.values(), frames=[*rows])
        except Exception:
            for number, each in rows.items():
                self._put_alone(number, each)
        self.publish()

    def _put_alone(self, number: int, each: Row) -> None:
        try:
            self._writer.put(each, frames=[number])
        except Exception as error:
            self._fault(error)

    def _fault(self, error: Exception) -> None:
        self._faults += 1
        log.error("no row was captured of a request: %s", type(error).__name__)

    def _surprisal(self, vocabulary: tuple[str, int], prompt: Sequence[int]) -> float | None:
        table = self._tables.get(vocabulary)
        if table is None:
            name, size = vocabulary
            table = self._tables[vocabulary] = Learned(self._capture.folder / f"tokens-{name}.npz", size)
        return table.of(prompt)

    def publish(self) -> None:
        """Tell the gateway; that frames are taken comes last, since it then forgets them."""
        found = {"rows": self._writer.rows + self._found, **self._writer.dropped}
        found["fault"] = self._faults
        for name in ("rows", *DROPPED):
            self._shared[name] = self._before[name] + found.get(name, 0)
        self._shared["bytes"], self._shared["waiting"] = self._writer.bytes, self._writer.waiting
        self._shared["taken"] = self._before["taken"] + self._taken


def run(
    *,
    folder: str,
    bounds: dict[str, Any],
    service: str,
    clocks: tuple[int, float],
    pipe: int,
    shared: int,
    gateway: int,
    again: int,
) -> None:
    """Until `pipe` ends, or the process of the descriptor `gateway` has ended and the pipe is empty. `service`: whose journals
    are, by name, and `clocks` what they said when it began, as of `Writer`; `again`: of the frames that come first, so many
    were handed over to another before."""
    told = Shared(shared)
    try:
        # one that was removed is not made anew: with another salt nobody would find whose the rows are, to forget them
        capture = Capture(folder, create=is_remote(folder))
        known = written(capture, service, told.taken) if again else set()
        writer = Writer(capture, Bounds(**bounds), service=service, clocks=clocks)
        scribe = Scribe(capture, writer, told, known)
    except (ShoalError, OSError) as error:
        log.error("capture: %s", error)
        return
    os.set_blocking(pipe, False)
    os.nice(NICE)
    _read(scribe, pipe, gateway)
    writer.close()
    scribe.publish()
    told["ended"] = 1


def _read(scribe: Scribe, pipe: int, gone: int) -> None:
    poll = select.poll()
    for descriptor in (pipe, gone):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll(1000 * LOOK_SECONDS)]
        try:
            data = os.read(pipe, READ)
        except BlockingIOError:
            if gone in ready:
                return
            scribe.publish()
            continue
        if not data:
            return
        scribe.take(data)
        if len(data) < READ and gone not in ready:
            time.sleep(PAUSE_SECONDS)


def written(capture: Capture, service: str, taken: int) -> set[int]:
    """Frames after the first `taken` whose rows are in what a service's scribes wrote: a journal, or the part that somebody
    else made of it. By number and not by id: of a request that was refused the id is the client's, who may have asked again
    with it."""
    found = set[int]()
    for path in (capture.folder / JOURNAL).glob(f"*-{service}*.jsonl"):
        with suppress(FileNotFoundError):  # it has become a part
            found.update(line.get("frame", 0) for line in lines_of(path))
    for day in capture.days()[-DAYS:]:
        for path in (capture.folder / ROWS / f"day={day}").glob(f"part-*-{service}*.parquet"):
            found |= frames_of(path)
    return {number for number in found if number > taken}
