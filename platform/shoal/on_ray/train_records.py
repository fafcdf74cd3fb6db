"""How the records of a run come from its rank 0 to the command that waits for it: by the run's metrics file, where both see its
folder; of a run in S3 by an actor on the command's machine."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shoal.train.log import Record, Report, metrics_file, parse

POLL = 0.5  # seconds between our looks at a run's records
SURE = ("checkpoint", "end")  # kinds of records after which a worker waits until they are there
SURE_SECONDS = 20.0  # for so long


class Records:
    """Actor: holds records until they are taken."""

    def __init__(self) -> None:
        self._new: list[Record] = []

    def put(self, record: Record) -> None:
        self._new.append(record)

    def take(self) -> list[Record]:
        new, self._new = self._new, []
        return new


def records() -> Any:
    """A new `Records` on this machine. A Ray must be running."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made: Any = ray.remote(Records)
    return made.options(num_cpus=0, scheduling_strategy=here).remote()


def sent_to(actor: Any) -> Report:
    """A `Report` that hands records to `Records`. Training does not wait for it, but at its ends."""

    def report(record: Record) -> None:
        sent = actor.put.remote(record)
        if record["kind"] in SURE:
            with contextlib.suppress(ray.exceptions.RayError):  # who waits for the run is gone: so will this be
                ray.get(sent, timeout=SURE_SECONDS)

    return report


def following_actor(actor: Any, on_progress: Report) -> contextlib.AbstractContextManager[None]:
    """Hand every record that `actor` is given to `on_progress`, in a thread of this process."""

    def new() -> Iterator[Record]:
        with contextlib.suppress(ray.exceptions.RayError):  # the run says what became of it
            yield from ray.get(actor.take.remote(), timeout=SURE_SECONDS)

    return _following(new, on_progress)


def following_file(run: str, on_progress: Report) -> contextlib.AbstractContextManager[None]:
    """Hand every record that rank 0 appends to the run's metrics file to `on_progress`, in a thread of this process. A line
    that cannot be read is told of and passed over."""
    path = metrics_file(run)
    at, rest = path.stat().st_size if path.exists() else 0, b""

    def new() -> Iterator[Record]:
        nonlocal at, rest
        try:
            with path.open("rb") as file:
                file.seek(at)
                read = file.read()
        except OSError:  # it is not there yet, or a file system of many machines is away for a moment
            return
        at += len(read)
        *lines, rest = (rest + read).split(b"\n")
        for text in lines:
            record = parse(text)
            if record is None and text.strip():
                said = f"a line of {path} cannot be read: {text[:80]!r}"
                record = {"kind": "warning", "time": time.time(), "step": 0, "text": said}
            if record is not None:
                yield record

    return _following(new, on_progress)


@contextlib.contextmanager
def _following(new: Callable[[], Iterator[Record]], on_progress: Report) -> Iterator[None]:
    """Hand what `new` gives to `on_progress`, again and again. A listener that fails is told of and passed over."""
    over = threading.Event()

    def follow() -> None:
        while True:
            last = over.is_set()  # read once more after the end, so that nothing is missed
            for record in new():
                try:
                    on_progress(record)
                except Exception as error:  # whatever listens, the run and the records after this one must not feel it
                    print(f"warning: a {record['kind']} record was not shown: {error!r}"[:200], file=sys.stderr)
            if last:
                return
            over.wait(POLL)

    thread = threading.Thread(target=follow, name="follow-records", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10)
