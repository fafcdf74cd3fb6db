"""A picture of the chat page with a question answered: ``python ui/screenshot.py --url http://127.0.0.1:8000 --out chat.png``.

Needs Debian's chromium (tests/browser/install.sh) and a service that runs.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Error, Page, sync_playwright

COLOURS = 128  # of the picture's palette: enough for a page, and a third of the size
MILLISECONDS = 60_000  # for each step
ASKED = ["For how long is my kettle guaranteed?", "The chair you sent me is broken."]
DEPTHS = ["full", "auto"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Takes a picture of the chat page.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service runs, without /ui")
    parser.add_argument("--out", type=Path, default=Path("docs/images/chat.png"))
    parser.add_argument("--ask", action="append", help="a message; repeat [two of a customer]")
    parser.add_argument("--depth", action="append", help="depth for each message in turn [full, then auto]")
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium: run tests/browser/install.sh", file=sys.stderr)
        return 1
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 720}, device_scale_factor=1)
        page.set_default_timeout(MILLISECONDS)
        try:
            talk(page, given.url, given.ask or ASKED, given.depth or DEPTHS)
            picture = page.screenshot()
        except Error as error:
            print(f"the page at {given.url}/ui: {error.message.splitlines()[0]}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(given.out, optimize=True)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB")
    return 0


def talk(page: Page, url: str, messages: list[str], depths: list[str]) -> None:
    """Sends `messages` one after the other, each at its depth, and waits for each answer."""
    page.goto(f"{url}/ui")
    page.get_by_text("tokens of context").wait_for()
    for number, message in enumerate(messages):
        if number < len(depths):
            page.get_by_label(f"{depths[number]},").check()
        page.locator("textarea").fill(message)
        page.keyboard.press("Enter")
        answered(page, number)
    page.wait_for_timeout(500)  # the page scrolls to the answer


def answered(page: Page, number: int) -> None:
    """Waits for the `number`-th answer. Raises Error with what the page says instead."""
    page.locator(".facts, .fault").nth(number).wait_for()
    if page.locator(".fault").count():
        raise Error(page.locator(".fault").first.inner_text())


if __name__ == "__main__":
    sys.exit(main())
