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
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert (machine.threads(3), machine.threads(), machine.threads(0)) == (3, 7, 7)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert machine.threads() == 1


def test_the_cores_are_those_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With two of sixteen, as in a container with a cpuset or a quota, a service had fifteen threads on them."""
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert (machine.cores(), machine.threads()) == (2, 1)
    for quota, cores in (("max 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 2), ("", 2)):
        machine.QUOTA.write_text(f"{quota}\n")
        assert machine.cores() == cores
    machine.QUOTA.write_text("400000 100000\n")
    monkeypatch.delattr("os.sched_getaffinity")
    assert machine.cores() == 4
    machine.QUOTA.unlink()
    assert machine.cores() == 16
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert machine.cores() == 1
