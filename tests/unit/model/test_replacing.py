"""What is written aside takes a directory's place, whoever else writes there, and leaves nothing; what was killed leaves it to
the next."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from shoal.errors import CheckpointError, ResourceError
from shoal.model.checkpoint import LEFT_SECONDS, put_back, replacing, require_replaceable
from shoal.model.described import read_config
from shoal.open_weights.convert import _need_empty as need_elsewhere_empty

ANY = {"need": lambda directory: None}


def left(folder: Path, name: str, *, age: float = 2 * LEFT_SECONDS) -> Path:
    path = folder / name
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights")
    for each in (path / "model.safetensors", path):
        os.utime(each, (time.time() - age, time.time() - age))
    return path


def written(folder: Path, text: str) -> None:
    with replacing(folder / "m", **ANY) as aside:
        (aside / "text").write_text(text)


def test_what_killed_writers_left_goes_and_nothing_else(tmp_path: Path) -> None:
    half, before = left(tmp_path, ".m.4711.0123abcd.tmp"), left(tmp_path, ".m.4711.0123abcd.old")
    others = [".n.4711.0123abcd.tmp", ".m.notes.tmp", ".m.4711.0123abcd.tmp.mine"]
    kept = [left(tmp_path, name) for name in others] + [left(tmp_path, ".m.4712.0123abcd.tmp", age=10)]
    held = left(tmp_path, ".m.4713.0123abcd.tmp")
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with replacing(tmp_path / "m", **ANY) as aside:
        assert not half.exists() and not before.exists()
        assert (tmp_path / "m/model.safetensors").exists(), (
            "the one of before is all that there is, and has its name again"
        )
        (aside / "text").write_text("new")
    os.close(descriptor)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, held, tmp_path / "m"])


def test_of_two_that_end_at_once_one_is_there_whole_and_the_other_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "before")
    rename = Path.rename

    def other_first(path: Path, to: Path) -> Path:
        if path.suffix == ".tmp":
            monkeypatch.setattr(Path, "rename", rename)
            written(tmp_path, "the other's")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", other_first)
    with pytest.raises(CheckpointError, match="one that was written meanwhile"):
        written(tmp_path, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (tmp_path / "m/text").read_text() == "the other's"


def test_a_full_disk_is_a_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    written(tmp_path, "before")
    with pytest.raises(ResourceError, match="No space left on device'; free"), replacing(tmp_path / "m", **ANY):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (tmp_path / "m/text").read_text() == "before"


def test_whatever_the_system_says_to_writing_is_a_line(tmp_path: Path) -> None:
    """safetensors has an error of its own; a name that is too long, or in a file, ended the command as a bug would."""
    written(tmp_path, "before")
    for error in (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
    ):
        says = r"cannot write .*m: got .*(No space|too large|put/output error).*; (free|gi)"
        with pytest.raises(ResourceError, match=says), replacing(tmp_path / "m", **ANY):
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (tmp_path / "m/text").read_text() == "before"
    says = r"got '(File name too long|Not a directory)'; give another place"
    for place in (tmp_path / ("n" * 240), tmp_path / ("n" * 300), tmp_path / "m" / "text" / "in"):
        with pytest.raises(ResourceError, match=says), replacing(place, **ANY):
            pass
    with pytest.raises(ResourceError, match=says):
        require_replaceable(tmp_path / ("n" * 300))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for refuses in (require_replaceable, lambda place: replacing(place, **ANY).__enter__()):
        with pytest.raises(ResourceError, match=r"circle: got 'Too many levels of symbolic links'; give another place"):
            refuses(tmp_path / "circle")
    (tmp_path / "circle").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container's volume: nothing can take its place, which was found out after all was written."""
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "m"))
    for refuses in (require_replaceable, lambda place: replacing(place, **ANY).__enter__(), need_elsewhere_empty):
        with pytest.raises(CheckpointError, match="got 'a mount point, which cannot be renamed'; give a folder in it"):
            refuses(tmp_path / "m")
    written(tmp_path / "m", "in it")


def test_what_was_taken_away_from_where_a_link_leads_is_put_back(tmp_path: Path) -> None:
    left(tmp_path, ".m.4711.0123abcd.old")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not a model directory that may be replaced"):
        require_replaceable(tmp_path / "link")
    assert (tmp_path / "m/model.safetensors").exists()


def test_what_a_command_that_was_killed_between_its_two_renames_took_away_is_back_with_the_next(tmp_path: Path) -> None:
    older = left(tmp_path, ".m.4712.0123abcd.old")
    time.sleep(0.02)  # a file system's clock may stand still for 10 ms
    newer = left(tmp_path, ".m.4711.0123abcd.old")
    (newer / "text").write_text("the newer")
    with pytest.raises(CheckpointError, match=r"that command again, or rename \.m\.4711\.0123abcd\.old"):
        read_config(tmp_path / "m")
    assert put_back(tmp_path / "m") and not newer.exists() and older.exists()
    assert (tmp_path / "m/text").read_text() == "the newer" and not put_back(tmp_path / "m")


def test_one_that_is_between_its_renames_now_is_left_alone(tmp_path: Path) -> None:
    aside, before = left(tmp_path, ".m.4711.0123abcd.tmp"), left(tmp_path, ".m.4711.0123abcd.old")
    descriptor = os.open(aside, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert not put_back(tmp_path / "m") and before.exists()
    os.close(descriptor)
    with pytest.raises(ResourceError), replacing(tmp_path / "m", **ANY):
        assert (tmp_path / "m/model.safetensors").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "m/model.safetensors").exists(), "and stays where the next fails as well"


def test_what_was_written_to_meanwhile_is_nobody_s_to_remove_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    """Whatever in it was written; a server that replaces models for weeks would run out of descriptors. What an earlier one
    left of the model before goes as well."""
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.exists() else 0
    left(tmp_path, ".m.4710.0123abcd.old")
    assert put_back(tmp_path / "m")
    gone = [left(tmp_path, f".m.4711.0123abcd{end}") for end in (".tmp", ".old")]
    file, around = (left(tmp_path, f".m.471{number}.0123abcd.tmp") for number in (2, 3))
    os.utime(file / "model.safetensors")
    os.utime(around)
    written(tmp_path, "new")
    assert not any(path.exists() for path in gone) and file.exists() and around.exists()
    assert not folder.exists() or len(list(folder.iterdir())) == before
