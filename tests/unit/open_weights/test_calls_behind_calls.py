"""Calls behind calls, behind a tag that is only mentioned, and behind JSON: read where that is sure, and all else is text."""

from __future__ import annotations

import pytest

from shoal.inputs.call_formats import FORMATS
from tests.unit.open_weights.test_call_formats import FAMILIES, offer, read


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_behind_calls_are_calls_and_what_is_said_between_is_said(family: str) -> None:
    form = offer(family).format
    opened = form.open if form.bare else ""
    one, two = (form.begin(name) + '{"t": ["\\"[{"]}' + form.end for name in ("look", "add_fish"))
    values = [("look", {"t": ['"[{']}), ("add_fish", {"t": ['"[{']})]
    broken = form.open + '{"name": "nobody"}' + form.close
    for text, content, calls in (
        (one + opened + two, "", values),
        (opened + one + opened + two + "\n", "", values),
        (opened + one + "\n\n" + opened + two + " Done.", " Done.", values),
        (f"Well. {opened}{one} So. {opened}{two} Done.", "Well. So. Done.", values),
        (f"{broken} {opened}{one}", broken, values[:1]),
        (f"{opened}{one} {broken}", " " + broken, values[:1]),
        (f"I write {form.open} in front: {opened}{one}", f"I write {form.open} in front:", values[:1]),
        (f"{opened}{one}{form.open}", form.open, values[:1]),
    ):
        for parts in ([text], list(text)):
            for whole in (True, False):
                unfinished = text.endswith(form.open) or (text.endswith(broken) and not form.close)
                shown = "" if unfinished and not whole else content  # it may be a call that was cut off
                assert read(offer(family).reader(), parts, whole) == (shown, calls), text
            single = read(offer(family, parallel_tool_calls=False).reader(), parts)
            assert single == (content, calls[:1])


def test_an_answer_of_json_and_tags_is_read_by_both() -> None:
    look, tag = '{"name": "look", "parameters": {}}', FORMATS["llama"].open
    for text, count in (
        (look + tag + look, 2),
        (look + "; " + look + tag + look, 3),
        ("\n" + look + "\n" + tag + "x", 1),
    ):
        for parts in ([text], list(text)):
            content, calls = read(offer("llama3").reader(), parts)
            assert len(calls) == count and content == ("" if count > 1 else "\n" + tag + "x")
