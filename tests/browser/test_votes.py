"""Votes and better answers on the chat page, in Debian's chromium: from the button to what `shoal curate` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from shoal.api.capture import CaptureArgs
from shoal.loop.capture import Capture
from shoal.loop.labels import CORRECTION, kept_texts, labelled, said
from shoal.loop.votes import Votes
from tests.browser.driving import ask, kept, most_tokens, until, visit
from tests.browser.site import Site, site
from tests.browser.test_access import in_both_schemes

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

KEEP = "Keep what is written here, so that the model can learn from it"
BETTER = "Write the better answer"


def answered(page: Page, text: str, count: int = 1) -> None:
    ask(page, text)
    page.locator(".facts").nth(count - 1).wait_for()
    page.get_by_label("Submit").wait_for()


@pytest.mark.drill
def test_a_better_answer_is_written_without_a_mouse_and_becomes_a_row_to_learn_from(
    page: Page, strangers: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "captured"
    with site(capture=CaptureArgs(str(folder), texts=True)) as here:
        visit(page, here)
        most_tokens(page, 4)
        page.get_by_label(KEEP).check()
        with here.saying("It is lost."):
            answered(page, "Where is my kettle?")
        votes = Votes(Capture(folder))
        down = page.get_by_label("Bad answer")
        down.focus()
        page.keyboard.press("Space")
        page.get_by_role("status").get_by_text("Thank you.").wait_for()
        assert down.get_attribute("aria-pressed") == "true" and [one.rating for one in votes.all()] == ["down"]
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name=BETTER)
        text = dialog.get_by_label("The better answer")
        assert text.input_value() == "It is lost."
        assert in_both_schemes(page) == []
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        assert page.evaluate("() => document.activeElement.className") == "better", "where the focus was"
        page.keyboard.press("Enter")
        text.fill("It comes tomorrow, <b>by</b> noon.")
        dialog.get_by_role("button", name="Send").press("Enter")
        page.get_by_role("button", name="Change your better answer").wait_for()
        until(page, lambda: any(one.correction for one in votes.all()))
        (vote,) = votes.all()
        assert (vote.rating, vote.correction) == ("down", "It comes tomorrow, <b>by</b> noon.")
        page.wait_for_function("() => document.querySelector('#earlier input').value === 'Where is my kettle?'")
        kept(page, "It comes tomorrow")
        visit(page, here)
        page.get_by_role("button", name="Change your better answer").click()
        assert text.input_value() == "It comes tomorrow, <b>by</b> noon."
        page.keyboard.press("Escape")
        assert page.get_by_label(KEEP).is_checked() and down.get_attribute("aria-pressed") == "true"
        page.goto("about:blank")
    capture = Capture(folder)
    (row,) = labelled(kept_texts(capture), said(capture), {}).rows  # what `shoal curate` makes a cut of
    assert row.label == CORRECTION and row.messages == [
        {"role": "user", "content": "Where is my kettle?"},
        {"role": "assistant", "content": "It comes tomorrow, <b>by</b> noon."},
    ]


@pytest.mark.drill
def test_what_was_asked_without_leave_to_keep_it_is_not_kept_and_the_page_says_how_it_would_be(
    page: Page, strangers: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "captured"
    with site(capture=CaptureArgs(str(folder), texts=True)) as here:
        visit(page, here)
        most_tokens(page, 4)
        assert not page.get_by_label(KEEP).is_checked(), "nobody's words are kept unasked"
        answered(page, "A secret.")
        page.get_by_role("button", name=BETTER).click()
        dialog = page.get_by_role("dialog", name=BETTER)
        dialog.get_by_text("was not kept").wait_for()
        assert not dialog.get_by_label("The better answer").is_visible()
        dialog.get_by_role("button", name="Close").click()
        assert not list(folder.glob("texts/**/*.json"))
        page.get_by_label(KEEP).check()
        answered(page, "No secret.", 2)
        assert len(list(folder.glob("texts/**/*.json"))) == 1
        page.get_by_role("button", name=BETTER).last.click()
        dialog.get_by_role("button", name="Send").click()  # nothing was changed
        dialog.wait_for(state="hidden")
        page.get_by_label("Bad answer").last.click()
        page.get_by_text("Thank you.").wait_for()
        assert [one.correction for one in Votes(Capture(folder)).all()] == [None], (
            "the model's words are no better answer"
        )
        page.goto("about:blank")


def feedback(here: Site) -> float:
    """Votes that were taken."""
    lines = httpx.get(f"{here.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("shoal:feedback_total{"))
