"""What outlives a power cut: the disk has the content of a file from its fsync on, and its name from that of its folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest

from shoal.loop.audit import Audit
from shoal.loop.capture import FORGOTTEN, Capture
from shoal.loop.forget import forget
from shoal.loop.parts import make_parts
from shoal.loop.release import Release, State
from shoal.loop.rows import Row
from shoal.loop.texts import Texts
from shoal.loop.writer import Writer
from shoal.machine import see_on_disk

NOON = 1_795_780_800_000


class Disk:
    """What a disk has of a folder, at the worst that POSIX allows: of each folder the names as of its last fsync, of each file
    what it held at its own, and nothing before the first."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._fsync = folder, os.fsync
        self._names: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        self._files: dict[tuple[int, int], bytes] = {}
        for each in [folder, *folder.rglob("*")]:
            self._see(each)
        monkeypatch.setattr("os.fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self._see(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def _see(self, path: Path) -> None:
        if path.is_dir():
            self._names[_id(path)] = {each.name: _id(each) for each in path.iterdir()}
        else:
            self._files[_id(path)] = path.read_bytes()

    def cut(self, to: Path) -> None:
        """What is there after the power went, as the folder `to`."""
        self._write(_id(self._folder), to)

    def _write(self, of: tuple[int, int], to: Path) -> None:
        to.mkdir()
        for name, each in self._names.get(of, {}).items():
            if each in self._names:
                self._write(each, to / name)
            else:
                (to / name).write_bytes(self._files.get(each, b""))


def _id(path: Path) -> tuple[int, int]:
    known = path.stat()
    return known.st_dev, known.st_ino


def changed(release: Release, number: int) -> None:
    before = State(number=number, stable=1, audit=release.audit.head() if number else "")
    release._change(before, "hold", f"change {number + 1}", "ann", None, held="so")


def test_a_change_of_a_release_is_not_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = Release(tmp_path / "release")
    release.directory.mkdir()
    changed(release, 0)
    disk = Disk(release.directory, monkeypatch)
    changed(release, 1)
    disk.cut(tmp_path / "after")
    after = Release(tmp_path / "after")
    assert after.state().number == 2 and after.audit.check(after.state().audit) == 2


@pytest.mark.parametrize("at", range(12))
def test_wherever_the_power_goes_the_log_and_the_state_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In each of its moments a change is there or is not, and the next one goes on from it."""
    release = Release(tmp_path / "release")
    release.directory.mkdir()
    changed(release, 0)
    disk, left = Disk(release.directory, monkeypatch), at

    def then(work: Any) -> Any:
        def counted(*given: Any, **more: Any) -> Any:
            nonlocal left
            if not left:
                disk.cut(tmp_path / "after")
            left -= 1
            return work(*given, **more)

        return counted

    for name in ("fsync", "replace", "rename", "unlink"):
        monkeypatch.setattr(f"os.{name}", then(getattr(os, name)))
    changed(release, 1)
    if left >= 0:
        disk.cut(tmp_path / "after")
    after = Release(tmp_path / "after")
    assert after._finished().number in (1, 2) and after.audit.check(after.state().audit) == after.state().number


def test_rows_that_were_on_the_disk_are_not_lost_when_their_journal_becomes_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Capture(tmp_path / "capture", create=True)
    writer = Writer(capture, start=False)
    writer.put(*(Row(f"r{number}", NOON, subject="ab"[number % 2]) for number in range(4)))
    disk = Disk(capture.folder, monkeypatch)
    make_parts(capture, writer._journal.path)
    disk.cut(tmp_path / "after")
    assert Capture(tmp_path / "after").rows()["id"].to_pylist() == ["r0", "r1", "r2", "r3"]
    forget(capture, subject="a")
    shutil.rmtree(tmp_path / "after")
    disk.cut(tmp_path / "after")
    after = Capture(tmp_path / "after")
    assert after.rows()["id"].to_pylist() == ["r1", "r3"]
    assert json.loads((after.folder / FORGOTTEN).read_text())["subject"] == "a"


def test_who_is_forgotten_does_not_come_again_with_the_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a command that is interrupted before the folders are on the disk, and done again: then nothing is left to remove."""
    capture = Capture(tmp_path / "capture", create=True)
    writer = Writer(capture, start=False)
    for day in range(3):
        writer.put(*(Row(f"r{day}{whose}", NOON + day * 86_400_000, subject=whose) for whose in "ab"))
    make_parts(capture, writer._journal.path)
    for whose in "ab":
        completion = {"id": f"chatcmpl-{ord(whose):032x}", "choices": [{"text": "so"}]}
        Texts(capture).put("shop", whose, [{"role": "user", "content": f"by {whose}"}], completion, {})
    disk, synced = Disk(capture.folder, monkeypatch), list[Path]()
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("shoal.loop.forget._see_days", Mock(side_effect=[None, KeyboardInterrupt]))
        forget(capture, subject="a")
    monkeypatch.setattr("shoal.loop.forget.see_on_disk", lambda path: synced.append(path) or see_on_disk(path))
    assert forget(capture, subject="a").rows == 0
    disk.cut(tmp_path / "after")
    parts = Capture(tmp_path / "after").parts()
    assert [pq.read_table(path, partitioning=None)["subject"].to_pylist() for path in parts] == [["b"]] * 3
    (text,) = (tmp_path / "after").glob("texts/day=*/*.json")
    assert json.loads(text.read_text())["subject"] == "b"
    assert len(synced) == len({*synced}) == 4, "a folder once, however many parts are in it"


def test_a_file_system_that_cannot_sync_a_folder_is_none_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(number: int) -> Any:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr("os.fsync", refuses(22))
    Audit(tmp_path / "audit.jsonl").append({"number": 1}, "0")
    monkeypatch.setattr("os.fsync", refuses(5))
    with pytest.raises(OSError, match="Input/output error"):
        see_on_disk(tmp_path)
