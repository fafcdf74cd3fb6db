"""A gateway that began anew under an open page: it knows none of the choices that the page shows."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

from ui import talk
from ui.app import build
from ui.uploads import Uploads


def test_what_an_open_page_shows_is_taken_by_a_gateway_that_began_anew() -> None:
    pages = build("http://127.0.0.1:1/v1", None, "/ui", talk.client("http://127.0.0.1:1/v1"), Uploads([]))
    picked = [block for block in pages.blocks.values() if block.get_block_name() in ("dropdown", "radio")]
    assert len(picked) > 10
    for block in picked:
        assert block.preprocess("tiny") == "tiny", block.label
