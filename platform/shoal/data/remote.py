"""Finished corpora in S3: copied in before they are read, as shards are mapped. Of one for which the cache (SHOAL_CACHE_BYTES,
64 GiB) has no room, the shards stay there and are read by range (`ranged`). How one is made there says `place`.

    pretrain --data s3://... local(uri):  index.json first, then what it lists, checked by sha256; index.json is written last

Notable: the local copy is named by the index's hash. So a corpus is fetched once by a machine, however many workers ask for
it, and one that was made anew under the same URI is another. Copies lie in SHOAL_CACHE, or ~/.cache/shoal, within its bound
(`copies`); removing one that no process uses costs a download.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from shoal.data import copies
from shoal.data.alone import alone
from shoal.data.ranged import ORIGIN, cache, cache_bytes, room, write_origin
from shoal.data.shards import INDEX, TOKENIZER, Index, read_index
from shoal.data.sources import s3
from shoal.data.sources.s3 import S3, is_remote, told
from shoal.errors import DataError, ResourceError
from shoal.machine import aside, sha256_of

FILES = (".jsonl",)  # what the names of files end in that are no corpora


def is_corpus(place: str | Path) -> bool:
    """Whether it is the prefix of a corpus in S3, and no file there."""
    return is_remote(place) and not str(place).endswith(FILES)


def absolute(place: str | Path) -> str:
    """`place` wherever it is read from: a URI as it is, a path from the root on."""
    return str(place) if is_remote(place) else str(Path(place).absolute())


def exists(uri: str, service: S3) -> bool:
    """Whether a finished corpus lies at `uri`. Raises DataError where that cannot be found out."""
    bucket, key = _split(uri)
    with told(uri):
        client = service.client()
        client.head_bucket(Bucket=bucket)
        found = client.list_objects_v2(Bucket=bucket, Prefix=f"{key}{INDEX}", MaxKeys=1)
    return any(item["Key"] == f"{key}{INDEX}" for item in found.get("Contents", ()))


def local(place: str | Path, service: S3 | None = None) -> Path:
    """A local folder or file as it is; of ``s3://...``, the folder of its copy, fetched when it is not there, or the copy of a
    `.jsonl`.

    Raises DataError when there is no finished corpus or file, or what came is not what its index says.
    """
    if not is_remote(place):
        return Path(place)
    uri, service = str(place), service or S3()
    if not is_corpus(place):
        return _file(uri, service)
    bucket, key = _split(uri)
    if not exists(uri, service):
        raise DataError(f"{uri} holds no prepared corpus", do="run `shoal prepare --out` on it")
    with told(uri):
        client = service.client()
        _, index = s3.got(client, Bucket=bucket, Key=f"{key}{INDEX}")
        folder = cache() / "corpora" / hashlib.sha256(index).hexdigest()[:32]
        with _fetching(folder):
            if not _is_complete(folder):
                files = _files(client, bucket, key)
                copies.tidy(folder, {*files, ORIGIN})
                with aside(folder / INDEX) as beside:
                    beside.write_bytes(index)
                    listed = index_of(uri, beside)
                    here = {shard.file: shard.sha256 for shard in listed.shards}
                    with copies.reserved(folder, _missing(folder, files)) as fits:
                        if fits:
                            (folder / ORIGIN).unlink(missing_ok=True)
                        else:
                            write_origin(folder, uri, service)
                            files = {name: size for name, size in files.items() if name not in here}
                            copies.tidy(folder, {*files, ORIGIN, beside.name})
                            here = {}
                        _fetch(client, bucket, key, folder, files)
                        _check(folder, here | {TOKENIZER: listed.tokenizer_sha256}, uri)
            elif (folder / ORIGIN).is_file():
                write_origin(folder, uri, service)  # the same corpus may lie elsewhere too, and be gone there
    return folder


def _file(uri: str, service: S3) -> Path:
    """The copy of a file, which has another place when the file is another."""
    bucket, key = s3.split(uri)
    with told(uri):
        client = service.client()
        found = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
        if not found or found[0]["Key"] != key:
            raise DataError(f"{uri} is missing", do="give the address of a file that is there")
        digest = hashlib.sha256("\0".join((service.resolved().endpoint, uri, found[0]["ETag"])).encode())
        folder = cache() / "files" / digest.hexdigest()[:32]
        copy = folder / PurePosixPath(key).name
        with _fetching(folder):
            size = found[0]["Size"]
            if not _is_whole(copy, size):
                copies.tidy(folder, ())
                with copies.reserved(folder, size) as fits:
                    if not fits:
                        allowed = f"{cache_bytes()}, with what is in use"
                        raise ResourceError(
                            f"{uri} does not fit the cache",
                            got=f"{size} bytes",
                            allowed=allowed,
                            do="set SHOAL_CACHE_BYTES higher",
                        )
                    client.download_file(bucket, key, str(copy))  # renamed when it is complete
                if client.head_object(Bucket=bucket, Key=key)["ETag"] != found[0]["ETag"]:
                    copy.unlink()  # it may be the one or the other
                    raise DataError(f"{uri} was replaced while it was fetched", do="run it again")
    return copy


def index_of(uri: str, path: Path) -> Index:
    """The index of the corpus at `uri`, of which `path` is a copy. Raises DataError that names it there."""
    try:
        return read_index(path)
    except DataError as error:
        raise DataError(str(error).replace(str(path), f"{uri.rstrip('/')}/{INDEX}")) from error


def _files(client: Any, bucket: str, key: str) -> dict[str, int]:
    """Bytes of the files of a corpus in S3, by name, but of its index; it has no folders."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
        for item in page.get("Contents", ()):
            name = item["Key"][len(key) :]
            if name not in ("", INDEX, ORIGIN) and name == PurePosixPath(name).name and not name.startswith("."):
                found[name] = int(item["Size"])
    return found


