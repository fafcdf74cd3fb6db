"""The page of a release as HTML: what is not known is said to be so, and what people wrote stays text."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("gradio")

from ui import releases

VERSION: dict[str, Any] = {
    "number": 1, "label": "1.aa", "made": "2026-11-27T10:00:00.000+00:00", "passed": None, "checks": [], "parent": None,
    "cut": None, "served": [["2026-11-27T10:00:00.000+00:00", None]],
}  # fmt: skip
ENTRY: dict[str, Any] = {
    "number": 7, "at": "2026-11-27T10:00:00.000+00:00", "who": "ann", "what": "promote", "version": 1, "from": 2, "to": 1,
    "why": "<b>better</b>", "figures": {"forced": True},
}  # fmt: skip


def told(**more: Any) -> dict[str, Any]:
    state = {
        "stable": 1,
        "previous": None,
        "candidate": None,
        "canary": None,
        "held": None,
        "auto": "candidate",
        "share": None,
    }
    return {**state, "shares": [0.0, 0.05], "evidence": None, "versions": [VERSION], "log": [ENTRY], **more}


def test_the_line_on_top_says_what_there_is_to_know_first() -> None:
    canary = {"version": 2, "step": 1}
    assert releases.sentence(told()) == "Version 1 serves."
    assert releases.sentence(told(candidate=2)) == "Version 1 serves; version 2 is to be decided on."
    assert releases.sentence(told(canary=canary, share=0.0)) == "Version 1 serves; version 2 gets copies of requests."
    assert "answers 5% of the conversations" in releases.sentence(told(canary=canary, share=0.05))
    assert releases.sentence(told(canary=canary, share=0.05, held="lunch")) == "Held: lunch"


def test_what_people_wrote_is_text_and_what_was_forced_is_marked() -> None:
    page = releases.show(told())
    assert "&lt;b&gt;better" in page and "<b>" not in page
    assert "promote 1, against the gate" in page and "not asked" in page and "10:00 to now" in page


def test_the_checks_of_a_canary_are_shown_once_they_are_its_own() -> None:
    check = {"name": "failures", "count": 3, "of": 9, "stable": 0.005, "condemned": True, "cleared": False}
    evidence = {"version": 2, "checks": [check]}
    canary = {"version": 2, "step": 1}
    page = releases.show(told(canary=canary, share=0.05, evidence=evidence))
    assert "3 of 9" in page and "condemned" in page and "step 2 of 2" in page
    assert "Nothing was seen" in releases.show(told(canary=canary, share=0.05, evidence={**evidence, "version": 1}))
