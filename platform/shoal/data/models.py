"""Model directories in S3: put there whole, and read from a copy on the disk of each machine that needs them.

    s3://BUCKET/PREFIX/manifest.json     each file with its size, its sha256 and where it is; put last: the commit
    s3://BUCKET/PREFIX/VERSION/FILE      what one command wrote, under a digest of its files
    CACHE/models/KEY/FILE                one machine's copy: a model directory like any other

Who replaces a model puts other objects and then the manifest, so a reader gets the one or the other and never parts of both;
what no manifest names any more goes after that. A directory that somebody copied there, with the manifest that lies in it, is
read as well.

Notable: KEY is a digest of address and manifest, so a model that took another's place is another copy. One process of a machine
fetches, and the others wait for it (flock). Each file is held against its sha256 as it comes. Copies together have the bound of
the cache (SHOAL_CACHE_BYTES); the one that was not used for the longest time goes first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.data import copies
from shoal.data.alone import alone
from shoal.data.place import Bucket
from shoal.data.ranged import cache, cache_bytes, room
from shoal.data.sources.s3 import S3, is_remote
from shoal.errors import CheckpointError, ResourceError
from shoal.machine import aside, sha256_of, write_aside

MANIFEST, CONFIG = "manifest.json", "config.json"
WEIGHTS = ".safetensors"  # what files end in that are left where nothing is computed
VERSION = re.compile(r"[0-9a-f]{16}/[^/]+")  # names of objects of ours beside the manifest
SPARED = 600.0  # seconds after it was used in which a copy stays, whatever the bound says
NEW = ".new-"  # begins the names of folders to write in
LEFT_BEHIND = 86400.0  # seconds after which one is a killed command's
PIECE = 2**24  # bytes of one request for a file that is held against its tag
TRIES = 3  # of a model that is replaced while it is fetched


@dataclass(frozen=True)
class Entry:
    """A file of a model in S3; `at`: the object's name after the prefix."""

    at: str
    bytes: int
    sha256: str


Entries = dict[str, Entry]


def here(place: str | Path, *, weights: bool = True, service: S3 | None = None) -> Path:
    """A model directory on this machine: a path as it is; of ``s3://...`` its copy, fetched where it is not there. Without
    `weights` all but those: what an HTTP side reads.

    Raises CheckpointError where no whole model is there, or what came is not what its manifest says; DataError where S3 does
    not answer; ResourceError where the disk is full, or the cache too small.
    """
    if not is_remote(place):
        return Path(place)
    service = service or S3()
    bucket, left = Bucket(str(place), service), TRIES
    while True:
        left -= 1
        root = _root(bucket)
        entries = _entries(bucket, root)
        folder = cache() / "models" / _key(bucket.uri, service, root)
        busy = ResourceError(f"{folder} is being written", do="wait for it")
        try:
            with room(folder), alone(folder.with_suffix(".lock"), busy, wait=math.inf):
                _fetch(bucket, entries, folder, weights=weights)
            return folder
        except CheckpointError:
            if not left or bucket.text(MANIFEST) == root:
                raise


def some(place: str | Path, most: Mapping[str, float], service: S3 | None = None) -> Path:
    """A directory of which only the files `most` are read, each of at most so many bytes, and which has no manifest: a path as
    it is; of ``s3://...`` its copy, whose key is a digest of the files' tags, so that others in their place are another.

    Raises CheckpointError where a file is missing or larger, DataError where S3 does not answer or a file changes meanwhile,
    ResourceError where the disk is full.
    """
    if not is_remote(place):
        return Path(place)
    bucket, service = Bucket(str(place), service or S3()), service or S3()
    heads = {}
    for name, bytes_ in most.items():
        head = bucket.head(name)
        if head is None:
            raise CheckpointError(f"{bucket.uri} lacks {name}", do="give the address of a directory that has it")
        if head["ContentLength"] > bytes_:
            allowed = f"at most {bytes_:.0f} bytes"
            raise CheckpointError(f"{bucket.uri}/{name}", got=head["ContentLength"], allowed=allowed)
        heads[name] = (int(head["ContentLength"]), str(head["ETag"]))
    folder = cache() / "some" / _key(bucket.uri, service, json.dumps(heads, sort_keys=True).encode())
    busy = ResourceError(f"{folder} is being written", do="wait for it")
    with room(folder), alone(folder.with_suffix(".lock"), busy, wait=math.inf):
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # it is used now
        missing = {name: of for name, of in heads.items() if not _is_whole(folder / name, of[0])}
        _make_room(bucket.uri, folder, sum(size for size, _ in missing.values()))
        for name, (size, tag) in missing.items():
            with aside(folder / name) as beside, beside.open("wb") as file:
                for at in range(0, size, PIECE):
                    file.write(bucket.part(name, at, min(at + PIECE, size), tag=tag))
    return folder


