"""The comparison, the training runs and the service in Debian's chromium, over the real API and the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from shoal.inputs.chat import Encoded
from tests.browser.driving import most_tokens, until, visit, words
from tests.browser.runs import ENDED, LIVE, evaluation, say, step
from tests.browser.site import Site, site

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]


def answers(page: Page) -> list[Locator]:
    return [page.locator(f"#answer-{name}") for name in "ABCD"]


def test_one_prompt_is_answered_at_two_depths_side_by_side(page: Page, open_site: Site, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "teal.png")
    visit(page, open_site, "compare")
    most_tokens(page, 30)
    before = len(open_site.client.requests)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "teal.png")
    page.locator(".thumbnail-item, .thumbnail-image").first.wait_for()
    page.get_by_label("Prompt").fill("Which colour?")
    first, second, *_ = answers(page)
    with open_site.held(10):
        page.get_by_role("button", name="Compare").click()
        part = words(page, "#answer-A .answer")
        assert first.locator(".facts").count() == 0, "words are shown before the answer is complete"
    assert "depth shallow (1 of 4 layers) · 30 tokens" in first.locator(".facts").inner_text()
    assert "depth full (4 of 4 layers) · 30 tokens" in second.locator(".facts").inner_text()
    whole = first.locator(".answer").inner_text()
    assert whole.startswith(part) and len(whole) > len(part)
    sent = open_site.client.requests[before:]
    assert sorted(str(request.depth) for request in sent) == ["full", "shallow"]
    assert {request.sampling.seed for request in sent} == {1}
    assert all(isinstance(request.prompt, Encoded) and len(request.prompt.images) == 1 for request in sent)


def test_three_answers_one_after_another_and_stop_ends_them_all(page: Page, open_site: Site) -> None:
    visit(page, open_site, "compare")
    cancelled, before = open_site.stat("requests_cancelled_total"), len(open_site.client.requests)
    page.get_by_label("3", exact=True).check()
    page.get_by_label("one after another").check()
    most_tokens(page, 300)
    page.get_by_label("Prompt").fill("Go on and on.")
    with open_site.held(20):
        page.get_by_role("button", name="Compare").click()
        words(page, "#answer-A .answer")
        assert len(open_site.client.requests) == before + 1, "the second waits for the first"
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Compare").wait_for()
        until(page, lambda: open_site.stat("requests_cancelled_total") > cancelled)
    facts = words(page, "#answer-A .sofar")
    assert facts.startswith("depth shallow (1 of 4 layers) · ") and " s, stopped after " in facts
    assert [answer.locator(".facts").inner_text() for answer in answers(page)[1:3]] == ["stopped"] * 2
    assert open_site.stat("requests_cancelled_total") == cancelled + 1
    assert open_site.stat("num_requests_running") == 0 and len(open_site.client.requests) == before + 1
    assert len(answers(page)[0].locator(".answer").inner_text()) > 1, "what had come stays"


def test_a_running_training_is_followed_live(page: Page, open_site: Site, runs_folder: Path) -> None:
    page.goto(f"{open_site.url}/ui/training")
    page.get_by_role("heading", name=LIVE).wait_for()
    assert page.get_by_label(f"{LIVE} · running, 50%").is_checked()
    for chart in ("Loss, nats a token by step", "Held-out text, bits a byte by step", "Speed, tokens/s by step"):
        assert page.get_by_role("img", name=chart).is_visible()
    assert "Read so far: 15.0% image patches." in page.locator("#curves").inner_text()
    say(runs_folder, LIVE, step(51), evaluation(51))
    page.get_by_label(f"{LIVE} · running, 51%").wait_for()  # by itself
    page.get_by_label(f"{ENDED} · done").check()
    page.get_by_role("heading", name=ENDED).wait_for()
    assert "done" in page.locator(".run").inner_text()


def test_the_service_page_follows_what_the_engine_counts(page: Page, open_site: Site) -> None:
    visit(page, open_site, "compare")
    most_tokens(page, 3)
    page.get_by_label("Prompt").fill("hello")
    page.get_by_role("button", name="Compare").click()
    page.locator("#answer-B .facts").wait_for()
    visit(page, open_site, "service")
    page.locator("#service .tile").first.wait_for()
    shown = page.locator("#service").inner_text()
    assert "ready" in shown and "K/V memory used" in shown and "shallow, 1 layer" in shown
    counted = open_site.stat('request_success_total{finished_reason="length"}')
    assert counted >= 2
    ended = page.get_by_role("row", name="ended by length").get_by_role("cell")
    # by itself, where the first reading was of the second before
    until(page, lambda: ended.inner_text() == f"{counted:.0f}")


def test_the_service_page_says_when_a_replica_was_lost(page: Page, strangers: list[str]) -> None:
    with site() as alone:
        alone.client.told = {"num_replicas": 2.0, "num_replicas_starting": 0.0}
        page.goto(f"{alone.url}/ui/service")
        page.get_by_text("None was added, stopped or lost.").wait_for()
        alone.client.told = {"num_replicas": 1.0, "num_replicas_starting": 1.0}
        page.get_by_text("fish: 1 of 2 replicas lost, another starts, with 0 running, 0 waiting").wait_for()
        assert page.get_by_text("None was added, stopped or lost.").count() == 0
        page.goto("about:blank")
