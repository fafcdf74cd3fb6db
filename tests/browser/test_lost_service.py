"""A service that ends under an open page, and one that comes in its place and remembers nothing of the page."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from shoal.api.auth import ApiKeys
from tests.browser.driving import ask, log_in, most_tokens, told, until, visit, wait_until_kept, words
from tests.browser.site import Site, free_port, site
from ui import uploads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]

LOST = "The connection to the service is lost."


class Service:
    """A site at one port, which can be ended and begun anew, with engines and pages that remember nothing."""

    def __init__(self) -> None:
        self._port = free_port()
        self._running = ExitStack()
        self.begin()

    def begin(self, keys: ApiKeys | None = None) -> Site:
        uploads.folder.cache_clear()  # another process would keep its uploads elsewhere
        self.site = self._running.enter_context(site(keys, port=self._port))
        return self.site

    def end(self) -> None:
        self._running.close()

    def again(self, keys: ApiKeys | None = None) -> Site:
        self.end()
        return self.begin(keys)


@pytest.fixture
def service(strangers: list[str]) -> Iterator[Service]:
    running = Service()
    yield running
    running.end()
    uploads.folder.cache_clear()


def users(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".message.user").all_inner_texts()]


def test_the_next_message_goes_to_a_new_service_with_all_of_the_conversation(
    lasting_page: Page, service: Service
) -> None:
    page = lasting_page
    visit(page, service.site)
    most_tokens(page, 4)
    ask(page, "Where is my kettle?")
    page.locator(".facts").wait_for()
    first = page.locator(".message.bot").first.inner_text()
    page.evaluate("window.same = true")
    service.again()
    ask(page, "And my lamp?")
    page.locator(".facts").nth(1).wait_for()
    assert users(page) == ["Where is my kettle?", "And my lamp?"]
    assert page.locator(".message.bot").first.inner_text() == first
    heard = told(service.site)
    assert "Where is my kettle?" in heard and first.split("depth")[0].strip() in heard, (
        "the new engine is told all of it"
    )
    page.get_by_label("Submit").wait_for()
    assert page.get_by_label("Message", exact=True).is_enabled()
    assert page.evaluate("window.same"), "the page was not loaded anew"
    wait_until_kept(page, service.site, page.locator(".facts").nth(1).inner_text())
    visit(page, service.site)
    page.locator(".facts").nth(1).wait_for()
    assert users(page) == ["Where is my kettle?", "And my lamp?"], "and the browser keeps it whole"
    page.goto("about:blank")


def test_a_message_that_is_sent_while_no_service_is_there_is_answered_when_one_is(
    lasting_page: Page, service: Service
) -> None:
    page = lasting_page
    visit(page, service.site)
    most_tokens(page, 4)
    service.end()
    ask(page, "Is anybody there?")
    page.get_by_role("status").get_by_text(LOST).wait_for()
    page.locator(".message.user").get_by_text("Is anybody there?").wait_for()
    service.begin()
    page.locator(".facts").wait_for()
    assert "Is anybody there?" in told(service.site) and len(service.site.client.requests) == 1
    until(page, lambda: not page.get_by_text(LOST).is_visible())
    page.get_by_label("Submit").wait_for()
    page.goto("about:blank")


def test_an_answer_that_a_service_takes_along_is_begun_anew_by_the_next(lasting_page: Page, service: Service) -> None:
    page = lasting_page
    visit(page, service.site)
    most_tokens(page, 30)
    service.site.client.most = 10
    ask(page, "How deep is the sea?")
    words(page, ".message.bot")
    service.end()
    page.get_by_role("status").get_by_text(LOST).wait_for()
    service.begin()
    assert " · 30 tokens · " in page.locator(".facts").inner_text()
    assert users(page) == ["How deep is the sea?"] and page.locator(".message.bot").count() == 1
    page.get_by_label("Submit").wait_for()
    page.goto("about:blank")


def test_a_message_to_a_service_that_is_stopping_is_answered_by_the_next(lasting_page: Page, service: Service) -> None:
    page = lasting_page
    visit(page, service.site)
    most_tokens(page, 4)
    service.site.drain.close()
    ask(page, "Is anybody there?")
    page.get_by_text("The service takes no question now, and is asked again").wait_for()
    service.again()
    page.locator(".facts").wait_for()
    assert "Is anybody there?" in told(service.site) and page.locator(".message.bot").count() == 1
    page.goto("about:blank")


def test_a_service_that_comes_with_keys_makes_an_open_page_ask_for_one(lasting_page: Page, service: Service) -> None:
    page = lasting_page
    visit(page, service.site)
    most_tokens(page, 4)
    service.again(ApiKeys(["sk-fish"]))
    ask(page, "Hello?")
    log_in(page, "sk-fish")
    page.get_by_text("fish · 4 layers").wait_for()
    most_tokens(page, 4)
    ask(page, "Hello again?")
    page.locator(".facts").wait_for()
    assert "Hello?" not in told(service.site)
    page.goto("about:blank")
