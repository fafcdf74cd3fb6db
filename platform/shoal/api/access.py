"""What is logged of a request: a JSON line, and its spans (`spans`). Never its text, nor its key.

    {"time": "2026-11-25T10:00:00.123Z", "id": "...", "method": "POST", "path": "/v1/chat/completions", "status": 200,
     "seconds": 0.412, "first_token_seconds": 0.031, "key": "search", "user": "u7", "model": "shoal", "depth": "shallow",
     "prompt_tokens": 12, "completion_tokens": 40}

What is not known of a request is left out.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from shoal.api import spans
from shoal.api.auth import Key
from shoal.engine.events import Finished

# of answers that cost a key nothing: what was asked is wrong, too large or too much now. Others, as 404, tell something
FREE = (400, 413, 415, 429, 503)

log = logging.getLogger("shoal.access")


class Held(Protocol):
    """What counts the requests that have it."""

    held: int


@dataclass
class Access:
    """One HTTP request, filled while it is answered."""

    id: str
    method: str
    path: str
    route: str | None = None  # the path with its parameters named, as the app has it
    key: Key | None = None
    admitted: bool = False  # by its key's limits
    status: int = 499  # until an answer starts: its client left first
    spent: int = 0  # tokens, of its key
    error: str | None = None  # OpenAI's code of it, or its type
    unused: list[str] = field(default_factory=list)  # fields of the body that were taken and change nothing here
    priority: int = 0  # as of an engine's request
    seconds_left: float | None = None  # in place of the longest time of a request
    served: str = ""  # the model it was for, once that is known to exist
    holds: list[Held] = field(default_factory=list)  # what it is answered by, until it ends
    facts: dict[str, Any] = field(default_factory=dict)  # user, model, depth, prompt_tokens, completion_tokens
    columns: dict[str, Any] = field(default_factory=dict)  # of its captured row, that others know: version, role, ...
    ended: Callable[[Access], None] | None = None  # told once when it ends, before its answer's last byte and its line
    began: float = field(default_factory=time.perf_counter)
    accepted: float | None = None  # when its prompt was, and went to the engine
    first_token: float | None = None
    ends: list[tuple[int, float, Finished]] = field(default_factory=list)  # choice, when it was told, what

    @property
    def person(self) -> str:
        """Who asks, as the request says: a user of a key; empty where it names none."""
        user = self.facts.get("user")
        return f"{'' if self.key is None else self.key.digest.hex()}\0{user}" if user else ""

    def read(self, tokens: int) -> None:
        """The prompt is accepted: its tokens count, to the key's limit too."""
        self.accepted = time.perf_counter()
        self.facts |= {"prompt_tokens": tokens, "completion_tokens": 0}
        self._spend(tokens)

    def wrote(self, tokens: int) -> None:
        """So many more tokens of an answer."""
        if not tokens:
            return
        self.first_token = self.first_token or time.perf_counter()
        self.facts["completion_tokens"] += tokens
        self._spend(tokens)

    def _spend(self, tokens: int) -> None:
        self.spent += tokens
        if self.key is not None:
            self.key.spend(tokens)

    def answered(self, status: int) -> None:
        """Its answer begins with `status`. One that refuses it costs its key nothing but, while it ran, a place; and what was
        written before the client's own fault was met, as a grammar that leads nowhere."""
        self.status = status
        written = status == 400 and self.first_token is not None
        if status in FREE and not written and self.admitted and self.key is not None:
            self.key.refund(self.spent)
            self.spent = 0

    def end(self) -> None:
        """It ends now; called again it does nothing."""
        ended, self.ended = self.ended, None
        if ended is not None:
            ended(self)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.began

    def attributes(self) -> dict[str, Any]:
        """What is known, in the order of the log line."""
        known = {
            "id": self.id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "error": self.error,
            "seconds": round(self.seconds, 4),
            "first_token_seconds": None if self.first_token is None else round(self.first_token - self.began, 4),
            "key": None if self.key is None else self.key.name,
            **self.facts,
        }
        return {name: value for name, value in known.items() if value is not None}


@contextmanager
def told(access: Access, headers: Mapping[bytes, str]) -> Iterator[None]:
    """Logs `access` when the block ends, however it ends, and spans it; a ``traceparent`` header makes it a child. What it
    holds is let go of then."""
    shown = not log.disabled
    span = spans.begun(access.method, headers)
    try:
        yield
    finally:
        access.end()
        while access.holds:
            access.holds.pop().held -= 1
        known = access.attributes()
        time_ = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if shown:
            log.info("%s", json.dumps({"time": time_, **known}))
        if span is not None:
            name = f"{access.method} {access.route or ''}".strip()
            stages = spans.stages(access.began, access.accepted, access.ends)
            spans.ended(span, name, known, stages, failed=access.status >= 500)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic for the type checker alone
    """Writes to what `sys.stderr` is at that moment. A handler that kept the stream would write to a closed file once
    `sys.stderr` is replaced."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Always the present `sys.stderr`, whatever the base class sets."""


def log_to_stderr() -> None:
    """Writes the lines of this process to stderr, bare: for the process that serves, which nobody else has configured."""
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


@contextmanager
def no_lines() -> Iterator[None]:
    """Of requests that begin in this block no line is written, whenever they end, as where their answers are printed."""
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False
