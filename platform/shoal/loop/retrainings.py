"""How the retrainings of a release went, those too that made no version: a file, written by the one that runs, which is alone.

    RELEASE/retrain.json   {"failed": how many in a row, "runs": [{"began", "outcome", "minutes", "why"}, ...]} of the last day,
                           "behind": when one was first found to have begun after the present, by a clock that was set
    RELEASE/retrain/CUT-KIND-STABLE/   where one works, with which the same command goes on

Outcomes: passed (the gate's word), unjudged (no suites), refused (by the gate), failed, ended (by a person), killed: what says
that it works when another begins, for that is alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shoal import config
from shoal.errors import ConfigError, DataError, ResourceError, ShoalError, first_line
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
INTERRUPTED = 130  # exit code of what somebody ended
LEFT_DAYS = 7.0  # after which nobody goes on with the work of one that was interrupted


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
    behind: str = ""  # since when the clock is behind what was noted by it

    def age(self, then: str, now: datetime) -> timedelta:
        """How long ago that was. What is ahead, by a clock that was wrong then or is now, is as old as that is known: else no
        cooldown would be over before the clock is there again."""
        at = datetime.fromisoformat(then)
        if at > now:
            at = min(now, datetime.fromisoformat(self.behind)) if self.behind else now
        return now - at

    def spent(self, now: datetime) -> float:
        """Minutes of the last day that no version tells of."""
        return sum(run.minutes for run in self.runs if run.made_none and self.age(run.began, now) < DAY)

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


def seen(release: Path, times: Sequence[str], now: datetime) -> Retrainings:
    """As `read`, with a note where the clock is behind these times [ISO 8601], or behind those of its own. Raises DataError,
    ResourceError where that cannot be noted."""
    known, at = read(release), now.isoformat(timespec="seconds")
    ahead = any(datetime.fromisoformat(each) > now for each in (*times, *(run.began for run in known.runs)))
    behind = "" if not ahead else at if not known.behind else min(known.behind, at, key=datetime.fromisoformat)
    if behind != known.behind:
        known = replace(known, behind=behind)
        _write(release, known)
    return known


def settled(release: Path, made: Mapping[str, bool | None]) -> None:
    """Notes how the last one ended that was killed: as one that made a version, where `made` has one since it began (its time
    [ISO 8601] -> the gate's word), which says how long it took. For the one that runs, which is alone. Raises DataError,
    ResourceError where that cannot be noted."""
    known = read(release)
    if not known.runs or known.runs[-1].outcome != WORKS:
        return
    last, began = known.runs[-1], datetime.fromisoformat(known.runs[-1].began)
    ended = [_word(passed) for at, passed in made.items() if datetime.fromisoformat(at) >= began]
    _write(release, replace(known, runs=known.runs[:-1]).and_then(replace(last, outcome=(ended or [KILLED])[-1])))


def _word(passed: bool | None) -> str:
    return UNJUDGED if passed is None else PASSED if passed else REFUSED


def tidy(work: Path, stable: int) -> int:
    """Removes from the folder `work` what retrainings of another version than `stable` have left, and what nobody has touched
    for `LEFT_DAYS`; how many that were. For the one that runs, which is alone. Raises ResourceError."""
    gone = 0
    for path in sorted(work.glob("*")):
        if not path.is_dir() or path.is_symlink():  # what a file system or a person put there is no work of ours
            continue
        if path.name.rpartition("-")[2] != str(stable) or time.time() - _written(path) > LEFT_DAYS * 86_400:
            remove(path)
            gone += 1
    return gone


def remove(folder: Path) -> None:
    """Removes what one worked in; under another name first: killed in the middle, nobody goes on with the half of it, and the
    next one removes that. Raises ResourceError."""
    aside = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.gone")
    try:
        folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        do = "end what still writes there, or remove it"
        raise ResourceError(f"{folder} cannot be removed", got=error.strerror, do=do) from error


def _written(folder: Path) -> float:
    """When anything in it was last written; of what goes meanwhile, as workers end that outlived their command, nothing."""
    found = 0.0
    for each in (folder, *folder.rglob("*")):
        with suppress(FileNotFoundError):
            found = max(found, each.lstat().st_mtime)
    return found


@contextmanager
def one(
    release: Path, minutes: float, stops: list[Callable[[], None]] | None = None
) -> Iterator[Callable[[bool | None], None]]:
    """In this block one works that was asked to take so many minutes, and is alone. What it is given is to be called with the
    gate's word on the version that was made [None: not asked]. `stops`: what is called when somebody asks it to end, for what
    is killed a moment later has no other. Raises DataError, ResourceError where that cannot be noted."""
    known, began, steady = read(release), datetime.now(UTC), time.monotonic()
    if known.runs and known.runs[-1].outcome == WORKS:
        known = replace(known, runs=known.runs[:-1]).and_then(replace(known.runs[-1], outcome=KILLED))
    known = replace(known, runs=tuple(run for run in known.runs if known.age(run.began, began) < DAY))
    verdict: str | None = None  # of a version that is made: it says how long it took, whatever ends the command then
    now, outcome, why = Run(began.isoformat(timespec="seconds"), minutes=minutes), FAILED, ""
    _write(release, replace(known, runs=(*known.runs, now)))

    def made(passed: bool | None) -> None:
        nonlocal verdict
        verdict = _word(passed)

    def note() -> None:
        took = round((time.monotonic() - steady) / 60, 2)
        with suppress(ResourceError):  # what was made is made; the next one counts it as killed
            _write(release, known.and_then(replace(now, outcome=verdict or outcome, minutes=took, why=why)))

    def stopped() -> None:
        nonlocal outcome
        outcome = ENDED
        note()

    stops = [] if stops is None else stops
    stops.append(stopped)
    try:
        yield made
    except Exception as error:
        outcome, why = FAILED, first_line(error)
        if isinstance(error, ShoalError) and error.exit_code == INTERRUPTED:
            outcome, why = ENDED, ""
        raise
    except BaseException:
        outcome = ENDED
        raise
    finally:
        stops.remove(stopped)
        note()


def _write(release: Path, known: Retrainings) -> None:
    try:
        write_aside(release / FILE, json.dumps(asdict(known), indent=1) + "\n", sync=True)
    except OSError as error:
        raise ResourceError(f"{release / FILE} cannot be written", got=error.strerror, do="make room") from error
