"""What `shoal watch` sees in the requests to a service: whether they are what they were, which numbers moved, since when, how
far, and what to do. Read from the API's /v1/shoal/drift, which is there where the service captures."""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr
import httpx
import openai

from ui import look, talk
from ui.look import NONE_YET, UNKNOWN, Place
from ui.site import QUIET, Component, Site

PLACE = Place("Drift", "drift", "tools")
EVERY = 5.0  # seconds between two readings
SILENT = 600.0  # seconds without a look, from which on the page says so
DRAWN = 3  # signals in a chart
BEYOND = 2.0  # powers of ten above an alarm's to which evidence is drawn: it grows without end
NO_ROUTE = look.empty(
    "No drift to show",
    "This service captures nothing. Start it with <code>shoal serve --capture DIR</code>.",
)
LOCKED = look.empty("Not for this key", "Drift is shown to keys that have <code>admin=yes</code> in the key file.")
KINDS = {"quiet": "good", "alarm": "bad"}
CURATE = "shoal curate --capture CAPTURE --out cuts/N --replay runs/data/sft-train.jsonl --suites suites"
RETRAIN = "shoal retrain --release RELEASE --cut cuts/N --replay data/shards --suites suites --data data/shards"
CANARY = 'shoal release canary --release RELEASE --why "passed the gate"'
ACCEPT = 'shoal watch accept --capture CAPTURE --why "it is meant"'
ERRORS = "curl -s SERVICE/metrics | grep request_errors_total"
# what a report calls it -> what to do, in order; `tell.meaning` says which there are
STEPS = {
    "a new domain": (CURATE, RETRAIN, CANARY),
    "a script or language that the tokenizer does not fit": ("shoal prepare --help", "shoal pretrain --help"),
    "the router out of its calibration": (CURATE, RETRAIN.replace("--cut", "--kind router --cut")),
    "a world that changed": (CURATE, RETRAIN, CANARY),
    "answers that the model is less sure of": (CURATE, RETRAIN, CANARY),
    "calls of tools that are not valid": (CURATE, RETRAIN, CANARY),
    "another use": (ACCEPT,),
    "operations": (ERRORS,),
}

Told = dict[str, Any]

