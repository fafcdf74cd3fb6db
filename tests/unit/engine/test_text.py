"""Text as it comes: whole characters, and stop strings wherever the tokens are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.text import TextStream
from shoal.inputs.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes_only()


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces that come out, one a token and the rest, and whether a stop string ended it."""
    out, pieces = TextStream(TOKENIZER, stop), []
    for token in TOKENIZER.encode(text):
        piece, stopped = out.push(token)
        pieces.append(piece)
        if stopped:
            return [*pieces, out.finish()], True
    return [*pieces, out.finish()], False


@given(st.text(max_size=40))
def test_no_piece_holds_half_a_character(text: str) -> None:
    pieces, stopped = stream(text)
    assert "".join(pieces) == text and not stopped
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_answer_ends_before_the_first_stop_string_that_is_complete(text: str, stop: list[str]) -> None:
    ends = [text.find(s) + len(s) for s in stop if s in text]
    pieces, stopped = stream(text, tuple(stop))
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    first = min(ends)
    start = min(first - len(s) for s in stop if text[:first].endswith(s))
    said = "".join(pieces)
    assert text.startswith(said) and start <= len(said) <= first
    assert all(s not in said for s in stop)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_kept_the_stop_string_is_the_end_of_the_answer(text: str, stop: list[str]) -> None:
    out, pieces, stopped = TextStream(TOKENIZER, tuple(stop), keep=True), [], False
    for token in TOKENIZER.encode(text):
        piece, stopped = out.push(token)
        pieces.append(piece)
        if stopped:
            break
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert "".join([*pieces, out.finish()]) == (text[: min(ends)] if ends else text)
    assert stopped == bool(ends)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, stopped = stream("say END now", ("END!",))
    assert "".join(pieces) == "say END now" and not stopped
    assert pieces[4:7] == ["", "", ""]


def test_half_a_character_at_the_end_is_replaced() -> None:
    out = TextStream(TOKENIZER)
    token = TOKENIZER.encode("é")[0]
    assert out.push(token) == ("", False)
    assert out.finish() == "\ufffd"


def test_half_a_character_at_the_end_completes_no_stop_string() -> None:
    """The answer has ended for another reason, and says all of its text. In the middle U+FFFD is text like any other."""
    first, second = TOKENIZER.encode("aé")[:2]
    for stop, held in (("a\ufffd", ("", "")), ("\ufffd", ("a", ""))):
        out = TextStream(TOKENIZER, (stop,))
        assert (out.push(first), out.push(second)) == ((held[0], False), (held[1], False))
        assert "".join(held) + out.finish() == "a\ufffd"
        out = TextStream(TOKENIZER, (stop,))
        said = [out.push(token) for token in (first, second, *TOKENIZER.encode("bc"))]
        assert "".join(text for text, _ in said[:3]) == "a".removesuffix(stop[:-1]) and said[2][1]


def test_a_text_that_may_not_stop_yet_passes_unsearched_and_nothing_of_it_is_held_back() -> None:
    out = TextStream(TOKENIZER, ("bb",))
    a, b = TOKENIZER.encode("ab")
    assert [out.push(token, may_stop=False) for token in (a, b, b)] == [("a", False), ("b", False), ("b", False)]
    assert [out.push(token) for token in (b, a, b, b)] == [("", False), ("ba", False), ("", False), ("", True)]
    assert out.finish() == ""
