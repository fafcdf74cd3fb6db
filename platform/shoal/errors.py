"""Every error a user can meet, as one tree.

ShoalError                     says what, got, allowed, and what to do; the CLI prints it as one line
├── UsageError                 the command line or a config is wrong (exit code 2)
│   └── ConfigError            an unknown key, a wrong type, values that contradict each other
├── DataError                  a source, shard or fine-tuning row cannot be used
├── CheckpointError            a model directory or training checkpoint cannot be used
├── ResourceError              port, disk, memory, CPUs or cluster: the machine cannot do what is asked
└── RequestError               one request is wrong (HTTP 400); `param` names its field
    ├── AdapterGoneError       the adapter that it names is not loaded (HTTP 404)
    ├── ContextLengthError     prompt and answer do not fit the context
    ├── QueueFullError         try again later (HTTP 429)
    ├── DeadlineError          the request ran out of its time (HTTP 408)
    ├── GenerationError        the model failed on this request; others go on (HTTP 500)
    └── EngineDeadError        the engine cannot serve any more (HTTP 503)
"""

from __future__ import annotations

import copy
import difflib
import math
import traceback
from collections.abc import Iterable
from typing import TypeVar

R = TypeVar("R", bound="RequestError")

READABLE = 10**20  # whole numbers below it are written out
LONGEST_GOT = 320  # characters of what was given that an error repeats


class ShoalError(Exception):
    """One line a person can act on: ``what: got G; allowed A; do D``.

    `what` names the thing at fault, `got` the value found, `allowed` the values that would do, `do` the next step.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, allowed: object = None, do: str | None = None) -> None:
        parts = [
            f"got {_shown(got)}" if got is not None else "",
            f"allowed: {_listed(allowed)}" if allowed is not None else "",
            do or "",
        ]
        details = "; ".join(part for part in parts if part)
        self.message = f"{what}: {details}" if details else what
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:  # Ray sends errors between processes
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


class UsageError(ShoalError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(ShoalError):
    pass


class CheckpointError(ShoalError):
    pass


class ResourceError(ShoalError):
    pass


class RequestError(ShoalError):
    """A request that cannot be served; `param` is the field at fault, `code` the OpenAI error code."""

    status = 400
    code: str | None = None

    def __init__(
        self,
        what: str,
        *,
        param: str | None = None,
        got: object = None,
        allowed: object = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what, got=got, allowed=allowed, do=do)
        self.param = param


class AdapterGoneError(RequestError):
    status = 404
    code = "model_not_found"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class QueueFullError(RequestError):
    status = 429
    code = "queue_full"
    retry_after: float | None = None  # seconds until there should be room, where they can be told


class DeadlineError(RequestError):
    status = 408
    code = "deadline_exceeded"


class GenerationError(RequestError):
    status = 500
    code = "generation_failed"


class EngineDeadError(RequestError):
    status = 503
    code = "engine_dead"
    taken = True  # False: the engine was dead already, and refused the request


class EnginesLostError(EngineDeadError):
    """A request was in two engines when they were lost. It may be what ends them, so nobody sends it to a third."""

    status = 500
    code = "engines_lost"


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """``did you mean 'x'?`` for the nearest known word, or None when nothing is near."""
    near = difflib.get_close_matches(word[:LONGEST_GOT], list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else None


def of_request(error: Exception, what: str) -> RequestError:
    """`error` as one that ends a request. A bug's own text may quote another's prompt: `what` stands for it."""
    if isinstance(error, RequestError):
        return error
    return GenerationError(what, got=type(error).__name__, do="try again")


def again(error: R) -> R:
    """`error` anew, for one more who is to hear of it. Raising the same object again and again would keep every frame that it
    passed, with all that stands in them; and whoever names another field in it would do so for everybody."""
    return copy.copy(error)


def first_line(error: BaseException) -> str:
    """What `error` says in its first line, or its class where it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """As `first_line`, of those that end with what went wrong."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    said = [line.strip()[:LONGEST_GOT] for line in str(error).splitlines() if line.strip()]
    return said or [type(error).__name__]


def frames(error: BaseException) -> str:
    """Where `error` was raised, and what caused it: classes and frames, for a log. The messages are left out, since they may
    quote what a user wrote."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{frames(cause)}\nwhich led to\n" if cause is not None else ""
    return before + "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__


def _shown(got: object) -> str:
    if isinstance(got, int) and abs(got) >= READABLE:
        return f"a whole number of {math.floor(math.log10(abs(got))) + 1} digits"
    try:
        text = repr(got)
    except Exception:  # Python writes no whole number of more than 4300 digits
        text = f"{type(got).__name__} that cannot be written"
    return text if len(text) <= LONGEST_GOT else text[:LONGEST_GOT] + "..."


def _listed(allowed: object) -> str:
    if isinstance(allowed, (list, tuple, set, frozenset)):
        return ", ".join(str(item) for item in allowed)
    return str(allowed)


def _rebuild(kind: type[ShoalError], message: str, state: dict[str, object]) -> ShoalError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error
