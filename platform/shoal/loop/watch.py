"""What `shoal watch` knows of a capture: learning, quiet, watching or alarm, and why. Kept in CAPTURE/watch/:

    watch.json            what was read, the detector's sums, the evidence over time, the last report (`looked` reads it for
                          who does not look); written aside and renamed
    reference-*.json      what a version's requests are compared with
    accepted.jsonl        who accepted other requests as the reference, and why

Only rows of the stable version count. A version that takes its place is noticed by its weights, and learned anew: confidence
moves because the model did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError
from shoal.loop.capture import TEXTS, Capture, append
from shoal.loop.curves import Saved, followed
from shoal.loop.detector import REQUESTS, Detector
from shoal.loop.looked import FOLDER, FORMAT, LOCK, STATE, VERSION
from shoal.loop.reference import EVERY, LEARNED, Reference, measured, moments
from shoal.loop.regret import Regret
from shoal.loop.rows import RERUN
from shoal.loop.sessions import Sessions
from shoal.loop.tell import Report, told
from shoal.loop.texts import Stored, Texts, one_line
from shoal.loop.unread import Read, unread
from shoal.loop.watched import are_requests, column, texts
from shoal.loop.week import DAY_HOURS
from shoal.machine import write_aside

ACCEPTED = "accepted.jsonl"
WAIT_SECONDS = 1.0  # for who takes out what was forgotten
HOURS = 336.0  # two weeks: less has not seen each hour of the week twice
DAYS = 1_200  # to a false alarm, in the mean: at most one service in twenty has one in 60 days
LEAST_LEARNED = 200  # sessions of a reference
TURNS = 20  # requests in a row of other weights, from which on these are the stable version's
POINTS = 500  # of the evidence over time
AHEAD_S = 300.0  # seconds by which a clock may be ahead of ours
SILENCE_S = 7 * 86_400.0  # without a request: what was before is of another time, or by a clock that did not know it
EXAMPLES, SHOWN = 3, 100  # of what was asked, and characters of each
MOST_RECENT = 2_000  # requests that an explanation looks at


@dataclass
class Known:
    """What is kept between two looks."""

    weights: str = ""
    learn_from: float = 0.0  # epoch seconds: requests before do not count for the reference
    why: str = ""  # of a reference that somebody accepted
    reference: str = ""  # its file; "" while it learns
    read: Read = field(default_factory=Read)
    conversations: list[str] = field(default_factory=list)  # those and `subjects` are of `Sessions`
    subjects: dict[str, list[float]] = field(default_factory=dict)
    detector: dict[str, Any] | None = None  # None while it learns
    learned: int = 0  # sessions, while it learns ...
    began: float = 0.0  # ... the first of them, in epoch seconds; 0: all is to be read
    other: dict[str, Any] = field(default_factory=dict)  # other weights: `weights`, `count` in a row, `at` of the first
    regret: dict[str, Any] | None = None  # `Regret.saved`
    ahead: int = 0  # requests that say they ended in the future
    evidence: list[tuple[float, int, float]] = field(default_factory=list)  # when, requests seen, evidence
    report: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)  # whose the report's examples are: id and subject
    curves: Saved = field(default_factory=dict)

    def sessions(self) -> Sessions:
        """Those that are open."""
        return Sessions([*self.conversations], {**self.subjects})

    def keep(self, sessions: Sessions) -> None:
        """They are open."""
        self.conversations, self.subjects = sessions.conversations, sessions.subjects


class Watch:
    """The one that watches a capture: nobody else may at the same time."""

    def __init__(self, folder: str | Path, *, learn: int = LEARNED, hours: float = 0.0, days: float = DAYS) -> None:
        """`learn`: sessions of a reference, which spans at least `hours`; `days` to a false alarm, in the mean, where it spans
        a day (else `REQUESTS` sessions). Raises DataError for a folder that is no capture of this version."""
        self.capture = Capture(folder)
        self.learn, self.hours, self.days = learn, hours, days
        self._folder = self.capture.folder / FOLDER
        self._unseen = ""  # why what others sent is not seen

    def look(self, now: float | None = None) -> Report:
        """Read what came since the last look, and say how things are. Raises DataError while another one looks, and for files
        that cannot be used."""
        try:
            self.capture.fresh()
            self._unseen = ""
        except DataError as error:
            self._unseen = f"{error.message}; what was fetched before was looked at"
        with self._alone():
            return self._keep(self._follow(self._known(), time.time() if now is None else now))

    def accept(self, why: str, *, who: str = "", now: float | None = None) -> Report:
        """Take the requests since the drift began, or those from now on where nothing moved, as the reference. Raises
        DataError without a reason."""
        if not why.strip():
            raise DataError("accept without a reason", do="say --why")
        moment = time.time() if now is None else now
        with self._alone():
            known = self._known()
            since = moment
            if known.detector is not None:
                detector = Detector.restored(known.detector)
                first = detector.moved()[0].since
                since = moment if detector.state == "quiet" or first is None else first
            line = {"at": _iso(moment), "who": who, "why": why, "weights": known.weights, "since": _iso(since)}
            append(self._folder / ACCEPTED, line, sync=True)
            return self._keep(self._follow(Known(known.weights, since, why), moment))

    # --- one look ---------------------------------------------------------------------------------------------------

    def _follow(self, known: Known, now: float) -> Known:
        """`known` after what came since; anew where other weights have taken the place of those that it was about."""
        table, read = self._stable(known.read, now)
        if known.detector is None and not self._learns_on(known, table, now):
            table, read = self._stable(Read(), now)
            known = self._learned(known, table, now)
            known.ahead, known.read = _ahead(table, now), read
            return known
        known.ahead, known.read = known.ahead + _ahead(table, now), read
        if known.detector is None:
            return known
        here, switched = _of_weights(known, table)
        if switched:
            return self._follow(Known(known.other["weights"], known.other["at"]), now)
        sessions = known.sessions()
        first = sessions.first_requests(here)
        known.keep(sessions)
        _regret(known, first)
        self._detect(known, first)
        return known

    def _stable(self, read: Read, now: float) -> tuple[pa.Table, Read]:
        """What is not in `read` of the version that is not on trial, and what was read then."""
        table, read = unread(self.capture, read, now)
        return table.filter(
            pa.array([role in ("", "stable", RERUN) for role in texts(table, "role")], pa.bool_())
        ), read

    def _learns_on(self, known: Known, table: pa.Table, now: float) -> bool:
        """Takes in what came since the last look, where that makes no reference yet: most looks of a day. False where all is to
        be read, as at the first look, and for other weights."""
        table = table.filter(pa.array(moments(table) >= known.learn_from, pa.bool_()))
        if not known.began or not set(identities(table)) <= {"", known.weights}:
            return False
        sessions = known.sessions()
        first = sessions.first_requests(table)
        learned, last = known.learned + int(are_requests(first).sum()), _past(moments(first), now)[-1:]
        if learned >= self.learn and len(last) and last[0] - known.began >= self.hours * 3600:
            return False
        known.learned = learned
        known.keep(sessions)
        _regret(known, first)
        return True

    def _learned(self, known: Known, table: pa.Table, now: float) -> Known:
        """With a reference, where there are enough rows from `learn_from` on, and with what came after it compared with it."""
        known.other = {}
        rest = table.filter(pa.array(moments(table) >= known.learn_from, pa.bool_()))
        if not known.weights and len(rest):
            known.weights = next((one for one in identities(rest) if one), "")
        here, switched = _of_weights(known, rest)
        while switched:
            known = Known(known.other["weights"], known.other["at"])
            rest = table.filter(pa.array(moments(table) >= known.learn_from, pa.bool_()))
            here, switched = _of_weights(known, rest)
        sessions = Sessions()
        first = sessions.first_requests(here)
        known.keep(sessions)
        known.regret = None
        _regret(known, first)
        requests, at = are_requests(first), _past(moments(first), now)
        known.learned, known.began = int(requests.sum()), _began(at)
        if (count := self._enough(at, known.began, requests)) is None:
            return known
        reference = measured(first.slice(0, count), known.weights, why=known.why)
        known.reference = f"reference-{int(reference.began * 1000)}.json"
        reference.write(self._folder / known.reference)
        known.detector = Detector(reference.streams, requests=self._needed(reference)).saved()
        self._detect(known, first.slice(count))
        return known

    def _needed(self, reference: Reference) -> int:
        """Sessions to a false alarm, in the mean."""
        if reference.hours < DAY_HOURS:
            return REQUESTS
        return max(1, round(self.days * reference.requests / (reference.hours / DAY_HOURS)))

    def _detect(self, known: Known, table: pa.Table) -> None:
        """Compare first requests of sessions with the reference."""
        reference, detector = self._reference(known), Detector.restored(known.detector or {})
        values = reference.standardised(table)
        known.curves = followed(known.curves, detector.streams, values, moments(table), detector.seen)
        detector.update(values, moments(table))
        known.detector = detector.saved()
        if len(table):
            known.evidence.append((float(moments(table)[-1]), detector.seen, detector.evidence))
        if len(known.evidence) > POINTS:
            known.evidence = known.evidence[::2]

    def _enough(self, at: np.ndarray, began: float, requests: np.ndarray) -> int | None:
        """How many of the rows make the reference; None as long as too few of them are `requests`, or they span too little from
        when it `began`."""
        enough = np.flatnonzero((np.cumsum(requests[: len(at)]) >= self.learn) & (at - began >= self.hours * 3600))
        return int(enough[0]) + 1 if len(enough) else None

    def _reference(self, known: Known) -> Reference:
        return Reference.read(self._folder / known.reference)

    def _told(self, known: Known) -> Report:
        regret = None if known.regret is None else Regret.restored(known.regret).told()
        if known.detector is None:
            return told(
                None,
                None,
                weights=known.weights,
                learned=known.learned,
                wanted=self.learn,
                hours=self.hours,
                ahead=known.ahead,
                regret=regret,
            )
        reference, detector = self._reference(known), Detector.restored(known.detector)
        since, recent = detector.moved()[0].since, None
        if detector.state != "quiet" and since is not None:
            recent = self.capture.rows(since=int(since * 1000))
            recent = recent.filter(pa.array([one in ("", known.weights) for one in identities(recent)], pa.bool_()))
            recent = recent.slice(max(0, len(recent) - MOST_RECENT))
        examples = [] if recent is None else self._examples(reference, detector.moved()[0].signal, recent)
        known.asked = [{name: one[name] for name in ("id", "subject")} for one, _ in examples]
        return told(
            reference,
            detector,
            weights=known.weights,
            ahead=known.ahead,
            recent=recent,
            examples=[text for _, text in examples],
            regret=regret,
        )

    def _examples(self, reference: Reference, signal: str, recent: pa.Table) -> list[tuple[Stored, str]]:
        """Of the requests in which `signal` is furthest from the reference, where their texts were kept: these, and what was
        asked, on a line."""
        if not len(recent) or not self.capture.days(TEXTS):
            return []
        kept = {one["id"]: one for one in Texts(self.capture).all()}
        row = next(i for i, one in enumerate(reference.standards) if one.signal == signal and one.slice == EVERY)
        far = np.nan_to_num(np.abs(reference.standardised(recent)[row]))
        names = [recent["id"][place].as_py() for place in np.argsort(-far, kind="stable").tolist()]
        asked = [(kept[name], kept[name]["messages"][-1]["content"]) for name in names if name in kept]
        return [(one, one_line(text)[:SHOWN]) for one, text in asked if isinstance(text, str)][:EXAMPLES]

    # --- files ------------------------------------------------------------------------------------------------------

    def _known(self) -> Known:
        path = self._folder / STATE
        if not path.exists():
            return Known()
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            form = (saved.pop("format"), saved.pop("version"))
            if form != (FORMAT, VERSION):
                raise DataError(f"{path}", got=f"{form[0]} {form[1]}", allowed=f"{FORMAT} {VERSION}")
            known = Known(**{**saved, "read": Read(**saved["read"])})
            known.evidence = [(at, seen, evidence) for at, seen, evidence in known.evidence]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read", got=str(error), do="remove it, and it learns anew") from error
        return known

    def _keep(self, known: Known) -> Report:
        """Write `known` and its report, and remove references of others."""
        report = self._told(known)
        if self._unseen:
            report = replace(report, warnings=[*report.warnings, self._unseen])
        known.report, known.asked = asdict(report), known.asked if report.examples else []
        told = {"format": FORMAT, "version": VERSION, **asdict(known)}
        write_aside(self._folder / STATE, json.dumps(told, allow_nan=False) + "\n", sync=True)
        for path in self._folder.glob("reference-*.json"):
            if path.name != known.reference:
                path.unlink(missing_ok=True)
        return report

    @contextmanager
    def _alone(self) -> Iterator[None]:
        busy = DataError(f"{self._folder} is being watched", do="ask that one, or end it")
        with alone(self._folder / LOCK, busy, wait=WAIT_SECONDS):
            try:
                yield
            except OSError as error:
                do = "make room: the next look sees what this one would have"
                raise ResourceError(
                    f"{self._folder} cannot be written", got=error.strerror or str(error), do=do
                ) from error


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def identities(table: pa.Table) -> list[str]:
    """The version of each row, or its weights where it is no version's; "" of a request that reached none."""
    refused = np.nan_to_num(column(table, "status")) >= 400
    told = zip(texts(table, "version"), texts(table, "weights"), refused, strict=True)
    return [version or ("" if none else weights) for version, weights, none in told]


