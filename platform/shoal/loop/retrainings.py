"""How the retrainings of a release went, those too that made no version: a file, written by the one that runs, which is alone.

    RELEASE/retrain.json   {"failed": how many in a row, "runs": [{"began", "outcome", "minutes", "why"}, ...]} of the last day

Outcomes: passed (the gate's word), unjudged (no suites), refused (by the gate), failed, ended (by a person), killed: what says
that it works when another begins, for that is alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shoal import config
from shoal.errors import ConfigError, DataError, ResourceError, first_line
from shoal.machine import write_aside

FILE = "retrain.json"
WORKS, PASSED, UNJUDGED, REFUSED, FAILED, ENDED, KILLED = (
    "works",
    "passed",
    "unjudged",
    "refused",
    "failed",
    "ended",
    "killed",
)
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Run:
    """One retraining."""

    began: str  # UTC, ISO 8601
    outcome: str = WORKS
    minutes: float = 0.0  # that it took; while it works, and of one that was killed, that were asked for
    why: str = ""

    @property
    def made_none(self) -> bool:
        """Whether there is no version that says how long it took."""
        return self.outcome in (FAILED, ENDED, KILLED)


@dataclass(frozen=True)
class Retrainings:
    """Of one release."""

    failed: int = 0  # in a row, up to the last, without a version that the gate let pass
    runs: tuple[Run, ...] = field(default=())

    def spent(self, now: datetime) -> float:
        """Minutes of the last day that no version tells of."""
        return sum(run.minutes for run in self.runs if run.made_none and _age(run, now) < DAY)

    def and_then(self, run: Run) -> Retrainings:
        """With one that ended so."""
        failed = {PASSED: 0, UNJUDGED: 0, ENDED: self.failed}.get(run.outcome, self.failed + 1)
        return replace(self, failed=failed, runs=(*self.runs, run))


def read(release: Path) -> Retrainings:
    """What is known of those of a release, which is nothing where none was begun. Raises DataError."""
    path = release / FILE
    try:
        return config.load(Retrainings, dict(json.loads(path.read_text(encoding="utf-8"))), str(path))
    except FileNotFoundError:
        return Retrainings()
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(f"{path} cannot be read", got=first_line(error), do="remove it: it counts anew") from error


@contextmanager
def one(release: Path, minutes: float) -> Iterator[Callable[[bool | None], None]]:
    """In this block one works that was asked to take so many minutes, and is alone. What it is given is to be called with the
    gate's word on the version that was made [None: not asked]. Raises DataError, ResourceError where that cannot be noted."""
    known, began, steady = read(release), datetime.now(UTC), time.monotonic()
    if known.runs and known.runs[-1].outcome == WORKS:
        known = replace(known, runs=known.runs[:-1]).and_then(replace(known.runs[-1], outcome=KILLED))
    known = replace(known, runs=tuple(run for run in known.runs if _age(run, began) < DAY))
    now, outcome, why = Run(began.isoformat(timespec="seconds"), minutes=minutes), FAILED, ""
    _write(release, replace(known, runs=(*known.runs, now)))

    def made(passed: bool | None) -> None:
        nonlocal outcome
        outcome = UNJUDGED if passed is None else PASSED if passed else REFUSED

    try:
        yield made
    except Exception as error:
        outcome, why = FAILED, first_line(error)
        raise
    except BaseException:
        outcome = ENDED
        raise
    finally:
        took = round((time.monotonic() - steady) / 60, 2)
        with suppress(ResourceError):  # what was made is made; the next one counts it as killed
            _write(release, known.and_then(replace(now, outcome=outcome, minutes=took, why=why)))


def _age(run: Run, now: datetime) -> timedelta:
    """One from the future, by a clock that was wrong, is one of now."""
    return max(timedelta(), now - datetime.fromisoformat(run.began))


def _write(release: Path, known: Retrainings) -> None:
    try:
        write_aside(release / FILE, json.dumps(asdict(known), indent=1) + "\n", sync=True)
    except OSError as error:
        raise ResourceError(f"{release / FILE} cannot be written", got=error.strerror, do="make room") from error
