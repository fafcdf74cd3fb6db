"""Debian's chromium, and pages of it that must not log an error, throw, or ask any other host for anything."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from shoal import Model
from shoal.loop.gate import Check
from shoal.loop.paired import FAIL, PASS
from shoal.loop.release import Release
from tests.browser.driving import SECONDS
from tests.browser.runs import LIVE, write_runs
from tests.browser.site import Site, site
from tests.neighbours import lend

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page


CHECK = Check("exact, frozen", PASS, "1 in 80 fewer", -0.012, -0.02, -0.004)


def verdict(passed: bool) -> dict[str, Any]:
    return {"passed": passed, "checks": [asdict(replace(CHECK, status=PASS if passed else FAIL))]}


def written_release(folder: Path) -> Release:
    """Version 1 serves, 2 was refused by the gate, and 3 passed it."""
    made = Release(folder / "release")
    for seed in (3, 4, 5):
        Model.from_preset("test", seed=seed).save(folder / str(seed))
        passed = seed != 4
        made.add(folder / str(seed), verdict=verdict(passed))
    return made


@contextmanager
def _watched() -> Iterator[list[str]]:
    found: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def checked_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not _is_this_machine(address[0]):
            found.append(str(address[0]))
        connect(self, address)

    def checked_look_up(host: Any, *more: Any, **named: Any) -> Any:
        if host and not _is_this_machine(host):
            found.append(str(host))
        return look_up(host, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked_connect)
        patch.setattr(socket, "getaddrinfo", checked_look_up)
        yield found


@contextmanager
def _driven(path: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def strangers(request: pytest.FixtureRequest) -> list[str]:
    """Hosts other than this machine that anything in this process, the page's own server included, tried to reach."""
    return lend(request, _watched())


@pytest.fixture(scope="session")
def written_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("runs")
    write_runs(folder)
    return folder


@pytest.fixture(scope="module")
def runs_folder(written_runs: Path) -> Path:
    """It has just spoken: after two minutes of silence the run that goes on would have stopped."""
    (written_runs / LIVE / "metrics.jsonl").touch()
    return written_runs


@pytest.fixture(scope="module")
def open_site(
    request: pytest.FixtureRequest, strangers: list[str], runs_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Site:
    pytest.importorskip("gradio")
    return lend(request, site(runs=runs_folder, release=written_release(tmp_path_factory.mktemp("release"))))


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest) -> Browser:
    pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert os.environ.get("CI_BROWSER_REQUIRED") != "1", "CI must drive the pages: no chromium was found"
        pytest.skip("no chromium: run tests/browser/install.sh")
    return lend(request, _driven(path))


@pytest.fixture
def page(chromium: Browser, strangers: list[str]) -> Iterator[Page]:
    with _page(chromium, strangers) as page:
        yield page


@pytest.fixture
def lasting_page(chromium: Browser, strangers: list[str]) -> Iterator[Page]:
    """A page that may outlive its server: the browser itself logs each request that gets no reply."""
    with _page(chromium, strangers, borne=("net::ERR_", "status of 503")) as page:
        yield page


@contextmanager
def _page(chromium: Browser, strangers: list[str], borne: tuple[str, ...] = ()) -> Iterator[Page]:
    # without motion: a colour that fades in has too little contrast half-way
    context = chromium.new_context(viewport={"width": 1200, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    wrong: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        if message.type == "error" and not any(text in message.text for text in borne):
            wrong.append(f"console: {message.text} {message.location['url']}")

    page.on("console", logged)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", lambda request: _is_local(request.url) or wrong.append(f"request: {request.url}"))
    yield page
    context.close()
    assert wrong == []
    assert strangers == [], "the server that makes the pages asked another host"


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.hostname == "127.0.0.1" or parts.scheme in ("data", "blob")


def _is_this_machine(host: str | bytes) -> bool:
    return (host.decode() if isinstance(host, bytes) else host) in ("127.0.0.1", "localhost", "::1")
