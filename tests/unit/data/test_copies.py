"""Copies of what lies in S3: within one bound together, the oldest gone first, none that a process uses."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.data import copies
from shoal.data.alone import alone
from shoal.data.ranged import BLOCK
from shoal.errors import ResourceError

MOST = 64 * BLOCK
PIECE = MOST // 8


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of copies, in a cache of MOST bytes."""
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(MOST))
    monkeypatch.setattr(copies, "_held", {})
    yield tmp_path
    for lock in copies._held.values():
        os.close(lock)


def at(kind: Path, name: str) -> Path:
    """Where the copy lies that tests call `name`."""
    return kind / hashlib.sha256(name.encode()).hexdigest()[:32]


def copy(kind: Path, name: str, bytes_: int = PIECE, used: int = 0) -> Path:
    """One, used at `used`."""
    folder = at(kind, name)
    folder.mkdir()
    with (folder / "a.arrow").open("wb") as file:
        file.truncate(bytes_)
    os.utime(folder, (used, used))
    return folder


def test_the_oldest_go_and_no_more_than_must(kind: Path) -> None:
    made = [copy(kind, str(used), used=used) for used in range(1, 9)]
    new = at(kind, "new")
    new.mkdir()
    with copies.reserved(new, 2 * PIECE) as fits:
        assert fits and [folder.exists() for folder in made] == [False, False] + 6 * [True]
        assert copies.size(new) == 2 * PIECE, "what it will be counts from now on"
        (new / "a.arrow").write_bytes(bytes(PIECE))
        assert copies.size(new) == 2 * PIECE
    assert copies.size(new) == PIECE


def in_child(folder: Path) -> int:
    """A process that uses `folder` until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        copies.use(folder)
        os.write(writer, b"1")
        signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    return child


def test_what_a_process_uses_stays_until_it_ends_however_it_ends(kind: Path) -> None:
    used, other = copy(kind, "used", 4 * PIECE), copy(kind, "other", 3 * PIECE, used=1)
    child = in_child(used)
    os.utime(used, (0, 0))  # the oldest
    try:
        with copies.reserved(copy(kind, "new", 0), 4 * PIECE) as fits:
            assert fits and used.exists() and not other.exists()
        with copies.reserved(at(kind, "new"), 5 * PIECE) as fits:
            assert not fits and used.exists()
            assert not (at(kind, "new") / copies.RESERVED).exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with copies.reserved(at(kind, "new"), 5 * PIECE) as fits:
        assert fits and not used.exists()


def test_one_that_this_process_uses_stays_though_it_asks_again(kind: Path) -> None:
    used = copy(kind, "used", 4 * PIECE)
    copies.use(used)
    copies.use(used)
    assert not copies.make_room(copy(kind, "new", 0), 5 * PIECE) and used.exists() and len(copies._held) == 1


def test_one_that_somebody_emptied_is_used_anew(kind: Path) -> None:
    used = copy(kind, "used", 4 * PIECE)
    copies.use(used)
    (used / copies.USED).unlink()
    copies.use(used)
    assert not copies.make_room(copy(kind, "new", 0), 5 * PIECE) and used.exists()


def test_nothing_goes_for_one_that_is_alone_too_large(kind: Path) -> None:
    other = copy(kind, "other")
    with copies.reserved(copy(kind, "new", 0), MOST + 1) as fits:
        assert not fits and other.exists()


def test_two_that_are_fetched_at_once_are_within_the_bound(kind: Path) -> None:
    """Each sees what the other has reserved, though nothing of it is there yet."""
    found, both = [], threading.Barrier(2, timeout=60)

    def fetch(name: str) -> None:
        busy = ResourceError("somebody has the lock of a copy that nobody else fetches")
        with alone(at(kind, name).with_suffix(".lock"), busy), copies.reserved(copy(kind, name, 0), 5 * PIECE) as fits:
            found.append(fits)
            both.wait()  # one ends while the other has just begun

    threads = [threading.Thread(target=fetch, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True]


def killed_while_it_fetches(folder: Path, bytes_: int) -> None:
    """A process reserves `bytes_` for `folder`, writes a PIECE of them, and is killed."""
    child = os.fork()
    if child == 0:
        try:
            with alone(folder.with_suffix(".lock"), ResourceError("busy")):
                folder.mkdir()
                copies.use(folder)
                with copies.reserved(folder, bytes_):
                    (folder / "a.arrow.5eC0nD5").write_bytes(bytes(PIECE))
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def test_what_a_killed_process_had_reserved_is_free_for_who_fetches_it_again(kind: Path) -> None:
    folder = at(kind, "killed")
    killed_while_it_fetches(folder, 5 * PIECE)
    assert copies.size(folder) == 5 * PIECE
    with alone(folder.with_suffix(".lock"), ResourceError("busy")):
        with copies.reserved(folder, 4 * PIECE) as fits:
            assert fits and copies.size(folder) == 5 * PIECE
        (folder / "a.arrow").write_bytes(b"whole")
        (folder / copies.USED).write_bytes(b"")
        copies.tidy(folder, {"a.arrow"})
        assert sorted(file.name for file in folder.iterdir()) == [copies.USED, "a.arrow"], "nothing of it is left"


def test_no_other_goes_for_what_a_killed_process_had_reserved(kind: Path) -> None:
    other = copy(kind, "other", 2 * PIECE, used=1)
    killed_while_it_fetches(at(kind, "killed"), 5 * PIECE)
    was = at(kind, "killed").stat().st_mtime_ns
    with copies.reserved(copy(kind, "new", 0), 2 * PIECE) as fits:
        assert fits and other.exists()
    assert copies.size(at(kind, "killed")) == PIECE and at(kind, "killed").stat().st_mtime_ns == was


def test_what_is_no_copy_is_not_removed_and_not_counted(kind: Path) -> None:
    """Of a cache in a folder where somebody keeps models, too."""
    for name in ("my-model", "A" * 32, "0" * 31, "0" * 33):
        (kind / name).mkdir()
        (kind / name / "model.safetensors").write_bytes(bytes(5 * PIECE))
        os.utime(kind / name, (0, 0))
    with copies.reserved(copy(kind, "new", 0), 4 * PIECE) as fits:
        assert fits and len(list(kind.glob("*/model.safetensors"))) == 4


def test_one_whose_removal_is_killed_is_gone_and_what_is_left_of_it_goes_later(kind: Path) -> None:
    """Half of a corpus with its index was taken for the whole."""
    old = copy(kind, "old", 6 * PIECE)
    (old / "index.json").write_text("{}")
    new, child = copy(kind, "new", 0), os.fork()
    if child == 0:
        shutil.rmtree = lambda path, **_: (  # type: ignore[assignment, misc]
            (Path(path) / "a.arrow").unlink(),
            os.kill(os.getpid(), signal.SIGKILL),
        )
        try:
            copies.make_room(new, 4 * PIECE)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert not old.exists() and len(list(kind.glob(f"{copies.GONE}*"))) == 1
    assert copies.make_room(new, 4 * PIECE) and not list(kind.glob(f"{copies.GONE}*"))


def test_a_copy_is_counted_though_a_file_of_it_gets_its_name_meanwhile(
    kind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, is_file = copy(kind, "other", 6 * PIECE), Path.is_file
    (folder / "b.arrow.5eC0nD5").write_bytes(b"some")

    def renamed(self: Path) -> bool:
        found = is_file(self)
        if self.name == "b.arrow.5eC0nD5" and found:
            self.rename(self.with_suffix(""))
        return found

    monkeypatch.setattr(Path, "is_file", renamed)
    assert copies.size(folder) >= 6 * PIECE
