"""The chat page in Debian's chromium, over the real API and the real engine: what a user does, and what must not happen."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from shoal import Engine, Model, Request
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.page import chat_page
from shoal.api.served import ServedModel
from shoal.api.server import serving
from shoal.api.service import Hosted
from shoal.engine.events import Event
from shoal.engine.front import AsyncEngine
from shoal.inputs.chat import Encoded

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

WAIT = 20_000  # milliseconds
KEY = "a-key-for-this-test"


@dataclass
class Readable:
    """An engine whose random model says only letters, at the pace of a larger one: something to see on a page."""

    engine: AsyncEngine
    model: Model
    requests: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        self.requests.append(request)
        letters = {i for i in range(self.model.config.vocab) if self.model.tokenizer.token_bytes(i).isalpha()}
        bias = {i: -100.0 for i in range(self.model.config.vocab) if i not in letters}
        async for event in self.engine.generate(replace(request, sampling=replace(request.sampling, logit_bias=bias))):
            await asyncio.sleep(0.02)
            yield event

    async def stats(self) -> dict[str, float]:
        return await self.engine.stats()

    async def check_health(self) -> None:
        await self.engine.check_health()


@dataclass
class Site:
    url: str
    client: Readable
    loop: asyncio.AbstractEventLoop

    def stat(self, name: str) -> float:
        return asyncio.run_coroutine_threadsafe(self.client.stats(), self.loop).result(10)[name]


@contextmanager
def site(keys: ApiKeys | None = None) -> Iterator[Site]:
    """The API with the page on it, in a thread of its own."""
    model = Model.from_preset("test", seed=3)
    served = ServedModel("fish", model.config, model.tokenizer, model.chat_template)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    started: list[Site] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        client = Readable(AsyncEngine(Engine(model)), model)
        page = chat_page(f"http://127.0.0.1:{port}/v1", "fish")
        async with serving(build_app([Hosted(served, client)], api_keys=keys, ui_mount=page), port=port) as running:
            started.append(Site(running.url, client, asyncio.get_running_loop()))
            ready.set()
            await asyncio.to_thread(stop.wait)
        await client.engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        yield started[0]
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture(scope="module")
def open_site() -> Iterator[Site]:
    with site() as started:
        yield started


@pytest.fixture(scope="module")
def chromium() -> Iterator[playwright.Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert os.environ.get("CI_BROWSER_REQUIRED") != "1", "CI must drive the page: no chromium was found"
        pytest.skip("no chromium: run tests/browser/install.sh")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: playwright.Browser) -> Iterator[playwright.Page]:
    """A page that must not log an error, throw, or ask any other host for anything."""
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(WAIT)
    wrong: list[str] = []
    page.on(
        "console",
        lambda message: message.type == "error" and wrong.append(f"console: {message.text} {message.location['url']}"),
    )
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", lambda request: _is_local(request.url) or wrong.append(f"request: {request.url}"))
    yield page
    page.close()
    assert wrong == []


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.hostname == "127.0.0.1" or parts.scheme in ("data", "blob")


def visit(page: playwright.Page, site: Site) -> None:
    page.goto(f"{site.url}/ui")
    page.get_by_text("fish · 4 layers").wait_for()  # the settings are then those of the model


def ask(page: playwright.Page, text: str) -> None:
    page.locator("textarea").fill(text)
    page.keyboard.press("Enter")


def most_tokens(page: playwright.Page, count: int) -> None:
    box = page.get_by_label("number input for Most tokens")
    box.fill(str(count))
    box.press("Tab")


def test_an_answer_streams_in_with_its_depth_below_it(page: playwright.Page, open_site: Site) -> None:
    visit(page, open_site)
    page.get_by_label("shallow, 1 of 4 layers").check()
    most_tokens(page, 60)
    ask(page, "How deep is the sea?")
    answer = page.locator(".message.bot").first
    page.wait_for_function(
        "() => { const m = document.querySelector('.message.bot'); return m && m.innerText.trim().length > 1 }"
    )
    part = answer.inner_text().strip()
    assert page.locator(".facts").count() == 0, "the first words are shown before the answer is complete"
    facts = page.locator(".facts").inner_text()
    whole = answer.inner_text().strip()
    assert facts.startswith("depth shallow (1 of 4 layers) · 60 tokens · ") and "tokens/s" in facts
    assert whole.startswith(part) and len(whole.split("depth")[0].strip()) > len(part)
    assert open_site.client.requests[-1].depth == "shallow"
    ask(page, "And now?")
    page.locator(".facts").nth(1).wait_for()
    prompt = open_site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded)
    said = open_site.client.model.tokenizer.decode(prompt.ids)
    assert "How deep is the sea?" in said and "And now?" in said and "tokens/s" not in said


def test_a_picture_is_uploaded_and_seen_by_the_model(page: playwright.Page, open_site: Site, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("example", ["Customer service", "Code", "Image question", "Summary"])
def test_each_example_is_answered(page: playwright.Page, open_site: Site, example: str) -> None:
    visit(page, open_site)
    most_tokens(page, 4)
    page.get_by_text(example).click()
    page.locator(".facts").wait_for()
    prompt = open_site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded) and len(prompt.images) == (example == "Image question")


def test_stop_ends_the_answer_and_frees_the_engine(page: playwright.Page, open_site: Site) -> None:
    cancelled = open_site.stat("requests_cancelled_total")
    visit(page, open_site)
    most_tokens(page, 300)
    ask(page, "Go on and on.")
    page.locator(".message.bot").first.wait_for()
    page.get_by_label("Stop").click()
    for _ in range(100):
        if open_site.stat("requests_cancelled_total") > cancelled:
            break
        page.wait_for_timeout(50)
    assert open_site.stat("requests_cancelled_total") == cancelled + 1
    assert open_site.stat("num_requests_running") == 0


def test_an_error_of_the_api_is_one_line_and_the_chat_goes_on(page: playwright.Page, open_site: Site) -> None:
    visit(page, open_site)
    most_tokens(page, 383)
    ask(page, "This does not fit.")
    line = page.get_by_role("alert").inner_text()
    assert "this model's maximum context length is 384 tokens" in line and "\n" not in line
    most_tokens(page, 4)
    ask(page, "This does.")
    page.locator(".facts").wait_for()
    prompt = open_site.client.requests[-1].prompt
    assert isinstance(prompt, Encoded)
    assert "does not fit" not in open_site.client.model.tokenizer.decode(prompt.ids)


def test_a_server_with_keys_asks_for_one(page: playwright.Page) -> None:
    with site(ApiKeys([KEY])) as locked:
        page.goto(f"{locked.url}/ui")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.get_by_text("fish · 4 layers").wait_for()
        most_tokens(page, 4)
        ask(page, "hello")
        page.locator(".facts").wait_for()
        page.goto("about:blank")
