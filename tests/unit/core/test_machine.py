"""Files that are there in full or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from shoal import machine


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with machine.aside(path) as beside:
        beside.write_text("new")
        assert beside.parent == tmp_path and path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_was_not_written_to_its_end_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), machine.aside(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_sum_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"sea" * 10**6)
    assert machine.sha256_of(path) == hashlib.sha256(b"sea" * 10**6).hexdigest()


def test_threads_are_those_asked_for_or_the_cores_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert (machine.threads(3), machine.threads(), machine.threads(0)) == (3, 7, 7)
    for cores in (1, None):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert machine.threads() == 1
