"""What an interrupted run left of the teacher's answers: what is taken of it, and what is not mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.on_ray.teach import _kept, alone


def line(question: str) -> bytes:
    return json.dumps({"messages": [], "teacher": {"question": question}}).encode() + b"\n"


@pytest.mark.parametrize("torn", [b"", b"{", line("c")[:-5], line("c")[:-1], '{"a": "ä'.encode()[:-1]])
def test_a_torn_last_line_is_taken_away_and_its_question_asked_again(tmp_path: Path, torn: bytes) -> None:
    partial = tmp_path / "a.partial"
    partial.write_bytes(line("a") + line("b") + torn)
    with alone(partial) as file:
        assert _kept(file, partial, {"a", "b", "c"}) == {"a", "b"}
        file.write(line("c"))
    assert partial.read_bytes() == line("a") + line("b") + line("c")


@pytest.mark.parametrize("other", [line("x"), line("a"), b"7\n", b"{}\n", b"\0\0\n"])
def test_answers_to_another_request_are_neither_mixed_nor_lost(tmp_path: Path, other: bytes) -> None:
    partial = tmp_path / "a.partial"
    partial.write_bytes(line("a") + other)
    with alone(partial) as file, pytest.raises(DataError, match="line 2: got 'no answer to this request'"):
        _kept(file, partial, {"a", "b"})
    assert partial.read_bytes() == line("a") + other


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    again = alone(tmp_path / "a.partial")
    with alone(tmp_path / "a.partial"), pytest.raises(DataError, match="is being written"):
        again.__enter__()
    with alone(tmp_path / "a.partial"):
        pass
