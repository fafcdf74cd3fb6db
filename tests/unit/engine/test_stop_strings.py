"""Stop strings over tokens of several characters: what is said does not depend on how the text was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.text import TextStream
from shoal.inputs.tokenizer import Tokenizer

MERGED = Tokenizer.train(["abcd bcde cdea deab eabc abcde"] * 50, 300)
BYTES = Tokenizer.bytes_only()


def said(tokenizer: Tokenizer, text: str, stop: list[str], may_stop_from: int = 0) -> tuple[str, bool]:
    stream, out = TextStream(tokenizer, stop), ""
    for token in tokenizer.encode(text):
        piece, stopped = stream.push(token, may_stop=len(out) >= may_stop_from)
        out += piece
        if stopped:
            return out + stream.finish(), True
    return out + stream.finish(), False


def test_tokens_of_several_characters_are_what_this_is_about() -> None:
    assert len(MERGED.encode("abcde")) <= 2 < len(BYTES.encode("abcde"))


@given(st.text("abcde", max_size=20), st.lists(st.text("abcde", min_size=1, max_size=4), min_size=1, max_size=3))
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    """Not before the one that begins first: in "abcd", "bc" is complete while "abcd" is not."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert said(MERGED, text, stop) == said(BYTES, text, stop) == expected


def test_the_one_that_begins_first_is_not_meant() -> None:
    assert said(MERGED, "abcd", ["abcd", "bc"]) == ("a", True)