@contextmanager
def written(place: str | Path, service: S3 | None = None) -> Iterator[Path]:
    """Where to write the model directory that is to be at `place`: there, or of ``s3://...`` in a folder of this machine, whose
    files are `put` when the block ends. Raises what `need_replaceable` and `put` do."""
    if not is_remote(place):
        yield Path(place)
        return
    need_replaceable(str(place), service)
    models = cache() / "models"
    with room(models):
        models.mkdir(parents=True, exist_ok=True)
        for left in models.glob(f"{NEW}*"):
            with suppress(FileNotFoundError):  # its command has just ended
                if left.stat().st_mtime < time.time() - LEFT_BEHIND:
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=models, prefix=NEW) as folder:
            yield Path(folder) / "model"
            put(Path(folder) / "model", str(place), service)


@contextmanager
def changed(place: str | Path, service: S3 | None = None) -> Iterator[Path]:
    """The model directory at `place`, to be changed in this block as a whole (files are replaced, never written into): itself,
    or of ``s3://...`` one of this machine, whose files are `put` when the block ends. Raises what `here` and `put` do."""
    if not is_remote(place):
        yield Path(place)
        return
    now = here(place, service=service)
    with written(place, service) as folder:
        folder.mkdir()
        for file in now.iterdir():
            os.link(file, folder / file.name)
        yield folder


def need_replaceable(uri: str, service: S3 | None = None) -> None:
    """Raises CheckpointError where `uri` holds anything but a model of ours, which alone may be replaced, and what a killed
    command left of one; DataError where S3 does not answer."""
    bucket = Bucket(uri, service or S3())
    root = bucket.text(MANIFEST)
    entries = {} if root is None else _entries(bucket, root)
    ours = {MANIFEST, *(entry.at for entry in entries.values())}
    other = [name for name, _ in bucket.sizes() if name not in ours and not VERSION.fullmatch(name)]
    if other or (entries and CONFIG not in entries):
        got = other[0] if other else f"no {CONFIG}"
        raise CheckpointError(f"{uri} is not a model that may be replaced", got=got, do="choose another place")


def put(folder: Path, uri: str, service: S3 | None = None) -> None:
    """Make the model directory `folder` the model at `uri`, in place of one that is there. Raises CheckpointError where another
    command put one meanwhile."""
    bucket = Bucket(uri, service or S3())
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    version = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    before = bucket.tagged(MANIFEST)
    replaced = {} if before is None else _entries(bucket, before[0])
    listed, there = {entry.at for entry in replaced.values()}, {name for name, _ in bucket.sizes()}
    if files == _listed(replaced) and listed <= there:  # where some are gone all are put again
        return
    for name in files:
        bucket.put(folder / name, f"{version}/{name}")
    root = _text({name: {"at": f"{version}/{name}", **values} for name, values in files.items()}).encode()
    # listed now: what is put after ours is the model is of a command that may take our place
    gone = {entry.at for entry in replaced.values()} | {name for name, _ in bucket.sizes() if VERSION.fullmatch(name)}
    only = {"IfNoneMatch": "*"} if before is None else {"IfMatch": before[1]}
    if bucket.put_text(MANIFEST, root, **only) is None and bucket.text(MANIFEST) != root:  # an answer may be lost
        raise CheckpointError(f"another command wrote a model to {uri}", do="choose another place, and run it again")
    bucket.remove([name for name in gone if not name.startswith(f"{version}/")])