def _fetch(client: Any, bucket: str, key: str, folder: Path, files: Mapping[str, int]) -> None:
    """Those of `files` that are not there in full size."""
    for name, size in files.items():
        if not _is_whole(folder / name, size):
            client.download_file(bucket, f"{key}{name}", str(folder / name))  # renamed when it is complete


def _missing(folder: Path, files: Mapping[str, int]) -> int:
    """Bytes that `_fetch` would fetch."""
    return sum(size for name, size in files.items() if not _is_whole(folder / name, size))


def _is_complete(folder: Path) -> bool:
    """Whether a copy is there, its shards in full size where they are to be here: of a machine that stopped before they were on
    the disk they may not be."""
    with suppress(DataError):
        index = read_index(folder / INDEX)
        return (folder / ORIGIN).is_file() or all(_is_whole(folder / shard.file, shard.size) for shard in index.shards)
    return False


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check(folder: Path, made: Mapping[str, str], uri: str) -> None:
    """Raises DataError when one of the files `made`, which have these sha256, is not the one that was made: it is removed, and
    fetched again next time."""
    for name, sha256 in made.items():
        if not (folder / name).is_file():
            raise DataError(f"{uri}: {name} is missing", do="prepare it again")
        found = sha256_of(folder / name)
        if found != sha256:
            (folder / name).unlink()
            raise DataError(f"{uri}: sha256 of {name}", got=found, allowed=sha256, do="prepare it again")


def _split(uri: str) -> tuple[str, str]:
    """Bucket, and the prefix with a slash at its end or empty."""
    bucket, key = s3.split(uri)
    return bucket, f"{key.strip('/')}/" if key.strip("/") else ""


@contextmanager
def _fetching(folder: Path) -> Iterator[None]:
    """One process at a time fetches the copy `folder`, which this one uses; the others wait for it, and find it done. Raises
    ResourceError where the disk is full."""
    busy = ResourceError(f"{folder} is being written", do="wait for it")
    with room(folder), alone(folder.with_suffix(".lock"), busy, wait=math.inf):
        folder.mkdir(exist_ok=True)
        copies.use(folder)
        yield
