"""The stylesheet, as far as Gradio rewrites it: it puts a prefix before every selector, which it splits at each comma."""

from __future__ import annotations

import re

from ui.look import CSS


def test_no_rule_is_one_that_gradio_breaks() -> None:
    css = re.sub(r"/\*.*?\*/", "", CSS.read_text(encoding="utf-8"), flags=re.DOTALL)
    selectors = [selector.strip() for selector in re.findall(r"([^{}]+)\{", css)]
    assert len(selectors) > 50
    for selector in selectors:
        assert not re.search(r"\([^()]*,", selector) or selector.startswith("@"), f"a comma in brackets: {selector}"
        assert ".dark" not in selector or selector == ".dark", f"what differs in the dark is a variable: {selector}"
