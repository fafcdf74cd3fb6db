"""What is asked on a page is answered, however late the page reads what the server sent (`ui/stream.js`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.driving import ask, most_tokens, until, visit, words
from tests.browser.site import Site

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request

pytestmark = [pytest.mark.browser, pytest.mark.drill]

STREAM = "/queue/data"  # of answers
FROM = "const from = (asked, path) => new URL(asked.url ?? asked, location).pathname.endsWith(path);"
# The last message of a stream, that it has ended, comes late: between `hold()` and `release()` it does not come.
LATE_END = """(() => {
  window.ends = 0;
  window.held = false;
  let gate;
  window.hold = () => { gate = new Promise((open) => { window.release = open; }); };
  const late = () => new TransformStream({ async transform(text, out) {
    const end = text.search(/data: .*close_stream/);
    if (end < 0) return out.enqueue(text);
    out.enqueue(text.slice(0, end));
    window.held = gate !== undefined;
    await gate;
    out.enqueue(text.slice(end));
    window.ends += 1;
  } });
  let below = window.fetch;
  const above = async (asked, options) => {
    const reply = await below(asked, options);
    if (!from(asked, '/queue/data')) return reply;
    const text = reply.body.pipeThrough(new TextDecoderStream()).pipeThrough(late());
    return new Response(text.pipeThrough(new TextEncoderStream()));
  };
"""
TO_THE_SCRIPT = f"{LATE_END} {FROM} window.fetch = above; }})()"
TO_THE_CLIENT = f"""{LATE_END} {FROM}
  let seen = below;
  Object.defineProperty(window, 'fetch', {{ get: () => seen, set: (script) => {{ below = script; seen = above; }} }});
}})()"""
SECOND_REPLY_LATE = f"""(() => {{ {FROM}
  const below = window.fetch;
  const late = new Promise((open) => {{ window.release = open; }});
  let count = 0;
  window.fetch = async (asked, options) => {{
    const second = from(asked, '/queue/join') && ++count === 2;
    const reply = await below(asked, options);
    if (second) await late;
    return reply;
  }};
}})()"""


@pytest.mark.parametrize("late", [TO_THE_SCRIPT, TO_THE_CLIENT], ids=["to the script", "to Gradio's client"])
def test_what_is_asked_before_the_end_of_the_last_stream_was_read_is_answered(
    page: Page, open_site: Site, late: str
) -> None:
    page.add_init_script(late)
    visit(page, open_site, "compare")
    page.wait_for_function("ends === 1")
    page.evaluate("hold()")
    page.get_by_label("3", exact=True).check()
    page.get_by_label("Depth of C").wait_for()
    page.wait_for_function("held")
    with page.expect_response("**/queue/join?") as reply:
        page.get_by_label("4", exact=True).check()
    reply.value.finished()
    page.evaluate("release()")
    page.get_by_label("Depth of D").wait_for()


def test_a_reply_that_comes_after_its_answer_leaves_no_stream_open(page: Page, open_site: Site) -> None:
    asked: list[Request] = []
    ended: list[Request] = []
    page.on("request", lambda request: asked.append(request) if STREAM in request.url else None)
    page.on("requestfinished", lambda request: ended.append(request) if STREAM in request.url else None)
    page.add_init_script(SECOND_REPLY_LATE)
    page.goto(f"{open_site.url}/ui/")
    until(page, lambda: 0 < len(ended) == len(asked))
    page.evaluate("release()")
    page.get_by_text("fish · 4 layers").wait_for()
    most_tokens(page, 4)
    ask(page, "hello")
    page.locator(".facts").wait_for()
    page.get_by_label("Submit").wait_for()
    until(page, lambda: len(asked) == len(ended))


def test_an_answer_goes_on_when_the_page_was_to_be_left_and_stays(page: Page, open_site: Site) -> None:
    page.route("**/nothing", lambda route: route.fulfill(status=204))
    visit(page, open_site, "compare")
    most_tokens(page, 60)
    page.get_by_label("Prompt").fill("How deep is the sea?")
    with open_site.held(20):
        page.get_by_role("button", name="Compare").click()
        words(page, "#answer-B .answer")
        with page.expect_response("**/nothing"):
            page.evaluate("location.href = '/nothing'")
    assert " · 60 tokens · " in page.locator("#answer-B .facts").inner_text()
