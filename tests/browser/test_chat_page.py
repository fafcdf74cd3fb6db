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
from tests.browser.driving import ask, most_tokens, told, until, visit, words
from tests.browser.site import Site, site

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.browser

KEY = "a-key-for-this-test"
WRITTEN = """
  window.written = [];
  const write = Storage.prototype.setItem;
  Storage.prototype.setItem = function (name, value) { written.push(name); write.call(this, name, value); };
"""


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


@pytest.mark.parametrize(
    "example", ["Where is my kettle?", "Write a function", "What colour is this shape?", "Summarise a function"]
)
def test_each_example_is_answered(page: Page, open_site: Site, example: str) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    page.locator("#chat").get_by_text(example).click()
    page.locator(".facts").wait_for()
    prompt = open_site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded) and len(prompt.images) == (example == "What colour is this shape?")


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


def test_what_is_set_reaches_the_engine_and_the_curl_command(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 5)
    temperature = page.get_by_label("number input for Temperature")
    temperature.fill("0.7")
    temperature.press("Tab")
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("System prompt").fill("Speak like a fish.")
    assert page.get_by_label("Seed").input_value() == page.get_by_label("Tolerance").input_value() == ""
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


def test_conversations_are_kept_in_the_browser_and_exported(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    ask(page, "The first one.")
    page.locator(".facts").wait_for()
    facts, said = page.locator(".facts").inner_text(), page.locator(".message.bot").inner_text()
    page.wait_for_function("() => document.querySelector('#earlier input').value === 'The first one.'")
    _wait_until_kept(page, open_site, facts)
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
    _wait_until_kept(page, open_site, page.locator(".facts").inner_text())
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


def test_a_page_that_opens_writes_no_conversations(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    ask(page, "Keep this.")
    _wait_until_kept(page, open_site, page.locator(".facts").inner_text())
    page.add_init_script(WRITTEN)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/queue/join" in request.url else None)
    for path, events in (("", 6), ("code", 4)):  # with a conversation, and without
        asked.clear()
        visit(page, open_site, path)
        until(page, lambda events=events: len(asked) >= events)  # type: ignore[misc]
        written = page.evaluate("written")
        assert len(written) == len(set(written)), "only what Gradio writes itself when it has read it"


def _wait_until_kept(page: Page, site: Site, facts: str) -> None:
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


def test_an_assistant_tells_the_model_who_it_is_and_medicine_tells_the_reader_what_it_is_not(
    page: Page, open_site: Site
) -> None:
    visit(page, open_site, "medicine")
    assert page.get_by_role("note").inner_text().startswith("This is no medical advice.")
    most_tokens(page, 4)
    page.locator("#chat").get_by_text("What does hypertension mean?").click()
    page.locator(".facts").wait_for()
    assert "You do not diagnose" in told(open_site) and "hypertension" in told(open_site)
    assert page.get_by_role("note").is_visible()


def test_a_seed_that_is_no_number_is_refused_in_one_line(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    page.get_by_role("button", name="More settings").click()
    page.get_by_label("Seed").fill("seven")
    asked = len(open_site.client.requests)
    ask(page, "hello")
    page.locator(".fault").get_by_text("Seed is 'seven', but must be a whole number from 0, or empty.").wait_for()
    assert len(open_site.client.requests) == asked


def test_an_error_of_the_api_is_one_line_and_the_chat_goes_on(page: Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 383)
    ask(page, "This does not fit.")
    line = page.get_by_role("alert").inner_text()
    assert "this model's maximum context length is 384 tokens" in line and "\n" not in line
    most_tokens(page, 4)
    ask(page, "This does.")
    page.locator(".facts").wait_for()
    assert "does not fit" not in told(open_site)


def test_a_server_with_keys_asks_for_one_and_the_browser_remembers_it(page: Page, strangers: list[str]) -> None:
    with site(ApiKeys([KEY])) as locked:
        page.goto(f"{locked.url}/ui/service")
        page.get_by_role("alert").get_by_text("write it in the box for the API key").wait_for()
        held: list[Route] = []
        # a reading is asked for without a key, and answered when there is one
        page.route("**/queue/join?*", lambda route: route.continue_() if held else held.append(route))
        until(page, lambda: bool(held))
        page.get_by_label("API key").fill(KEY)
        with page.expect_request("**/queue/join?*"):  # the next reading, so that one was answered
            held[0].continue_()
        page.get_by_label("API key").press("Enter")
        page.get_by_role("row", name="cancelled").wait_for()
        assert page.get_by_role("alert").count() == 0
        page.goto(f"{locked.url}/ui/")
        page.get_by_text("fish · 4 layers").wait_for()
        most_tokens(page, 4)
        ask(page, "hello")
        page.locator(".facts").wait_for()
        visit(page, locked, "compare")
        assert page.get_by_label("API key").input_value() == KEY
        page.goto("about:blank")
