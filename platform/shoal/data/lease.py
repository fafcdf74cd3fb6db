"""One command at a time at a prefix of S3, where nothing is locked: an object says who works there, and is written again every
few seconds. One that is not is a killed command's, and the next takes it over.

Notable: whether it was written again is told by its tag, and how long ago by S3's own clock, so no two machines' clocks are
compared. All writes are conditional: of two commands that want it at once one gets it. Tasks of a command look at it before
they write what they made (`Place.need_held`): they may go on where the command itself stands still.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

from shoal.data.place import LEASE, Bucket, said
from shoal.errors import DataError

NAME = LEASE
SECONDS, RENEWED = 30.0, 5.0  # after which one is over that was not written again, and between two writings
LOOK = 0.5  # seconds between two looks at another's


class Lease:
    """Says in `bucket`, by the object `name`, that the `command` called `run` works there."""

    def __init__(self, bucket: Bucket, run: str, *, command: str = "prepare", name: str = NAME) -> None:
        self._bucket, self._run, self._count = bucket, run, 0
        self._command, self._name = command, name
        self._who = f"process {os.getpid()} of {socket.gethostname()}"
        self._tag, self._lost = "", False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="renew-lease", daemon=True)

    def take(self) -> None:
        """Raises DataError where another command works there: for `SECONDS` at most it is watched whether that one lives."""
        began, seen = time.monotonic(), ""
        while not self._put(IfNoneMatch="*"):
            head = self._bucket.head(self._name)
            if head is None:
                continue  # it has just ended
            if seen and head["ETag"] != seen:
                raise self._busy()
            seen = head["ETag"]
            if max(time.monotonic() - began, _age(head)) >= SECONDS:
                if self._put(IfMatch=seen):
                    break
                raise self._busy()
            time.sleep(LOOK)
        self._thread.start()

    def need(self) -> None:
        """Raises DataError where another command has taken it over."""
        self._renew_once()
        if self._lost:
            raise DataError(
                f"another {self._command} took over {self._bucket.uri}",
                got=f"no word of this one in {SECONDS:g} s",
                do="let that one end, and give another --out",
            )

    def end(self) -> None:
        """It is free again."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._tag and not self._lost:
            self._renew_once()  # it may be another's since, where this process stood still
        if self._tag and not self._lost:
            # Else it is free in `SECONDS`; what is to be removed besides says why not now.
            with contextlib.suppress(DataError):
                self._bucket.remove([self._name])

    def _put(self, **only: str) -> bool:
        self._count += 1
        told = {"who": self._who, "run": self._run, "count": self._count}
        tag = self._bucket.put_text(self._name, json.dumps(told).encode(), **only)
        self._tag = tag or self._tag
        return tag is not None

    def _renew(self) -> None:
        while not self._lost and not self._over.wait(RENEWED):
            self._renew_once()

    def _renew_once(self) -> None:
        # Where S3 does not answer it is tried again, and what is to be put besides says so.
        with contextlib.suppress(DataError):
            self._lost = not self._put(IfMatch=self._tag) and not self._ours()

    def _ours(self) -> bool:
        """Whether it is this command's after all: an answer may be lost, and what was asked for done."""
        head = self._bucket.head(self._name)
        ours = head is not None and said(self._bucket, self._name).get("run") == self._run
        if head is not None and ours:
            self._tag = head["ETag"]
        return ours

    def _busy(self) -> DataError:
        who = said(self._bucket, self._name).get("who", "one that has just begun")
        return DataError(
            f"another {self._command} is writing to {self._bucket.uri}", got=who, do="wait for it, or stop it"
        )


@contextmanager
def leased(bucket: Bucket, run: str, *, command: str = "prepare", name: str = NAME) -> Iterator[Lease]:
    """Hold the lease in this block."""
    lease = Lease(bucket, run, command=command, name=name)
    try:
        lease.take()
        yield lease
    finally:
        lease.end()


def _age(head: dict[str, Any]) -> float:
    """Seconds since an object was written, by the clock of who keeps it; 0 where it says no time."""
    date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
    return float((parsedate_to_datetime(date) - head["LastModified"]).total_seconds()) if date else 0.0
