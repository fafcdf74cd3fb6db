"""Every page for everybody: no violation of WCAG A and AA, light or dark; by keyboard, on a phone, and without an API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shoal.api.auth import ApiKeys
from tests.browser.conftest import written_release
from tests.browser.driving import log_in, log_in_anew
from tests.browser.site import Site, site

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]

CHATS, TOOLS = ("", "customer-service", "code", "medicine", "law"), ("compare", "training", "releases", "service")
TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
NAME = """() => {
  const at = document.activeElement;
  const name = at.ariaLabel || at.labels?.[0]?.innerText || at.innerText || at.title;
  return at === document.body ? null : [at.tagName, (name || '').trim()];
}"""
MOVING = """() => [...document.querySelectorAll('*')].filter((at) => getComputedStyle(at).transitionDuration !== '0s')
  .map((at) => at.className)"""

# words of tables that are on two lines
BROKEN = """() => [...document.querySelectorAll('td, th, caption')].flatMap((cell) => {
  const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    for (const word of text.data.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(({ top }) => Math.round(top))).size > 1) found.push(word[0]);
    }
  }
  return found;
})"""


def open_page(page: Page, site: Site, path: str) -> None:
    """Waits until the page shows what it has to show."""
    page.goto(f"{site.url}/ui/{path}")
    page.locator(".about").wait_for()
    if path in TOOLS[1:]:
        page.locator(".tile").first.wait_for()


def violations(page: Page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    only = {"runOnly": {"type": "tag", "values": list(TAGS)}, "resultTypes": ["violations"]}
    found: list[dict[str, Any]] = axe.run(page, options=only).response["violations"]
    return [
        f"{wrong['id']}: {node['html'][:200]} {node['failureSummary']}" for wrong in found for node in wrong["nodes"]
    ]


def in_both_schemes(page: Page) -> list[str]:
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.wait_for_function(f"() => document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}")
        assert page.evaluate(MOVING) == [], "who asked for less motion sees none, and no colour half-way to another"
        found += [f"{scheme} {line}" for line in violations(page)]
    return found


@pytest.mark.parametrize("path", [*CHATS, *TOOLS])
def test_axe_finds_no_violation_of_wcag(page: Page, open_site: Site, path: str) -> None:
    open_page(page, open_site, path)
    assert in_both_schemes(page) == []


def test_axe_finds_none_beside_an_answer_and_in_what_is_folded_away(page: Page, open_site: Site) -> None:
    open_page(page, open_site, "code")
    page.locator("#chat").get_by_text("Complete a function").click()
    page.locator(".facts").wait_for()
    for name in ("More settings", "The last request as curl"):
        page.get_by_role("button", name=name).click()
    assert page.locator('[aria-label*="<"]').count() == 0, "nobody is read markup"
    assert page.get_by_role("group", name="bot's message", exact=True).count() == 2  # the answer, and its facts
    assert in_both_schemes(page) == []
    open_page(page, open_site, "compare")
    page.get_by_label("Prompt").fill("hello")
    page.get_by_role("button", name="Compare").click()
    page.locator("#answer-B .facts").wait_for()
    assert in_both_schemes(page) == []


def test_a_release_is_changed_on_its_page_where_axe_finds_nothing(
    page: Page, strangers: list[str], tmp_path: Path
) -> None:
    """Only with a key that may, with a reason, and not against the gate unless it is said."""
    release = written_release(tmp_path)
    with site(ApiKeys(["reader", "secret name=ann admin=yes"]), release=release) as locked:
        page.goto(f"{locked.url}/ui/releases")
        assert in_both_schemes(page) == []
        log_in(page, "reader")
        page.get_by_text("Version 1 serves; version 3 is to be decided on.").wait_for()
        assert page.get_by_role("button", name="Promote").count() == 0
        log_in_anew(page, "secret")
        page.goto(f"{locked.url}/ui/releases")
        promote = page.get_by_role("button", name="Promote")
        promote.click()
        page.get_by_role("alert").get_by_text("Write the reason first.").wait_for()
        assert in_both_schemes(page) == []
        page.get_by_label("Version", exact=True).click()
        page.get_by_role("option", name=release.version(2).label).click()
        page.get_by_label("Reason").fill("it looks good")
        promote.click()
        page.get_by_role("alert").get_by_text("the gate did not let version 2 pass").wait_for()
        page.get_by_label("Also against the gate").check()
        promote.click()
        page.get_by_text("New requests get version 2 within some seconds.").wait_for()
        page.get_by_role("row", name="promote 2, against the gate").get_by_text("it looks good").wait_for()
        state, last = release.state(), release.audit.entries()[-1]
        assert (state.stable, last["who"], last["figures"]) == (2, "ann", {"forced": True})
        page.goto("about:blank")


def test_a_chat_needs_no_mouse_and_every_stop_on_the_way_has_a_name(page: Page, open_site: Site) -> None:
    open_page(page, open_site, "")
    page.get_by_label("shallow, 1 of 4 layers").wait_for()
    page.locator("body").press("Tab")
    stops: list[list[str]] = []
    for _ in range(60):
        stop = page.evaluate(NAME)
        if stop is None:
            break
        stops.append(stop)
        page.keyboard.press("Tab")
    assert all(name for _, name in stops), stops
    names = [name for _, name in stops]
    # as they stand on the page
    wanted = ["Chat", "Service", "Message", "auto, by the question", "New chat", "Save as JSON"]
    assert [name for name in names if name in wanted] == wanted, names
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Hello?")
    page.keyboard.press("Enter")
    page.locator(".facts").wait_for()
    page.get_by_label("auto, by the question").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_label("shallow, 1 of 4 layers").is_checked()


def test_no_page_is_wider_than_a_phone(page: Page, open_site: Site) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    for path in (*CHATS, *TOOLS):
        open_page(page, open_site, path)
        assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 360, path or "chat"
        assert not page.locator(".nav-holder").is_visible(), "Gradio's own list of pages"


def test_without_an_api_every_page_says_so(page: Page, strangers: list[str]) -> None:
    with site(lost=True) as alone:
        for path in (*CHATS[:1], *TOOLS):
            page.goto(f"{alone.url}/ui/{path}")
            page.get_by_role("alert").get_by_text("The server does not answer").wait_for()
        page.goto(f"{alone.url}/ui/")
        page.get_by_label("Message", exact=True).fill("Is anybody there?")
        page.keyboard.press("Enter")
        page.locator("#chat .fault").get_by_text("The server does not answer").wait_for()
        page.goto("about:blank")
