"""Copies of what lies in S3: within one bound together, the oldest gone first, none that a process uses."""

from __future__ import annotations

import os
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


def copy(kind: Path, name: str, bytes_: int = PIECE, used: int = 0) -> Path:
    """One, used at `used`."""
    folder = kind / name
    folder.mkdir()
    with (folder / "a.arrow").open("wb") as file:
        file.truncate(bytes_)
    os.utime(folder, (used, used))
    return folder


def test_the_oldest_go_and_no_more_than_must(kind: Path) -> None:
    made = [copy(kind, str(at), used=at) for at in range(1, 9)]
    new = kind / "new"
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
        with copies.reserved(kind / "new", 5 * PIECE) as fits:
            assert not fits and used.exists()
            assert not (kind / "new" / copies.RESERVED).exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with copies.reserved(kind / "new", 5 * PIECE) as fits:
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
        with alone(kind / f"{name}.lock", busy), copies.reserved(copy(kind, name, 0), 5 * PIECE) as fits:
            found.append(fits)
            both.wait()  # one ends while the other has just begun

    threads = [threading.Thread(target=fetch, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True]
