import pytest

from shoal.errors import LONGEST_GOT, first_line, frames, last_line


def test_frames_tell_where_and_nothing_of_what_was_said() -> None:
    def first() -> None:
        raise KeyError("a secret")

    def second(*, hide: bool) -> None:
        try:
            first()
        except KeyError as error:
            raise ValueError(f"the {error}") from (None if hide else error)

    told = []
    for hide in (False, True):
        with pytest.raises(ValueError) as caught:
            second(hide=hide)
        told.append(frames(caught.value))
    assert all(word in told[0] for word in ("KeyError", "in first", "in second", __file__))
    assert told[0].endswith("ValueError") and told[1].endswith("ValueError")
    assert "in second" in told[1] and "in first" not in told[1]
    assert not any("a secret" in text.replace('raise KeyError("a secret")', "") for text in told)


def test_the_line_of_an_error_is_its_first_or_last_that_says_something() -> None:
    error = ValueError("\n  what \n\n why\n")
    assert (first_line(error), last_line(error)) == ("what", "why")
    assert first_line(KeyError()) == last_line(RuntimeError(" \n")).replace("Runtime", "Key") == "KeyError"
    assert len(first_line(ValueError("x" * 10_000))) == LONGEST_GOT