def _root(bucket: Bucket) -> bytes:
    root = bucket.text(MANIFEST)
    if root is not None:
        return root
    there = next((name for name, _ in bucket.sizes()), None)
    if there is None:
        raise CheckpointError(f"{bucket.uri} holds no model", got="nothing", do="give the address of one")
    raise CheckpointError(
        f"{bucket.uri} holds no whole model", got=f"{there}, and no {MANIFEST}, which is put last",
        do="let the command that writes there end, or run it again",
    )  # fmt: skip


def _entries(bucket: Bucket, root: bytes) -> Entries:
    """The files that a manifest lists. Raises CheckpointError."""
    try:
        found = {
            str(name): Entry(str(values.get("at", name)), int(values["bytes"]), str(values["sha256"]))
            for name, values in json.loads(root)["files"].items()
        }
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{bucket.uri}/{MANIFEST} lists no files with bytes and sha256", do="give the address of a model"
        ) from error
    for name in found:
        if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
            raise CheckpointError(f"{bucket.uri}/{MANIFEST}: file", got=name, allowed="names of files, without folders")
    return found


def _key(uri: str, service: S3, root: bytes) -> str:
    return hashlib.sha256("\0".join((service.resolved().endpoint, uri, "")).encode() + root).hexdigest()[:32]


def _fetch(bucket: Bucket, entries: Entries, folder: Path, *, weights: bool) -> None:
    """See that `folder` has the files, which no other process writes now, with their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()  # it is used now
    wanted = {name: entry for name, entry in entries.items() if weights or not name.endswith(WEIGHTS)}
    missing = {name: entry for name, entry in wanted.items() if not _is_whole(folder / name, entry.bytes)}
    if not missing and (folder / MANIFEST).is_file():
        return
    for left in folder.iterdir():  # by a process that was killed
        if left.name not in entries and left.name != MANIFEST:
            left.unlink()
    _make_room(bucket.uri, folder, sum(entry.bytes for entry in missing.values()))
    for name, entry in missing.items():
        with aside(folder / name) as beside:
            if not bucket.get_if_there(entry.at, beside):
                raise CheckpointError(f"{bucket.uri} lacks {entry.at}, which its manifest names", do="write it again")
            size, sha256 = beside.stat().st_size, sha256_of(beside)
            if (size, sha256) != (entry.bytes, entry.sha256):
                got, allowed = (
                    f"{some[0]} bytes, sha256 {some[1][:16]}" for some in ((size, sha256), (entry.bytes, entry.sha256))
                )
                raise CheckpointError(
                    f"{bucket.uri}/{entry.at} is not what its manifest says",
                    got=got,
                    allowed=allowed,
                    do="write it again",
                )
    if CONFIG in missing and (head := bucket.head(entries[CONFIG].at)) is not None:
        made = head["LastModified"].timestamp()  # when it was made: what `/v1/models` says, on all machines alike
        os.utime(folder / CONFIG, (made, made))
    write_aside(folder / MANIFEST, _text(_listed(entries)))
    folder.touch()


def _is_whole(file: Path, size: int) -> bool:
    """Whether it is there, as long as it is to be: of a machine that stopped before it was on the disk it may not be."""
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def _listed(entries: Entries) -> dict[str, dict[str, int | str]]:
    """What the manifest in a model directory says of its files."""
    return {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in entries.items()}


def _text(files: object) -> str:
    return json.dumps({"files": files}, indent=1) + "\n"


def _make_room(uri: str, folder: Path, need: int) -> None:
    """Remove copies that were not used for a while, the oldest first, until `need` more bytes are within the bound of the
    cache. Raises ResourceError for a model that alone is beyond it."""
    most, mine = cache_bytes(), copies.size(folder)
    if mine + need > most:
        raise ResourceError(
            f"{uri} does not fit the cache",
            got=f"{mine + need} bytes",
            allowed=f"{most}",
            do="set SHOAL_CACHE_BYTES higher",
        )
    copies.make_room(folder, need, spared=SPARED)
