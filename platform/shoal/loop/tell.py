"""What a detector has seen, for people: one sentence on top, then each signal, how far it moved, and since when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shoal.errors import DataError
from shoal.loop.detector import BAND, Detector, Moved
from shoal.loop.reference import BELOW, EVERY, Reference, Standard, explained
from shoal.loop.regret import broken
from shoal.loop.watched import BY_NAME, meaning, texts
from shoal.machine import write_aside

STATES = ("learning", "quiet", "watching", "alarm")
FAR = ", far out, in some"
NAMED = 4  # signals in the sentence
TWO_WEEKS_HOURS = 333.0  # nearly, for the last request comes before their end
MUCH_FAILURE = 0.02  # share of a reference that makes it one of a bad day


@dataclass(frozen=True)
class Report:
    """How things are. `evidence` and `needed` are in sessions, `signals` those that moved, the surest first."""

    state: str  # learning, quiet, watching or alarm
    sentence: str
    weights: str = ""
    requests: int = 0  # compared so far, one a session; while it learns, learned
    evidence: float = 0.0
    needed: int = 0  # evidence that is an alarm; while it learns, sessions of a reference
    since: str | None = None  # when the requests began to be different, where they are
    found_after: int | None = None  # sessions from then to the alarm
    meaning: str = ""
    do: str = ""
    signals: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)  # of what was asked, where texts are kept
    regret: dict[str, float] | None = None  # `regret.Regret.told`: mean, low, high, tolerance, reruns

    @property
    def lines(self) -> list[str]:
        """What stands below the sentence."""
        found = [f"  {_line(signal)}" for signal in self.signals]
        found += [f"  {_of_regret(self.regret)}"] if self.regret else []
        found += [f"  asked: {text}" for text in self.examples]
        found += [f"  what to do: {self.do}"] if self.do else []
        return found + [f"  note: {warning}" for warning in self.warnings]


def told(
    reference: Reference | None,
    detector: Detector | None,
    *,
    weights: str,
    learned: int = 0,
    wanted: int = 0,
    hours: float = 0.0,
    ahead: int = 0,
    recent: pa.Table | None = None,
    examples: Sequence[str] = (),
    regret: dict[str, float] | None = None,
) -> Report:
    """The report of a detector with its reference; of none while `learned` of the `wanted` sessions of one have come, or
    they span fewer than `hours`. `recent`:
    rows since the change began, to explain it with, and `examples` of what was asked in them. `ahead`: rows from the future.
    `regret`: what the router's choices lose, by `Regret.told`; that it does not keep its tolerance is an alarm of its own."""
    found = _of_detector(
        reference, detector, weights=weights, learned=learned, wanted=wanted, hours=hours, ahead=ahead,
        recent=recent, examples=examples,
    )  # fmt: skip
    if regret is None or not broken(regret) or found.state == "alarm":
        return replace(found, regret=regret)
    kind, do = meaning([("regret", 1.0)])
    return replace(
        found, state="alarm", sentence=f"Alarm: {kind}: {_of_regret(regret)}.", meaning=kind, do=do, regret=regret
    )


def _of_detector(
    reference: Reference | None,
    detector: Detector | None,
    *,
    weights: str,
    learned: int,
    wanted: int,
    hours: float,
    ahead: int,
    recent: pa.Table | None,
    examples: Sequence[str],
) -> Report:
    """`told` without a regret."""
    warnings = [f"{ahead:,} requests say that they ended in the future: a gateway's clock is wrong"] if ahead else []
    if reference is None or detector is None:
        sentence = f"Not yet enough: {learned:,} of the {wanted:,} sessions of a reference have come."
        if learned >= wanted:
            sentence = f"Not yet enough: {learned:,} sessions have come, which do not span {_span(hours)} yet."
        if not learned:
            sentence = "Not yet enough: no request has come yet."
        return Report("learning", sentence, weights, learned, 0.0, wanted, warnings=warnings)
    warnings += _of_reference(reference)
    named = _named(detector)
    first = named[0]
    signals = [_signal(one, reference, recent) for one in named]
    state, needed = detector.state, detector.requests
    facts: dict[str, Any] = {
        "weights": weights, "requests": detector.seen, "evidence": detector.evidence, "needed": needed,
        "reference": {
            "requests": reference.requests, "began": _iso(reference.began), "ended": _iso(reference.ended),
            "hours": round(reference.hours, 2), "why": reference.why,
        },
        "warnings": warnings,
    }  # fmt: skip
    if state == "quiet":
        return Report("quiet", f"Quiet: {detector.seen:,} sessions are like the reference.", **facts)
    kind, do = meaning([(one.signal, _moved(one, reference, recent)) for one in named])
    since = _iso(first.since) if first.since is not None else None
    how = ", ".join(f"{signal['words']} ({signal['shift']:+.1f} SD{signal['where']})" for signal in signals)
    what: dict[str, Any] = {"since": since, "meaning": kind, "do": do, "signals": signals, "examples": list(examples)}
    if state == "watching":
        sentence = (
            f"Watching: the evidence is {detector.evidence:,.0f} sessions, an alarm has {needed:,}; most of it since "
            f"{since or 'now'}: {how}."
        )
        return Report("watching", sentence, **facts, **what)
    assert detector.alarm is not None
    after = max(0, int(detector.alarm["number"]) - first.number + 1)
    over = "" if detector.evidence >= needed else " It has grown less since."
    sentence = (
        f"Alarm: {kind} since {since or _iso(detector.alarm['at'])}, found after {after:,} sessions: {how}.{over}"
    )
    return Report("alarm", sentence, **facts, **what, found_after=after)


