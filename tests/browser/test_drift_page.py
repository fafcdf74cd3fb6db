"""The page of drift in Debian's chromium: it follows what `shoal watch` sees, for keys that may."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from tests.browser.driving import log_in, log_in_anew
from tests.browser.site import site
from tests.browser.test_access import BROKEN, in_both_schemes
from tests.unit.loop.test_watch import Service, watch

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.drill]


def test_it_goes_from_nobody_who_watches_to_an_alarm_by_itself_and_axe_finds_nothing(
    page: Page, strangers: list[str], tmp_path: Path
) -> None:
    service = Service(tmp_path / "capture")
    keys = ApiKeys(["reader", "secret name=ann admin=yes"])
    with site(keys, capture=CaptureArgs(str(service.folder))) as locked:
        page.goto(f"{locked.url}/ui/drift")
        log_in(page, "reader")
        page.get_by_text("Not for this key").wait_for()
        log_in_anew(page, "secret")
        page.goto(f"{locked.url}/ui/drift")
        page.get_by_role("heading", name="Nobody watches yet").wait_for()
        service.serve(300)
        watch(service).look(service.now)
        page.get_by_text("Not yet enough: 300 of 500 sessions have come.").wait_for()
        service.serve(700)
        watch(service).look(service.now)
        page.get_by_text("Nothing has moved since").wait_for()
        service.serve(300, up=1.2)
        watch(service).look(service.now)
        page.get_by_role("alert").get_by_text("Alarm: a new domain since").wait_for()
        assert page.get_by_role("list").get_by_text("shoal curate").is_visible()
        assert page.get_by_role("img", name="Evidence, power of ten by sessions").is_visible()
        assert in_both_schemes(page) == []
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("() => document.scrollingElement.scrollWidth") <= 390 and page.evaluate(BROKEN) == []
        page.goto("about:blank")
