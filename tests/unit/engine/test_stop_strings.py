"""Stop strings over tokens of several characters: what is said does not depend on how the text was cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal import Sampling
from shoal.engine.text import TextStream
from shoal.errors import RequestError
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


FRAME = ("<c>", "</c>")
PIECES = st.lists(
    st.sampled_from(["<c>", "</c>", "<", "c>", " ", "{", "}", '"', "\\", "a", "\u6f6e"]), max_size=14
).map("".join)


def first_frame(text: str) -> str | None:
    """`text` up to where what the first `<c>` opens is closed, letter by letter; None where it is not."""
    before, opened, rest = text.partition("<c>")
    is_json, quoted, at = rest.lstrip(" \t\r\n")[:1] in ("{", "["), False, 0
    while opened and at < len(rest):
        if not quoted and rest.startswith("</c>", at):
            return before + opened + rest[:at] + "</c>"
        at += 2 if quoted and rest[at] == "\\" else 1
        quoted ^= is_json and rest[at - 1 : at] == '"' and not (quoted and rest[at - 2 : at] == '\\"')
    return None


def framed(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = (), keep: bool = False) -> tuple[str, bool]:
    stream, out = TextStream(tokenizer, stop, keep, FRAME), ""
    for token in tokenizer.encode(text):
        piece, stopped = stream.push(token)
        out += piece
        if stopped:
            return out + stream.finish(), True
    return out + stream.finish(), False


FRAMED = Tokenizer.train(['<c>{"a": "</c>"}</c><c>{}</c>\n'] * 50, 300)


def test_tokens_across_what_closes_are_what_this_is_about() -> None:
    pieces = [FRAMED.decode([token]) for token in range(9, len(FRAMED))]
    assert any(piece.startswith(">") and len(piece) > 1 for piece in pieces)


@given(PIECES)
def test_an_answer_ends_with_what_is_framed_first_but_for_texts_in_it(text: str) -> None:
    whole = first_frame(text)
    expected = (text, False) if whole is None else (whole, True)
    assert framed(FRAMED, text) == framed(BYTES, text) == expected


@given(PIECES, st.sampled_from(['"', "<", "c>", "a", "/c>", "</c> ", "</c>a", "c>a"]), st.booleans())
@example("a<c>a</c>a", "/c>", False)
@example("a<c>a</c>a", "</c>", True)
def test_a_stop_string_that_is_complete_earlier_or_with_it_comes_first(text: str, stop: str, keep: bool) -> None:
    whole, at = first_frame(text), text.find(stop)
    if at >= 0 and (whole is None or at + len(stop) <= len(whole)):
        expected = (text[: at + len(stop) if keep else at], True)
    else:
        expected = (text, False) if whole is None else (whole, True)
    assert framed(FRAMED, text, (stop,), keep) == framed(BYTES, text, (stop,), keep) == expected


@pytest.mark.parametrize("first", ["<c></c>", '<c>{"a": "<c>"}</c>'])
def test_too_early_a_frame_is_passed_and_the_next_one_ends_the_answer(first: str) -> None:
    """Nothing of the first is looked at again: what it spells opens nothing."""
    for tokenizer in (FRAMED, BYTES):
        stream, out = TextStream(tokenizer, frame=FRAME), ""
        for token in tokenizer.encode(first + "x</c>x</c><c>y</c>z"):
            piece, stopped = stream.push(token, may_stop=len(out) >= len(first))
            out += piece
            if stopped:
                break
        assert out == first + "x</c>x</c><c>y</c>"


@pytest.mark.parametrize("frame", [("", "x"), ("x",), ("x", "")])
def test_a_frame_is_two_texts(frame: Any) -> None:
    with pytest.raises(RequestError, match="frame"):
        Sampling(frame=frame)