def _past(at: np.ndarray, now: float) -> np.ndarray:
    """Of sorted times those that are not in the future."""
    return at[: np.searchsorted(at, now + AHEAD_S, side="right")]


def _began(at: np.ndarray) -> float:
    """The first of sorted times since the last silence; 0 where there is none."""
    return float(at[[0, *(np.flatnonzero(np.diff(at) > SILENCE_S) + 1)][-1]]) if len(at) else 0.0


def _ahead(table: pa.Table, now: float) -> int:
    """Requests that say they ended after `now`."""
    return int((moments(table) > now + AHEAD_S).sum())


def _regret(known: Known, table: pa.Table) -> None:
    """Take `table` in as `known` knows of the regret."""
    regret = Regret() if known.regret is None else Regret.restored(known.regret)
    regret.update(table)
    known.regret = regret.saved()


def _of_weights(known: Known, table: pa.Table) -> tuple[pa.Table, bool]:
    """The rows of the weights that are watched, up to where others take their place; whether these do."""
    wanted, at = [], moments(table)
    for place, weights in enumerate(identities(table)):
        if weights in ("", known.weights):  # a request that was refused has reached no weights
            wanted.append(place)
            known.other = {} if weights else known.other
        elif known.other.get("weights") != weights:
            known.other = {"weights": weights, "count": 1, "at": float(at[place])}
        else:
            known.other["count"] += 1
        if known.other.get("count", 0) >= TURNS and known.other["at"] > known.learn_from:
            return table.take(np.array(wanted, dtype=np.int64)), True
    return table.take(np.array(wanted, dtype=np.int64)), False
