from collections.abc import Callable

import pytest

from shoal.errors import DataError, UsageError, exit_code, frames


def test_a_script_s_end_is_one_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert exit_code(lambda: None) == 0
    assert exit_code(fails(DataError("no rows", do="add some"))) == 1
    assert exit_code(fails(UsageError("what to serve"))) == 2
    assert exit_code(fails(KeyboardInterrupt())) == 130
    assert len(capsys.readouterr().err.splitlines()) == 3
    with pytest.raises(RuntimeError):
        exit_code(fails(RuntimeError("a fault of ours keeps its traceback")))


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