def _named(detector: Detector) -> list[Moved]:
    """The streams to speak of, each signal once: the surest, and those that alone would be an alarm."""
    found: dict[str, Moved] = {}
    for one in detector.moved():
        sure = one.evidence >= detector.requests and abs(one.shift) > BAND
        if not found or (sure and one.signal not in found):
            found[one.signal] = one
    return list(found.values())[:NAMED]


def _moved(one: Moved, reference: Reference, recent: pa.Table | None) -> float:
    """How far the signal itself moved, + for more: it did less where it is further out below, and where it was nearly always
    the same it moved to the side of what is `recent`."""
    if one.tail:
        return -one.shift if one.tail == BELOW else one.shift
    usual, values = _standard(one, reference).usual, _values(one, recent)
    if usual is None or not len(values):
        return one.shift
    return float(np.copysign(one.shift, values.mean() - usual))


def _standard(one: Moved, reference: Reference) -> Standard:
    """What the reference has of its signal and slice."""
    return next(s for s in reference.standards if (s.signal, s.slice, s.tail) == (one.signal, one.slice, ""))


def _values(one: Moved, recent: pa.Table | None) -> np.ndarray:
    """Its values in the rows of its slice; none where no row is known."""
    if recent is None:
        return np.array([])
    if one.slice != EVERY:
        recent = recent.filter(pa.array([name == one.slice for name in texts(recent, "slice")], pa.bool_()))
    values = BY_NAME[one.signal].of(recent)
    return values[~np.isnan(values)]


def _signal(one: Moved, reference: Reference, recent: pa.Table | None) -> dict[str, Any]:
    signal = BY_NAME[one.signal]
    told = {
        "signal": one.signal, "slice": one.slice, "shift": round(one.shift, 3), "evidence": one.evidence,
        "since": None if one.since is None else _iso(one.since), "requests": one.values,
        "words": (signal.more if _moved(one, reference, recent) >= 0 else signal.less) + (FAR if one.tail else ""),
        "tail": one.tail,
        "where": "" if one.slice == EVERY else f" in {one.slice}",
    }  # fmt: skip
    if recent is not None and len(recent):
        told |= {
            name: round(value, 4) for name, value in explained(_standard(one, reference), _values(one, recent)).items()
        }
    return told


def _of_regret(regret: dict[str, float]) -> str:
    """What the router's choices lose, in words."""
    return (
        f"answers of depth auto lose {regret['mean']:.3f} nats a token ({regret['low']:.3f} to {regret['high']:.3f}), where "
        f"{regret['tolerance']:g} is promised, by {regret['reruns']:,.0f} re-runs"
    )


def _line(signal: dict[str, Any]) -> str:
    """One signal as a line, with what chance alone would do to so few requests."""
    line = f"{signal['signal']}{signal['where']}: {signal['shift']:+.2f} SD over {signal['requests']:,} sessions"
    if "psi" in signal:
        line += f"; of the last {signal['n']:,.0f} PSI {signal['psi']:.2f} (chance {signal['psi_chance']:.2f}), "
        line += f"KS {signal['ks']:.2f} (chance {signal['ks_chance']:.2f})"
    return line


def write_metrics(report: Report, path: Path) -> None:
    """The report's figures in Prometheus's text format, written aside and renamed."""
    values = {
        "drift_state": ("0 learning, 1 quiet, 2 watching, 3 alarm", {"": float(STATES.index(report.state))}),
        "drift_evidence_requests": ("Evidence of a drift, in sessions.", {"": report.evidence}),
        "drift_needed_requests": ("Evidence that is an alarm.", {"": float(report.needed)}),
        "drift_requests": ("Sessions that were compared with the reference.", {"": float(report.requests)}),
        "drift_looked_timestamp_seconds": ("When it was looked last, in Unix time.", {"": time.time()}),
        "drift_shift_sd": (
            "How far a signal moved, in standard deviations of a request.",
            {f'{{signal="{one["signal"]}"}}': one["shift"] for one in report.signals},
        ),
    }
    if report.regret is not None:
        bounds = {f'{{bound="{name}"}}': report.regret[name] for name in ("low", "mean", "high")}
        values["regret_nats"] = ("Nats a token that answers of depth auto lose, by re-runs at full depth.", bounds)
        values["regret_tolerance_nats"] = ("What they may lose.", {"": report.regret["tolerance"]})
        values["regret_reruns"] = ("Re-runs that this was measured on.", {"": report.regret["reruns"]})
    if ended := report.reference.get("ended"):
        told_ = "When the last request of the watch's reference ended, in Unix time."
        values["drift_reference_timestamp_seconds"] = told_, {"": datetime.fromisoformat(ended).timestamp()}
    lines = []
    for name, (told, samples) in values.items():
        lines += [f"# HELP shoal:{name} {told}", f"# TYPE shoal:{name} gauge"]
        lines += [f"shoal:{name}{labels} {_number(value)}" for labels, value in samples.items()]
    try:
        write_aside(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}", got=error.strerror, do="give --metrics a file in a folder") from error


def _number(value: float) -> str:
    """A figure with six digits; a time to the millisecond."""
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.3f}"


def _of_reference(reference: Reference) -> list[str]:
    """What is weak about a reference."""
    found = []
    if reference.hours < TWO_WEEKS_HOURS:
        span = _span(reference.hours)
        found.append(
            f"the reference spans {span}: where days or weeks have a rhythm, learn one of two weeks (--hours 336)"
        )
    for standard in reference.standards:
        if standard.signal == "failed" and standard.slice == EVERY and (standard.share or 0) > MUCH_FAILURE:
            found.append(f"{standard.share:.0%} of the reference's requests failed: accept another when that is mended")
    return found


def _span(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.0f} minutes"


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
