"""Where a corpus is made: a folder, or a prefix of S3 of which each machine has a folder with what it made or opened there.

    s3://BUCKET/PREFIX/            shards, tokenizer, chats, report; index.json last: its presence means complete
    s3://BUCKET/PREFIX/.prepare/   each part's documents, tables and kept results, which say what it made; gone at the end
    CACHE/prepare/CORPUS/RUN/      the same names on one machine, of one command

Tasks read and write files as ever. What a task made is put (`put`) before its result is, and what is not on this machine is
fetched when it is opened (`here`). So no folder is shared, and a machine that is lost takes nothing with it.

Notable: a machine's folder is of one command, since the next may give the same names to other bytes. It has the bound of the
cache (`SHOAL_CACHE_BYTES`): what was not used for a while goes, and is fetched again where it is wanted. What lies nowhere else
yet stays, however long its task takes: a shard is put when its part is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from shoal.data import ranged
from shoal.data.sources import s3
from shoal.data.sources.s3 import S3, told
from shoal.errors import DataError, ResourceError

WORK = ".prepare"  # folder there, until the corpus is finished
LEASE = f"{WORK}/lease.json"  # says which command works there (`data.lease`)
THERE = 0o444  # mode of a file that lies in S3 as well; the others, of tasks that are at work, must not go
SPARED = 600.0  # seconds after it was used in which a file stays on this machine, whatever the bound says
LEFT_BEHIND = 86400.0  # seconds after which a folder of another corpus is a killed command's
_LOST = ("404", "NoSuchKey")  # what S3 answers where there is no such object

T = TypeVar("T")
_known: dict[Path, Place] = {}  # what folders of this process stand for


@dataclass(frozen=True)
class Place:
    """A prefix of S3 where one command makes a corpus. `run`: a name that no other command has."""

    uri: str
    service: S3
    run: str

    @property
    def folder(self) -> Path:
        """This machine's folder of it, made where it is not there; those of earlier commands go, where this one works there.
        Raises ResourceError."""
        cache = ranged.cache()
        try:
            folder = _folder(self, cache)
            (folder / WORK).mkdir(parents=True, exist_ok=True)  # who empties a cache need not know who is at work
        except OSError as error:
            raise ResourceError(
                f"cannot write to {cache}", got=error.strerror, do="set SHOAL_CACHE to a folder that every machine has"
            ) from error
        return folder

    @property
    def work(self) -> Path:
        """The work folder in it."""
        return self.folder / WORK

    @property
    def bucket(self) -> Bucket:
        return _bucket(self.uri, self.service)

    def is_held(self) -> bool:
        """Whether the lease there is this command's."""
        return said(self.bucket, LEASE).get("run") == self.run

    def need_held(self) -> None:
        """Raises DataError where another command has taken over: of one that stood still, or that nobody reached, tasks go
        on."""
        if not self.is_held():
            raise DataError(
                f"another prepare took over {self.uri}",
                got="a task of the one before it, which writes nothing",
                do="let that one end, and give another --out",
            )

    def leave(self) -> None:
        """Remove what this machine has of it."""
        folder = _corpus(self, ranged.cache())
        _known.pop(folder / self.run, None)
        _folder.cache_clear()
        shutil.rmtree(folder / self.run, ignore_errors=True)
        blocks = ranged.cache() / "blocks"
        shutil.rmtree(blocks / self.run, ignore_errors=True)
        with contextlib.suppress(OSError):  # there are none
            if [path.name for path in blocks.iterdir()] == [ranged.ADDED]:
                (blocks / ranged.ADDED).unlink()
        with contextlib.suppress(OSError):  # another command's is there
            folder.rmdir()


