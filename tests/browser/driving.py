"""What a user does on the pages, and how a test waits: for a state of the page or the engine, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal.inputs.chat import Encoded
from tests.browser.site import Site

if TYPE_CHECKING:
    from playwright.sync_api import Page

SECONDS = 120.0  # that anything may take, on a machine that does five other things


def visit(page: Page, site: Site, path: str = "") -> None:
    page.goto(f"{site.url}/ui/{path}")
    page.get_by_text("fish · 4 layers").wait_for()  # the settings are then those of the model


def log_in(page: Page, key: str) -> None:
    """On the form that a page without a key leads to."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Log in").click()


def log_in_anew(page: Page, key: str) -> None:
    """With another key, from a page that is open."""
    page.get_by_role("link", name="Log out").click()
    log_in(page, key)


def most_tokens(page: Page, count: int) -> None:
    box = page.get_by_label("number input for Most tokens")
    box.fill(str(count))
    box.press("Tab")


def open_settings(page: Page) -> None:
    """Opens them, and lets the page draw. At a load of 58 what was typed at once did not reach the engine; gradio gives what is
    opened its values a frame later, which may be why."""
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Seed").wait_for()
    page.evaluate("async () => { for (let i = 0; i < 5; i++) await new Promise(requestAnimationFrame) }")


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def until(page: Page, true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        page.wait_for_timeout(50)


def words(page: Page, place: str) -> str:
    """What `place` shows, once that is more than a letter."""
    page.wait_for_function(f"() => document.querySelector('{place}')?.innerText.trim().length > 1")
    return page.locator(place).first.inner_text().strip()


def told(site: Site) -> str:
    """The text of the last prompt that the engine was given."""
    prompt = site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded)
    return site.client.model.tokenizer.decode(prompt.ids)


def wait_until_kept(page: Page, site: Site, facts: str) -> None:
    """An answer is kept while it comes, and once more when it is whole: another tab then shows its `facts`."""
    tab = page.context.new_page()

    def shows() -> bool:
        page.bring_to_front()  # behind another tab a page draws, and keeps, nothing
        page.wait_for_timeout(500)
        tab.bring_to_front()
        visit(tab, site)
        for _ in range(50):  # then it was opened before that was kept
            if tab.locator(".facts", has_text=facts).count():
                return True
            tab.wait_for_timeout(100)
        return False

    until(tab, shows)
    tab.close()
    page.bring_to_front()


def kept(page: Page, said: str) -> None:
    """Wait until the browser has kept a conversation in which that was said, a moment after it is shown."""
    page.wait_for_function("(said) => Object.values(localStorage).some((one) => one.includes(said))", arg=said)
