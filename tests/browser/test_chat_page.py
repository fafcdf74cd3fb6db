"""The chat pages in Debian's chromium, over the real API and the real engine: what a user does, and what must not happen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from shoal.api.auth import ApiKeys
from shoal.inputs.chat import Encoded
from tests.browser.driving import ask, log_in, most_tokens, open_settings, told, until, visit, wait_until_kept, words
from tests.browser.site import Site, site

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

KEY = "a-key-for-this-test"
CONVERSATIONS = """() => Object.keys(localStorage).filter((name) => name.startsWith('shoal-chat-:'))
  .map((name) => JSON.parse(localStorage.getItem(name)))"""


def test_an_answer_streams_in_with_its_depth_below_it(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    page.get_by_label("shallow, 1 of 4 layers").check()
    most_tokens(page, 60)
    with open_site.held(20):
        ask(page, "How deep is the sea?")
        part = words(page, ".message.bot")
        assert page.locator(".facts").count() == 0, "the first words are shown before the answer is complete"
    facts = page.locator(".facts").inner_text()
    whole = page.locator(".message.bot").inner_text().strip()
    assert facts.startswith("depth shallow (1 of 4 layers) · 60 tokens · ") and "tokens/s · first after" in facts
    assert whole.startswith(part) and len(whole.split("depth")[0].strip()) > len(part)
    assert open_site.client.requests[-1].depth == "shallow"
    ask(page, "And now?")
    page.locator(".facts").nth(1).wait_for()
    said = told(open_site)
    assert "How deep is the sea?" in said and "And now?" in said and "tokens/s" not in said


@pytest.mark.drill
def test_a_picture_is_uploaded_and_seen_by_the_model(page: Page, open_site: Site, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "teal.png")
    visit(page, open_site)
    most_tokens(page, 8)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "teal.png")
    page.locator(".thumbnail-item, .thumbnail-image").first.wait_for()
    ask(page, "which colour?")
    page.locator(".facts").wait_for()
    picture = page.locator(".message.user img")
    assert picture.evaluate("image => image.naturalWidth") == 40  # it is shown as well
    prompt = open_site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded) and len(prompt.images) == 1


@pytest.mark.smoke
@pytest.mark.drill
def test_stop_ends_the_answer_and_frees_the_engine(page: Page, open_site: Site) -> None:
    cancelled = open_site.stat("requests_cancelled_total")
    visit(page, open_site)
    most_tokens(page, 300)
    with open_site.held(20):
        ask(page, "Go on and on.")
        words(page, ".message.bot")
        page.get_by_label("Stop").click()
        until(page, lambda: open_site.stat("requests_cancelled_total") > cancelled)
    assert open_site.stat("requests_cancelled_total") == cancelled + 1
    assert open_site.stat("num_requests_running") == 0
    page.get_by_label("Submit").wait_for()
    facts = words(page, ".sofar")
    assert facts.startswith("depth full (4 of 4 layers) · ") and "tokens/s · first after" in facts
    assert re.search(r" · ([1-9]|1\d|20) tokens? · .* stopped after ", facts), facts
    most_tokens(page, 4)
    ask(page, "Thank you.")
    page.locator(".facts").wait_for()
    assert words(page, ".sofar") == facts, "what was known of it stays, too"
    assert "Go on and on." in told(open_site), "what was said before the stop stays part of the conversation"


@pytest.mark.drill
def test_a_page_that_was_left_in_the_middle_of_an_answer_says_so(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 300)
    with open_site.held(20):
        ask(page, "Go on and on.")
        page.locator(".sofar").get_by_text(" 20 tokens ").wait_for(state="attached")
        page.wait_for_function("() => document.querySelector('#earlier input').value === 'Go on and on.'")
        page.wait_for_timeout(1500)  # the last words are kept as well
        visit(page, open_site)
    facts = words(page, ".facts")
    assert facts.startswith("depth full") and "stopped" not in facts
    assert re.search(r" tokens? · .*, cut off after [\d.]+ s, when the page was left$", facts), facts


@pytest.mark.drill
def test_retry_and_undo_do_what_they_say_and_nothing_while_an_answer_comes(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    ask(page, "Where is my kettle?")
    page.locator(".facts").wait_for()
    before = len(open_site.client.requests)
    page.locator("button[aria-label=Retry]").click()
    until(page, lambda: len(open_site.client.requests) == before + 1)
    page.locator(".facts").wait_for()
    page.get_by_label("Submit").wait_for()
    with open_site.held(2):
        ask(page, "And my lamp?")
        page.locator(".sofar").get_by_text(" 2 tokens ").wait_for(state="attached")
        page.evaluate(
            "() => { for (const name of ['Retry', 'Undo']) document.querySelector(`[aria-label=${name}]`)?.click(); }"
        )
        assert page.get_by_label("Stop").is_visible()
    page.locator(".facts").nth(1).wait_for()
    page.get_by_label("Submit").wait_for()
    assert len(open_site.client.requests) == before + 2 and page.locator(".message.user").count() == 2
    page.locator("button[aria-label=Undo]").click()
    until(page, lambda: page.get_by_label("Message", exact=True).input_value() == "And my lamp?")
    assert page.locator(".message.user").count() == page.locator(".message.bot").count() == 1
    page.get_by_label("Message", exact=True).fill("  ")
    page.keyboard.press("Enter")
    ask(page, "And my lamp?")
    page.locator(".facts").nth(1).wait_for()
    assert "Where is my kettle?" in told(open_site) and len(open_site.client.requests) == before + 3, (
        "a blank is no question"
    )


@pytest.mark.drill
def test_another_conversation_ends_the_answer_of_the_one_before(page: Page, open_site: Site) -> None:
    cancelled = open_site.stat("requests_cancelled_total")
    visit(page, open_site)
    most_tokens(page, 300)
    with open_site.held(20):
        ask(page, "Go on and on.")
        words(page, ".message.bot")
        page.get_by_role("button", name="New chat").click()
        page.locator("#chat .example").first.wait_for()
        until(page, lambda: open_site.stat("requests_cancelled_total") == cancelled + 1)
    most_tokens(page, 4)
    ask(page, "Hello?")
    page.locator(".facts").wait_for()
    assert page.locator(".message.user").all_inner_texts() == ["Hello?"]


@pytest.mark.drill
def test_a_tab_that_is_closed_frees_the_engine(page: Page, open_site: Site) -> None:
    cancelled = open_site.stat("requests_cancelled_total")
    tab = page.context.new_page()
    visit(tab, open_site)
    most_tokens(tab, 300)
    with open_site.held(20):
        ask(tab, "Go on and on.")
        tab.locator(".sofar").get_by_text(" 20 tokens ").wait_for(state="attached")  # no further words come
        tab.close()
        until(page, lambda: open_site.stat("requests_cancelled_total") == cancelled + 1)
    assert open_site.stat("num_requests_running") == 0


@pytest.mark.drill
def test_what_is_set_reaches_the_engine_and_the_curl_command(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 5)
    temperature = page.get_by_label("number input for Temperature")
    temperature.fill("0.7")
    temperature.press("Tab")
    open_settings(page)
    assert page.get_by_label("Seed").input_value() == page.get_by_label("Tolerance").input_value() == ""
    page.get_by_label("System prompt").fill("Speak like a fish.")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Tolerance").fill("0.25")
    top_p = page.get_by_label("number input for Top-p")
    top_p.fill("0.9")
    top_p.press("Tab")
    ask(page, "Who are you?")
    page.locator(".facts").wait_for()
    request = open_site.client.requests[-1]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.7, 0.9, 7)
    assert request.quality_tolerance == 0.25 and "Speak like a fish." in told(open_site)
    page.get_by_role("button", name="The last request as curl").click()
    command = page.locator("#curl .cm-content").inner_text()
    assert f"{open_site.url}/v1/chat/completions" in command and '"quality_tolerance": 0.25' in command
    assert "Who are you?" in command and "Authorization" not in command


@pytest.mark.drill
def test_conversations_are_kept_in_the_browser_and_exported(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    ask(page, "The first one.")
    page.locator(".facts").wait_for()
    facts, said = page.locator(".facts").inner_text(), page.locator(".message.bot").inner_text()
    page.wait_for_function("() => document.querySelector('#earlier input').value === 'The first one.'")
    wait_until_kept(page, open_site, facts)
    visit(page, open_site)  # again: it is there
    page.locator(".facts").wait_for()
    assert (page.locator(".facts").inner_text(), page.locator(".message.bot").inner_text()) == (facts, said)
    page.get_by_role("button", name="New chat").click()
    page.locator("#chat .example").first.wait_for()
    most_tokens(page, 4)
    ask(page, "The second one.")
    page.locator(".facts").wait_for()
    assert "The first one." not in told(open_site)
    page.wait_for_function("() => document.querySelector('#earlier input').value === 'The second one.'")
    wait_until_kept(page, open_site, page.locator(".facts").inner_text())
    page.get_by_label("Submit").wait_for()  # what comes after an answer takes the focus, and would close a list
    page.get_by_label("Conversations").click()
    page.get_by_role("option", name="The first one.").click()
    page.locator(".message.user").get_by_text("The first one.").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    row = json.loads(download.value.path().read_text())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"] == "The first one." and row["messages"][1]["content"] in said
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as Markdown").click()
    assert facts in download.value.path().read_text()
    visit(page, open_site, "code")
    assert page.locator(".message").count() == 0, "each page keeps its own conversations"


@pytest.mark.drill
def test_two_tabs_keep_what_each_says_also_of_one_conversation(page: Page, open_site: Site) -> None:
    def answered(tab: Page, text: str, count: int) -> None:
        tab.bring_to_front()  # behind another tab a page draws, and keeps, nothing
        most_tokens(tab, 4)
        ask(tab, text)
        tab.locator(".facts").nth(count - 1).wait_for()
        tab.get_by_label("Submit").wait_for()
        until(tab, lambda: any(each[-2:-1] == [text] for each in kept(tab)))

    def kept(tab: Page) -> list[list[str]]:
        """The texts of each conversation, answers as they are."""
        return [[message["text"] for message in chat["messages"]] for chat in tab.evaluate(CONVERSATIONS)]

    other = page.context.new_page()
    visit(page, open_site)
    visit(other, open_site)
    answered(page, "Of the first tab.", 1)
    answered(other, "Of the second.", 1)
    assert sorted(each[0] for each in kept(page)) == ["Of the first tab.", "Of the second."]
    visit(page, open_site)  # now it shows what the second shows
    page.locator(".message.user").get_by_text("Of the second.").wait_for()
    answered(page, "On here.", 2)
    answered(other, "On there.", 2)
    answered(other, "And on.", 3)
    asked = sorted(each[::2] for each in kept(page))
    first, here, there = (
        ["Of the first tab."],
        ["Of the second.", "On here."],
        ["Of the second.", "On there.", "And on."],
    )
    assert asked == [first, here, there]
    page.bring_to_front()
    page.get_by_role("button", name="New chat").click()
    page.locator("#chat .example").first.wait_for()
    other.close()
    visit(page, open_site)
    assert sorted(each[::2] for each in kept(page)) == asked
    assert told(open_site).count("Of the second.") == 1


@pytest.mark.drill
def test_an_error_of_the_api_is_one_line_and_the_chat_goes_on(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    ask(page, "This does not fit. " * 200)
    line = page.get_by_role("alert").inner_text()
    assert "The conversation does not fit the model's 384 tokens of context" in line and "\n" not in line
    most_tokens(page, 4)
    ask(page, "This does.")
    page.locator(".facts").wait_for()
    assert "does not fit" not in told(open_site)


@pytest.mark.drill
def test_a_server_with_keys_asks_for_one_and_the_browser_remembers_it(page: Page, strangers: list[str]) -> None:
    with site(ApiKeys([KEY])) as locked:
        page.goto(f"{locked.url}/ui/service")
        log_in(page, "sk-no")
        page.get_by_role("alert").get_by_text("none of the server's API keys").wait_for()
        log_in(page, KEY)
        page.get_by_role("row", name="cancelled").wait_for()
        assert page.url == f"{locked.url}/ui/service" and page.get_by_role("alert").count() == 0
        page.goto(f"{locked.url}/ui/")
        page.get_by_text("fish · 4 layers").wait_for()
        most_tokens(page, 4)
        ask(page, "hello")
        page.locator(".facts").wait_for()
        visit(page, locked, "compare")
        assert KEY not in page.evaluate("() => document.cookie + JSON.stringify(localStorage)"), (
            "scripts cannot read it"
        )
        page.get_by_role("link", name="Log out").click()
        page.goto(f"{locked.url}/ui/compare")
        page.get_by_label("API key").wait_for()
        page.goto("about:blank")
