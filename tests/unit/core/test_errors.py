from collections.abc import Callable

import pytest

from shoal.errors import DataError, UsageError, exit_code


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