_ISO = re.compile(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00")


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    body = gr.HTML(look.empty("Reading what was seen…", "One moment."), elem_id="drift")

    async def refresh(request: gr.Request) -> tuple[Any, ...]:
        try:
            answer: httpx.Response = await at.client(request).get("/shoal/drift", cast_to=httpx.Response)
            told: Told = answer.json()
        except openai.NotFoundError:
            return at.header(PLACE, request), NO_ROUTE
        except openai.PermissionDeniedError as error:
            return at.header(PLACE, request, talk.reason(error), fault=True), LOCKED
        except openai.OpenAIError as error:
            return at.header(PLACE, request, talk.reason(error), fault=True), look.nothing(EVERY)
        return at.header(PLACE, request, sentence(told)), show(told)

    outputs: list[Component] = [head, body]
    at.page.load(refresh, None, outputs, **QUIET)
    gr.Timer(EVERY).tick(refresh, None, outputs, **QUIET)


def sentence(told: Told) -> str:
    """What there is to know first."""
    found = told["look"]
    if told["fault"]:
        return f"What was seen cannot be read: {told['fault']}"
    if found is None:
        return "Nobody watches yet."
    if (silent := time.time() - found["looked"]) > SILENT:
        return f"Nobody has looked for {_span(silent)}: is shoal watch still running?"
    report = found["report"]
    if report["state"] == "learning":
        if report["requests"] >= report["needed"]:
            return f"Not yet enough days: {report['requests']:,} sessions have come."
        return f"Not yet enough: {report['requests']:,} of {report['needed']:,} sessions have come."
    if report["state"] == "quiet":
        return f"Nothing has moved since {_moment(report['reference'].get('ended'))}."
    if report["state"] == "watching":
        return "Something may be moving; it is not enough to say so."
    return f"{report['meaning'].capitalize()}, since {_moment(report['since'])}."


def show(told: Told) -> str:
    """The whole page as HTML."""
    found = told["look"]
    if found is None:
        rows = told["capture"]["rows"]
        parts = [
            look.empty(
                "Nobody watches yet",
                f"{rows:,} requests were captured since this service started. "
                "<code>shoal watch --capture CAPTURE</code> says when they are no longer what they were.",
            )
        ]
        return "".join([*parts, '<div class="figures">', *_captured(told), "</div>"])
    report = found["report"]
    parts = [_headline(report), look.tiles(_facts(found), KINDS)]
    if report["state"] in ("watching", "alarm"):
        parts += [_to_do(report), _moved(report) if report["signals"] else ""]
    parts.append('<div class="figures">')
    if report["state"] == "learning":
        share = min(1.0, report["requests"] / max(1, report["needed"]))
        parts.append(look.bars("Sessions of the reference", {"learned": share}, {"learned": f"{share:.0%}"}))
    else:
        parts += [_evidence(found), _signals(found), _now(found)]
    parts += [_notes(report), *_captured(told), "</div>"]
    return "".join(parts)


def _headline(report: Told) -> str:
    """The watcher's own sentence, as it says it in a terminal."""
    kind = {"watching": "suspect"}.get(report["state"], report["state"])
    role = ' role="alert"' if report["state"] == "alarm" else ""
    said = _ISO.sub(r"\1 \2 UTC", report["sentence"])
    return f'<p class="verdict {kind}"{role}>{html.escape(said)}</p>'


def _facts(found: Told) -> list[tuple[str, str]]:
    report = found["report"]
    learning = report["state"] == "learning"
    facts = [("State", report["state"])]
    facts.append(("Sessions", f"{report['requests']:,}"))
    if not learning:
        facts.append(("Evidence of an alarm's", _share(report["evidence"] / max(1, report["needed"]))))
    if report["since"]:
        facts.append(("Since, UTC", _moment(report["since"])))
    if report["found_after"] is not None:
        facts.append(("Sessions to the alarm", f"{report['found_after']:,}"))
    if regret := report.get("regret"):
        lost = f"{regret['mean']:.3f} of {regret['tolerance']:g}"
        facts.append(("Lost by depth auto, nats a token", lost))
    facts.append(("Looked", f"{_span(max(0.0, time.time() - found['looked']))} ago"))
    return facts


def _to_do(report: Told) -> str:
    """What to do, with the commands in their order."""
    steps = "".join(f"<li><code>{html.escape(step)}</code></li>" for step in STEPS.get(report["meaning"], ()))
    asked = "".join(f"<li>{html.escape(text)}</li>" for text in report["examples"])
    examples = f'<h2>Asked, furthest from before</h2><ul class="asked">{asked}</ul>' if asked else ""
    what = html.escape(f"{report['meaning']}: {report['do']}".capitalize())
    return f'<div class="figure todo"><h2>What to do</h2><p class="note">{what}.</p><ol>{steps}</ol>{examples}</div>'


def _moved(report: Told) -> str:
    """The signals that moved, the surest first."""
    rows = [
        (
            f"{each['words']}{each['where']}", f"{each['shift']:+.2f} SD", _moment(each["since"]), f"{each['requests']:,}",
            _beside(each, "psi"), _beside(each, "ks"),
        )
        for each in report["signals"]
    ]  # fmt: skip
    head = ("signal", "moved", "since, UTC", "sessions", "PSI (chance)", "KS (chance)")
    return look.table("What moved", head, rows)


def _beside(signal: Told, name: str) -> str:
    """A figure with what chance alone does to so few requests."""
    return UNKNOWN if name not in signal else f"{signal[name]:.2f} ({signal[f'{name}_chance']:.2f})"


def _evidence(found: Told) -> str:
    """Over the requests, in powers of ten, with the line at which it is an alarm."""
    needed = math.log10(max(1.0, found["report"]["needed"]))
    most = 10 ** (needed + BEYOND)
    points = [(float(seen), math.log10(min(most, max(1.0, evidence)))) for _, seen, evidence in found["evidence"]]
    if len(points) < 2:
        return look.remark("Evidence", "It is drawn from the second look on.")
    line = [(points[0][0], needed), (points[-1][0], needed)]
    return look.curves("Evidence, power of ten", "sessions", {"evidence": points, "alarm": line}, faint="alarm")


def _signals(found: Told) -> str:
    """Those that are furthest from the reference over time."""
    series = {name: points for name, points in found["signals"].items() if len(points) > 1}
    if not series:
        return look.remark("Signals over time", "They are drawn from some fifty sessions on.")
    first = [each["signal"] for each in found["report"]["signals"] if each["signal"] in series]
    others = sorted(set(series) - set(first), key=lambda name: -_wide(series[name]))  # first what moves at all
    named = [*first, *others][:DRAWN]
    return look.curves("Signals, SD from the reference", "sessions", {_plain(name): series[name] for name in named})


def _now(found: Told) -> str:
    """All signals as they are now."""
    rows = [
        (_plain(name), f"{_late(points):+.2f} SD", f"{max((y for _, y in points), key=abs):+.2f} SD")
        for name, points in sorted(
            found["signals"].items(), key=lambda each: (not _wide(each[1]), -abs(_late(each[1])))
        )
        if points
    ]
    return look.table("All signals", ("signal", "now", "furthest"), rows) if rows else ""


def _notes(report: Told) -> str:
    known = report["reference"]
    notes = "".join(f'<p class="note">{html.escape(text[:1].upper() + text[1:])}.</p>' for text in report["warnings"])
    if not known:
        return notes
    rows = [
        ("sessions", f"{known['requests']:,}"),
        ("from, UTC", _moment(known["began"])),
        ("to, UTC", _moment(known["ended"])),
    ]
    if known.get("why"):
        rows.append(("accepted", known["why"]))
    return look.table("Reference", (), rows).removesuffix("</div></div>") + f"</div>{notes}</div>"


def _captured(told: Told) -> list[str]:
    """What this gateway captured, and the votes."""
    capture = told["capture"]
    dropped = sum(capture["dropped"].values())
    why = ", ".join(f"{count:,} {name}" for name, count in capture["dropped"].items())
    texts = f"for {capture['texts_days']} days" if capture["texts"] else "none"
    rows = [
        ("rows", f"{capture['rows']:,}"), ("dropped", f"{dropped:,}" + (f" ({why})" if dropped else "")),
        ("waits for the disk", f"{capture['lag_seconds']:.1f} s"), ("on the disk", f"{capture['bytes'] / 1e6:,.1f} MB"),
        ("days kept", f"{capture['keep_days']}"), ("texts kept", texts),
    ]  # fmt: skip
    votes = {name: float(count) for name, count in capture["votes"].items() if count}
    counted = {name: f"{count:,.0f}" for name, count in votes.items()}
    voted = look.bars(
        "Votes since the start", look.shares(votes), counted, "" if votes else NONE_YET.capitalize() + "."
    )
    return [look.table("Captured since the start", (), rows), voted]


def _late(points: Sequence[Sequence[float]]) -> float:
    """Where a signal is now: the mean of its last buckets."""
    last = [y for _, y in points[-4:]]
    return sum(last) / max(1, len(last))


def _wide(points: Sequence[Sequence[float]]) -> float:
    """How far apart a signal's highest and lowest are; 0 for one that never changed."""
    return max((y for _, y in points), default=0.0) - min((y for _, y in points), default=0.0)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _share(share: float) -> str:
    return "all of it" if share >= 1 else f"{share:.0%}" if share >= 0.01 or share == 0 else "below 1%"


def _moment(iso: str | None) -> str:
    """``11-27 14:10``, UTC."""
    return UNKNOWN if not iso else iso[5:16].replace("T", " ")


def _span(seconds: float) -> str:
    for size, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
