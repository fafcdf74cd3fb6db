"""Run below Python in an answer, in Debian's chromium: it runs in the service's sandbox, where that is wanted alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.browser.driving import ask, most_tokens, visit
from tests.browser.site import site
from tests.browser.test_access import in_both_schemes

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

SORT = """Here:
```python
def quicksort(numbers):
    if len(numbers) <= 1:
        return numbers
    pivot = numbers[0]
    return quicksort([n for n in numbers[1:] if n < pivot]) + [pivot] + quicksort([n for n in numbers[1:] if n >= pivot])
print("<b>sorted</b>", quicksort([3, 1, 2]))
```
It sorts."""
READS = "```python\nprint(open('/etc/passwd').read())\n```\n```text\nnot Python\n```"


def answered(page: Page, text: str, count: int) -> None:
    ask(page, text)
    page.locator(".facts").nth(count - 1).wait_for()
    page.get_by_label("Submit").wait_for()


@pytest.mark.drill
def test_python_of_an_answer_is_run_by_its_button_and_what_it_may_not_do_is_said(
    page: Page, strangers: list[str]
) -> None:
    with site(run_code=True) as here:
        visit(page, here)
        most_tokens(page, 16)
        with here.saying(SORT):
            answered(page, "Write quicksort in Python and explain.", 1)
        run = page.get_by_role("button", name="Run", exact=True)
        run.focus()
        page.keyboard.press("Enter")
        page.get_by_text("<b>sorted</b> [1, 2, 3]", exact=True).wait_for()
        assert page.locator(".program b").count() == 0, "what a program prints is text"
        assert in_both_schemes(page) == []
        with here.saying(READS):
            answered(page, "Read a file.", 2)
        assert run.count() == 2, "one for each block of Python, and none for another"
        run.nth(1).click()
        page.locator(".program .fault", has_text="PermissionError").wait_for()
        assert "root:" not in page.content()
        assert page.get_by_text("<b>sorted</b> [1, 2, 3]", exact=True).is_visible(), "the first result is still there"
        page.goto("about:blank")


@pytest.mark.drill
def test_the_page_of_code_has_the_button_too(page: Page, strangers: list[str]) -> None:
    with site(run_code=True) as here:
        visit(page, here, "code")
        most_tokens(page, 16)
        with here.saying(SORT):
            answered(page, "Write quicksort in Python and explain.", 1)
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("<b>sorted</b> [1, 2, 3]", exact=True).wait_for()
        page.goto("about:blank")


@pytest.mark.drill
def test_a_service_that_was_not_told_to_runs_nothing_and_shows_no_button(page: Page, strangers: list[str]) -> None:
    with site() as here:
        visit(page, here)
        most_tokens(page, 16)
        with here.saying(SORT):
            answered(page, "Write quicksort in Python and explain.", 1)
        page.locator(".bot pre code").wait_for()
        assert page.get_by_role("button", name="Run", exact=True).count() == 0
        assert httpx.post(f"{here.url}/v1/shoal/programs", json={"program": "print(1)"}).status_code == 404
        page.goto("about:blank")
