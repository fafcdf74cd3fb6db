"""What people read of a run: a bar with an ETA in a terminal and a plain line now and then in a file, and where results go."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 15.0  # seconds between plain lines of one stage
WIDE = 110  # columns of a table in a file


def results() -> Console:
    """Where results are printed: standard output, in a file or a pipe as wide as tables are, where rich would cut them to 80
    columns. What is printed may be somebody's words, such as the name of a slice: "[/x]" is no markup, nor ":x:" a picture."""
    return Console(width=None if sys.stdout.isatty() else WIDE, markup=False, emoji=False)


class Tell(Protocol):
    """Called with what is being done and how far it is; `total` 0 when unknown."""

    def __call__(self, what: str, done: float, total: float) -> None: ...


@contextmanager
def progress(title: str, console: Console | None = None) -> Iterator[Tell]:
    """A `Tell` that shows one stage called `title`; the bar is gone when the stage ends."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[title]}", style="bold"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("", title=title, total=None)

            def draw(what: str, done: float, total: float) -> None:
                bars.update(task, description=what, completed=done, total=total or None)

            yield draw
    else:
        yield _Lines(title)


class _Lines:
    """A line when what is done changes, and every `PLAIN_EVERY` seconds."""

    def __init__(self, title: str) -> None:
        self.title, self.what, self.total = title, "", 0.0
        self.said = self.started = time.monotonic()
        self.first = 0.0  # done when `total` was first told: the rate counts from there

    def __call__(self, what: str, done: float, total: float) -> None:
        now = time.monotonic()
        if total != self.total:
            self.total, self.started, self.first = total, now, done
        stage = what.split(":")[0]
        if stage == self.what and now - self.said < PLAIN_EVERY:
            return
        self.what, self.said = stage, now
        share = f"{done / total:4.0%}" if total else "    "
        left = (now - self.started) * (total - done) / (done - self.first) if self.first < done < total else None
        eta = f"  ETA {duration(left)}" if left is not None else ""
        print(f"{self.title:10s} {share}  {what}{eta}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``3 min 12 s``, ``41 s``, ``0.4 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
