"""What closes a call is found where no text of its JSON spells it, however it comes, and with one look at each letter."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.inputs import call_formats
from shoal.inputs.call_formats import Closing

CLOSE = "</c>"
TEXT = re.compile(r'"(?:[^"\\]|\\.?)*("|\Z)', re.DOTALL)
PIECES = st.lists(st.sampled_from(["{", "[", '"', "\\", "\n", "<", "/c>", CLOSE, "a", " ", '{"', "\\\\"]), max_size=14)


def by_definition(text: str) -> int:
    """The first that stands where a text of JSON that begins here does not break off."""
    for found in re.finditer(re.escape(CLOSE), text):
        begun = text[: found.start()]
        json = begun.lstrip(" \t\r\n")[:1] in ("{", "[")
        if not (json and any(not each[1] for each in TEXT.finditer(begun))):
            return found.start()
    return -1


@given(PIECES)
def test_it_is_found_as_soon_as_it_is_there(pieces: list[str]) -> None:
    closing, text = Closing(CLOSE), ""
    for letter in "".join(pieces):
        text += letter
        found = closing.find(text)
        assert found == by_definition(text) == Closing(CLOSE).find(text)
        if found >= 0:
            return


def test_a_text_that_spells_it_again_and_again_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Counted:
        def match(self, text: str, start: int, end: int) -> re.Match[str] | None:
            read.append(end - start)
            return re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL).match(text, start, end)

    monkeypatch.setattr(call_formats, "_IN_TEXT", Counted())
    text, closing = '{"a": "' + CLOSE * 500, Closing(CLOSE)
    for end in range(0, len(text), 7):
        assert closing.find(text[:end]) == -1
    assert len(text) - 20 < sum(read) <= len(text)
    assert closing.find(text + '"}' + CLOSE) == len(text) + 2
