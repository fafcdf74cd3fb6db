"""Pictures of the pages for the documentation: ``python ui/screenshot.py --url http://127.0.0.1:8000 --page compare``.

Needs Debian's chromium (tests/browser/install.sh) and a service that runs, for the training page one with ``--runs``.
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
CUSTOMER = ["The chair you sent me is broken."]
DEPTHS = ["auto", "full"]  # of the messages, in turn
WITHIN = "auto, may lose 0.2 nats a token"  # the third answer of a comparison


def main() -> int:
    parser = argparse.ArgumentParser(description="Takes a picture of a page.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the service runs, without /ui")
    parser.add_argument("--page", choices=sorted(PAGES), default="chat", help="what to show [chat]")
    parser.add_argument("--out", type=Path, help="PNG to write [docs/images/PAGE.png]")
    parser.add_argument("--ask", action="append", help="a message; repeat for a chat [one of a customer]")
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium: run tests/browser/install.sh", file=sys.stderr)
        return 1
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 760}, device_scale_factor=1)
        page.set_default_timeout(MILLISECONDS)
        try:
            PAGES[given.page](page, f"{given.url}/ui", given.ask or CUSTOMER)
            page.wait_for_timeout(500)  # the page scrolls to the answer
            picture = page.screenshot(full_page=True)
        except Error as error:
            print(f"the page at {given.url}/ui: {error.message.splitlines()[0]}", file=sys.stderr)
            return 1
        finally:
            browser.close()
    out = given.out or Path(f"docs/images/{given.page}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")
    return 0


def chat(page: Page, pages: str, messages: list[str]) -> None:
    """Sends `messages` one after the other, each at its depth, and waits for each answer."""
    page.goto(pages)
    page.get_by_text("tokens of context").wait_for()
    for number, message in enumerate(messages):
        page.get_by_label(f"{DEPTHS[number % len(DEPTHS)]},").check()
        page.get_by_label("Message", exact=True).fill(message)
        page.keyboard.press("Enter")
        answered(page, number)


def compare(page: Page, pages: str, messages: list[str]) -> None:
    """The first of `messages` as the page begins, of two models, or at two depths of the only one; and within a tolerance."""
    page.goto(f"{pages}/compare")
    page.locator(".about").wait_for()
    page.get_by_label("3", exact=True).check()
    page.get_by_label("Depth of C").click()
    page.get_by_role("option", name=WITHIN).click()
    page.get_by_label("one after another").check()
    page.get_by_label("Prompt").fill(messages[0])
    page.get_by_role("button", name="Compare").click()
    answered(page, 2)


def training(page: Page, pages: str, _: list[str]) -> None:
    """The run that ended first: of the quickstart, the pretraining."""
    page.goto(f"{pages}/training")
    page.locator(".tile").first.wait_for()
    page.locator("#run label").last.click()
    name = page.locator("#run label").last.inner_text().split(" · ")[0]
    page.get_by_role("heading", name=name, exact=True).wait_for()


def service(page: Page, pages: str, _: list[str]) -> None:
    page.goto(f"{pages}/service")
    page.locator(".tile").first.wait_for()


PAGES = {"chat": chat, "compare": compare, "training": training, "service": service}


def answered(page: Page, number: int) -> None:
    """Waits for the `number`-th answer. Raises Error with what the page says instead."""
    page.locator(".facts, .fault").nth(number).wait_for()
    if page.locator(".fault").count():
        raise Error(page.locator(".fault").first.inner_text())


if __name__ == "__main__":
    sys.exit(main())