class Bucket:
    """Objects under a prefix, by their names after it. Whatever S3 says becomes a DataError of one line."""

    def __init__(self, uri: str, service: S3) -> None:
        self.uri, self._service = uri.rstrip("/"), service
        self._bucket, key = s3.split(uri)
        self._prefix = f"{key.strip('/')}/" if key.strip("/") else ""

    @cached_property
    def _client(self) -> Any:
        return self._service.client()

    def sizes(self, begins: str = "") -> Iterator[tuple[str, int]]:
        """Name and bytes of the objects whose names begin so."""
        for name, size, _ in self.listed(begins):
            yield name, size

    def listed(self, begins: str = "") -> Iterator[tuple[str, int, str]]:
        """Name, bytes and tag of the objects whose names begin so."""
        with told(self.uri):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + begins):
                for item in page.get("Contents", ()):
                    yield item["Key"][len(self._prefix) :], item["Size"], str(item["ETag"])

    def tag(self, name: str) -> str | None:
        """What changes with the bytes of an object; None where there is none."""
        head = self.head(name)
        return None if head is None else str(head["ETag"])

    def head(self, name: str) -> dict[str, Any] | None:
        """What S3 says of an object; None where there is none."""
        return self._unless_lost(lambda: self._client.head_object(Bucket=self._bucket, Key=self._prefix + name))

    def put(self, file: Path, name: str) -> str:
        """Copy a file there; its tag."""
        with told(self.uri):
            self._client.upload_file(str(file), self._bucket, self._prefix + name)
        tag = self.tag(name)
        if tag is None:
            raise DataError(f"{self.uri}/{name} was put and is not there", do="see who else writes there")
        return tag

    def get(self, name: str, file: Path) -> None:
        """Copy an object here; the file has its name once it is whole."""
        if not self.get_if_there(name, file):
            raise DataError(
                f"{self.uri}/{name} is missing", do="run the same command again: what is there is gone on with"
            )

    def get_if_there(self, name: str, file: Path) -> bool:
        """As `get`; False where there is no such object."""

        def fetch() -> bool:
            self._client.download_file(self._bucket, self._prefix + name, str(file))
            return True

        return bool(self._unless_lost(fetch))

    def text(self, name: str) -> bytes | None:
        """What a small object holds; None where there is none."""
        found = self.tagged(name)
        return None if found is None else found[0]

    def tagged(self, name: str) -> tuple[bytes, str] | None:
        """What a small object holds, and its tag; None where there is none."""

        def read() -> tuple[bytes, str]:
            found, data = s3.got(self._client, Bucket=self._bucket, Key=self._prefix + name)
            return data, str(found["ETag"])

        return self._unless_lost(read)

    def part(self, name: str, start: int, end: int, *, tag: str) -> bytes:
        """Bytes of an object that has this `tag`. Raises DataError where it has another, or is not there."""
        from botocore.exceptions import ClientError

        with told(self.uri):
            try:
                part = {"Range": f"bytes={start}-{end - 1}", "IfMatch": tag}
                _, data = s3.got(self._client, Bucket=self._bucket, Key=self._prefix + name, **part)
            except ClientError as error:
                if _code(error) in ("PreconditionFailed", "412", "InvalidRange", *_LOST):
                    raise DataError(f"{self.uri}/{name} is not what its manifest says", got=_code(error)) from error
                raise
        if len(data) != end - start:
            raise DataError(f"{self.uri}/{name} is cut short", got=f"{len(data)} bytes", allowed=end - start)
        return data

    def put_text(self, name: str, data: bytes, **only: str) -> str | None:
        """Write a small object, `only` where S3 finds this so (IfMatch, IfNoneMatch); its tag, or None where it did not."""
        from botocore.exceptions import ClientError

        with told(self.uri):
            try:
                put = self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data, **only)
            except ClientError as error:
                if only and _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", *_LOST):
                    return None
                raise
        return str(put["ETag"])

    def remove(self, names: list[str]) -> None:
        """Remove objects, where they are. Raises DataError for some that S3 keeps, which says so in an answer that is none of a
        fault."""
        kept: list[dict[str, str]] = []
        with told(self.uri):
            for at in range(0, len(names), 1000):  # as many as one request may name
                keys = [{"Key": self._prefix + name} for name in names[at : at + 1000]]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
                kept += (one for one in answer.get("Errors", ()) if one["Code"] not in _LOST)
        if kept:
            raise DataError(
                f"{self.uri}: {len(kept)} objects cannot be removed",
                got=f"{kept[0]['Code']} for {kept[0]['Key'][len(self._prefix) :]}",
                do="give the right to delete there (s3:DeleteObject), and run it again",
            )

    def _unless_lost(self, ask: Callable[[], T]) -> T | None:
        from botocore.exceptions import ClientError

        with told(self.uri):
            try:
                return ask()
            except ClientError as error:
                if _code(error) in _LOST:
                    return None
                raise


