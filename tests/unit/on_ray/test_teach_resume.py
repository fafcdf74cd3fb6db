"""What an interrupted run left of the teacher's answers: what is taken of it, and what is not mixed."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from shoal.clients.teacher import Ask
from shoal.errors import DataError
from shoal.on_ray.teach import _kept, alone, teach


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


def test_a_file_that_the_other_command_has_just_put_in_place_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while the other still held it, locked when it had a new name: its answers would have been taken for ours."""
    partial, lock = tmp_path / "a.partial", fcntl.flock

    def late(file: Any, how: int) -> None:
        os.replace(partial, tmp_path / "a")
        lock(file, how)

    partial.write_bytes(line("a"))
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="is being written"):
        alone(partial).__enter__()
    assert (tmp_path / "a").read_bytes() == line("a")


def test_what_another_command_finished_meanwhile_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked for before the lock alone; whoever came second asked everything again, and replaced it."""
    out, source = tmp_path / "a", tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "why?"}]}))

    def late(partial: Path) -> Any:
        out.write_bytes(line("a"))
        return alone(partial)

    monkeypatch.setattr("shoal.on_ray.teach.alone", late)
    monkeypatch.setattr("ray.data.from_items", lambda *_: pytest.fail("asked"))
    with pytest.raises(DataError, match="exists"):
        teach(source, out, Ask("http://127.0.0.1:9/v1", "m"))
    assert out.read_bytes() == line("a") and not Path(f"{out}.partial").exists()
