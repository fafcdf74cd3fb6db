"""The page of drift as HTML: each state says what there is to know first, and what people asked stays text."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("gradio")

from ui import drift

SIGNAL: dict[str, Any] = {
    "signal": "prompt_surprisal", "slice": "all", "shift": 1.07, "evidence": 9e9, "since": "2026-11-27T14:10:26+00:00",
    "requests": 560, "words": "prompts more surprising", "tail": "", "where": "", "psi": 1.31, "psi_chance": 0.08,
}  # fmt: skip
REFERENCE = {
    "requests": 500,
    "began": "2026-11-27T13:35:00+00:00",
    "ended": "2026-11-27T13:44:00+00:00",
    "why": "<i>ok</i>",
}
CAPTURE = {
    "rows": 1200, "dropped": {"queue": 7}, "lag_seconds": 0.2, "bytes": 2e6, "keep_days": 90, "texts": False,
    "texts_days": 30, "votes": {"up": 3, "down": 1},
}  # fmt: skip


def told(state: str, **report: Any) -> dict[str, Any]:
    known = {
        "state": state, "sentence": "Since 2026-11-27T14:10:26+00:00 <b>much</b>.", "requests": 180, "evidence": 0.0,
        "needed": 500, "since": None, "found_after": None, "meaning": "", "do": "", "signals": [], "reference": {},
        "warnings": [], "examples": [], **report,
    }  # fmt: skip
    found = {"looked": time.time(), "report": known, "evidence": [], "signals": {}}
    return {"look": found, "fault": None, "capture": CAPTURE}


def alarm() -> dict[str, Any]:
    return told(
        "alarm", since="2026-11-27T14:10:26+00:00", found_after=40, meaning="a new domain", do="curate, then retrain",
        signals=[SIGNAL], reference=REFERENCE, examples=["<script>x</script>"], evidence=1e200,
    )  # fmt: skip


def test_the_line_on_top_says_what_there_is_to_know_first() -> None:
    nobody = {"look": None, "fault": None, "capture": CAPTURE}
    assert drift.sentence(nobody) == "Nobody watches yet."
    assert "cannot be read: watch.json" in drift.sentence({**nobody, "fault": "watch.json"})
    assert drift.sentence(told("learning")) == "Not yet enough: 180 of 500 sessions have come."
    assert drift.sentence(told("quiet", reference=REFERENCE)) == "Nothing has moved since 11-27 13:44."
    assert drift.sentence(alarm()) == "A new domain, since 11-27 14:10."
    silent = told("quiet", reference=REFERENCE)
    silent["look"]["looked"] -= 3 * 3600
    assert drift.sentence(silent) == "Nobody has looked for 3 h: is shoal watch still running?"


def test_an_alarm_says_what_moved_how_far_and_what_to_do_in_which_order() -> None:
    page = drift.show(alarm())
    assert "+1.07 SD" in page and "1.31 (0.08)" in page and "not known" in page, "KS was not measured"
    steps = [page.index(step) for step in ("shoal curate", "shoal retrain", "shoal release canary")]
    assert steps == sorted(steps) and 'role="alert"' in page and "all of it" in page
    assert "Since 11-27 14:10 UTC &lt;b&gt;much" in page and "<script>" not in page and "<i>ok" not in page
    assert "1,200" in page and "7 (7 queue)" in page
