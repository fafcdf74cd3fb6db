"""What a model says may be hostile, and so may a visitor: nothing is loaded from elsewhere, nothing is obeyed, and uploads
need a key and room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from shoal.api.auth import ApiKeys
from tests.browser.driving import ask, log_in, most_tokens, until, visit
from tests.browser.site import Site, site
from ui import uploads

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]

ELSEWHERE = "http://elsewhere.invalid"
FENCE = "```"
HOSTILE = f"""Look: ![a]({ELSEWHERE}/1.png) [![b][c]]({ELSEWHERE}/2) <img src={ELSEWHERE}/3.png>
<style>body {{ background: url({ELSEWHERE}/4.png); display: none }}</style>
{FENCE}html
<img src="{ELSEWHERE}/5.png" onerror="document.title='taken'">
{FENCE}
<form action="{ELSEWHERE}/6"><button id="taken">Log in</button></form>
<iframe src="{ELSEWHERE}/7"></iframe><video src="{ELSEWHERE}/8" poster="{ELSEWHERE}/9"></video>
<svg><image href="{ELSEWHERE}/10.png"/></svg><script>document.title = 'taken'</script>
~~~
{FENCE}
~~~
<img src="{ELSEWHERE}/11.png">
{FENCE}
- {FENCE}
<link rel="stylesheet" href="{ELSEWHERE}/12.css">

[c]: {ELSEWHERE}/13.png
"""
PICTURE = {"files": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "image/png")}


@pytest.mark.smoke
def test_a_hostile_answer_is_shown_and_loads_nothing(page: Page, open_site: Site) -> None:
    """The page's fixture fails for each request to another host, and for each that the policy had to refuse."""
    visit(page, open_site)
    most_tokens(page, 100)
    with open_site.saying(HOSTILE):
        ask(page, "Hello?")
        page.locator(".facts").wait_for()
        page.get_by_text("Log in").wait_for()
    chat = page.locator("#chat [data-testid=bot]")
    assert chat.locator("form, iframe, style, svg image, video, link, #taken, [src*=elsewhere]").count() == 0
    assert "taken" not in page.title() and page.locator("body").is_visible()
    for number in (1, 3, 5, 7, 12):
        assert chat.get_by_text(f"{ELSEWHERE}/{number}").count() > 0, "what was said is shown"
    page.goto(f"{open_site.url}/ui/compare")
    page.get_by_text("fish · 4 layers").wait_for()
    with open_site.saying(HOSTILE):
        page.get_by_label("Prompt").fill("hello")
        page.get_by_role("button", name="Compare").click()
        page.locator("#answer-B .facts").wait_for()
    assert page.locator("#answer-A").locator("form, img, iframe, style").count() == 0


def test_the_policy_stands_on_every_page_and_on_nothing_else(open_site: Site) -> None:
    for path in ("", "compare", "training", "service", "config"):
        assert "default-src 'self'" in httpx.get(f"{open_site.url}/ui/{path}").headers["content-security-policy"]
    assert "content-security-policy" not in httpx.get(f"{open_site.url}/v1/models").headers


def test_an_upload_needs_a_key_where_there_are_keys(page: Page, strangers: list[str]) -> None:
    with (
        site(ApiKeys(["sk-fish"])) as locked,
        httpx.Client(base_url=f"{locked.url}/ui/", follow_redirects=True) as browser,
    ):
        assert browser.post("gradio_api/upload", files=PICTURE).status_code == 401
        browser.post("login", data={"key": "sk-no"})
        assert browser.post("gradio_api/upload", files=PICTURE).status_code == 401
        browser.post("login", data={"key": "sk-fish"})
        assert browser.post("gradio_api/upload", files=PICTURE).status_code == 200


def test_uploads_are_bounded_in_number(open_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    cookies = httpx.get(f"{open_site.url}/ui/").cookies

    def upload() -> int:
        return httpx.post(f"{open_site.url}/ui/gradio_api/upload", files=PICTURE, cookies=cookies).status_code

    assert upload() == 200
    monkeypatch.setattr(uploads, "MOST_FILES", 1)
    assert upload() == 507
    monkeypatch.setattr(uploads, "MOST_FILES", 10**6)
    monkeypatch.setattr(uploads, "MOST_BYTES", 10)
    assert upload() == 507


def test_a_picture_is_uploaded_with_the_key_of_the_page(page: Page, strangers: list[str]) -> None:
    with site(ApiKeys(["sk-fish"])) as locked:
        page.goto(f"{locked.url}/ui/")
        log_in(page, "sk-fish")
        page.get_by_text("fish · 4 layers").wait_for()
        page.locator("#chat").get_by_text("What colour is this shape?").wait_for()
        page.locator("input[type=file]").first.set_input_files("ui/shape.png")
        page.locator(".thumbnail-item, .thumbnails").first.wait_for()
        most_tokens(page, 4)
        ask(page, "What is this?")
        page.locator(".facts").wait_for()
        until(page, lambda: locked.client.requests[-1].prompt.patches is not None)  # type: ignore[union-attr]
        page.goto("about:blank")