def here(path: Path) -> Path:
    """`path`, to be opened: where it is of a corpus that is made in S3, and not on this machine, it is fetched. Raises
    DataError where it cannot be, ResourceError where the disk is full."""
    place, name = _of(path)
    if place is None:
        return path
    try:
        os.utime(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ranged.room(place.folder):
            place.bucket.get(name, path)
        _added(place, path)
    return path


def put(path: Path) -> str | None:
    """Where `path` is of a corpus that is made in S3, put it there; its tag. None where it is on its place already."""
    place, name = _of(path)
    if place is None:
        return None
    tag = place.bucket.put(path, name)
    _added(place, path)
    return tag


def need_held(path: Path) -> None:
    """`Place.need_held` where `path` is of a corpus that is made in S3."""
    place, _ = _of(path)
    if place is not None:
        place.need_held()


def said(bucket: Bucket, name: str) -> dict[str, Any]:
    """What a lease says, of whom it is: ``run`` and ``who``; empty where there is none."""
    try:
        told = json.loads(bucket.text(name) or b"{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def bucket_of(path: Path) -> tuple[Bucket, str] | None:
    """Where `path` lies in S3: bucket and name there; None where it is a file and no more."""
    place, name = _of(path)
    return None if place is None else (place.bucket, name)


def _of(path: Path) -> tuple[Place | None, str]:
    """Of which place it is, and its name there."""
    for folder, place in _known.items():
        name = posixpath.normpath(os.path.relpath(path, folder))
        if not name.startswith(".."):
            return place, name
    return None, ""


@lru_cache(maxsize=16)
def _folder(place: Place, cache: Path) -> Path:
    folder = _corpus(place, cache) / place.run
    folder.mkdir(parents=True, exist_ok=True)
    others = [other for other in folder.parent.iterdir() if other != folder]
    if others and place.is_held():  # who only looks, or was taken over, has no right to what another works in
        for other in others:
            shutil.rmtree(other, ignore_errors=True)
    for other in folder.parent.parent.glob("*/*"):  # of another corpus, whose command may work here beside this one
        if other.parent != folder.parent and _last_used(other) < time.time() - LEFT_BEHIND:
            shutil.rmtree(other, ignore_errors=True)
    _known[folder] = place
    return folder


def _last_used(folder: Path) -> float:
    """When anything in it was, seconds by the clock."""
    used = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            used = max(used, path.stat().st_mtime)
    return used


@lru_cache(maxsize=16)
def _bucket(uri: str, service: S3) -> Bucket:
    return Bucket(uri, service)


def _corpus(place: Place, cache: Path) -> Path:
    """The folder of all commands at one address of one service."""
    address = "\0".join((place.service.resolved().endpoint, place.uri))
    return cache / "prepare" / hashlib.sha256(address.encode()).hexdigest()[:32]


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code"))


def _added(place: Place, path: Path) -> None:
    """Count in a file that lies in S3 as well, and now and then keep the bound."""
    most = ranged.cache_bytes()
    path.chmod(THERE)
    with ranged.room(place.folder):
        due = ranged.is_look_due(place.folder, path.stat().st_size, most)
    if due:
        ranged.trim(place.folder.rglob("*.*"), most, before=time.time() - SPARED, may_go=_is_there)


def _is_there(stats: os.stat_result) -> bool:
    """Whether a file lies in S3 as well."""
    return not stats.st_mode & stat.S_IWUSR
