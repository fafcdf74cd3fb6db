"""The files of a tar, and which of them belong together: the samples of a WebDataset.

Notable: what is held is one image, one text and one ``.json`` at once, whatever an archive holds. All else goes on as it comes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, Literal

import pyarrow as pa

from shoal.data.documents import SourceSpec
from shoal.data.sources.files import Unusable, left_out, printable
from shoal.data.sources.kinds import IMAGES, is_read
from shoal.data.sources.rows import KNOWN, MAX_ROW, Fields, parsed

MAX_HEADER = 2**20  # bytes of the name and the notes of a member
MAX_FIELDS = 64  # members of a sample that are not read (``.cls``), until more of them are no sample's

Role = Literal["image", "text", "fields"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(IMAGES, "image"),
    **dict.fromkeys((".txt", ".text", ".caption"), "text"),
    ".json": "fields",
}


@dataclass(frozen=True)
class Member:
    """One file of an archive; its data, or why it has none."""

    name: str
    data: bytes | Unusable
    left_out: bool = False  # by its name

    def read(self) -> bytes:
        """Raises Unusable."""
        if isinstance(self.data, Unusable):
            raise self.data
        return self.data


@dataclass
class Sample:
    """Neighbours in an archive whose names are equal up to the first dot, `key`, with an image or a ``.json`` among them."""

    key: str = ""
    parts: dict[Role, Member] = field(default_factory=dict)
    _suffixes: set[str] = field(default_factory=set)
    _others: list[Member] = field(default_factory=list)  # that are not read, without their data

    def take(self, suffix: str, member: Member) -> Iterator[Member | Sample]:
        """Keep a member that belongs here; yields those that stand for themselves."""
        role = ROLES.get(suffix)
        if role and role not in self.parts:
            self.parts[role] = member
            self._suffixes.add(suffix)
        elif role == "image":  # the same picture in another format, or another one: neither is lost
            yield Sample(member.name, {"image": member})
        elif role or is_read(member.name):
            yield member
        else:
            self._others.append(Member(member.name, b""))
            if len(self._others) > MAX_FIELDS:
                yield from self._rest()

    def done(self) -> Iterator[Member | Sample]:
        """The sample, or its members where it is none."""
        if self.parts.keys() & {"image", "fields"}:
            yield self
        else:
            yield from self.parts.values()
        yield from self._rest()

    def has(self, suffix: str) -> bool:
        return suffix in self._suffixes

    def fields(self) -> dict[str, Any]:
        """The sample as a row, but for its text. Raises Unusable."""
        row: dict[str, Any] = {}
        if "fields" in self.parts:
            found: Fields | Unusable = parsed(self.parts["fields"].read())
            if isinstance(found, Unusable):
                raise found
            row = {name: value for name, value in found.items() if name in KNOWN and name != "image"}
        if "image" in self.parts:
            row["image"] = self.parts["image"].read()
        return row

    def _rest(self) -> list[Member]:
        rest, self._others = self._others, []
        return rest


def samples(found: Iterable[Member]) -> Iterator[Member | Sample]:
    """The samples of an archive, and the members that belong to none, in order. Raises what `found` raises, after what came
    before it."""
    sample = Sample()
    try:
        for member in found:
            if member.left_out:
                yield member
                continue
            folder, slash, last = member.name.rpartition("/")
            stem, dot, rest = last.partition(".")
            key, suffix = folder + slash + stem, dot + rest.lower()
            if key != sample.key or sample.has(suffix):
                yield from sample.done()
                sample = Sample(key)
            yield from sample.take(suffix, member)
    except Exception:
        yield from sample.done()
        raise
    yield from sample.done()


class _Header(tarfile.TarInfo):
    """A header that is checked as it is read. tarfile takes a broken one for the end, and holds the notes of a member (a long
    name, what pax adds) whatever their size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf).strip(b"\0"):
                raise tarfile.ReadError("broken header") from error
            raise  # the end
        if info.size < 0 or (info.size > MAX_HEADER and not info.isfile()):
            raise tarfile.ReadError("size in a header")
        return info


def members(stream: IO[bytes], spec: SourceSpec) -> Iterator[Member]:
    """The files of a tar, or of several one after the other, in order; of those that are left out the
    names alone. Raises Unusable where the archive is broken."""
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header, ignore_zeros=True) as tape:
            while info := tape.next():
                tape.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them to the end
                if info.isdir():
                    continue
                reasons = filter(None, (left_out(part, spec) for part in PurePosixPath(info.name).parts))
                reason = next(reasons, "")
                data = Unusable(reason) if reason else _data(tape, info)
                yield Member(printable(info.name), data, left_out=bool(reason))
    except (OSError, pa.ArrowException):  # of what it is stored in
        raise
    except Exception as error:  # tarfile meets broken numbers, names and notes with errors of many kinds
        raise Unusable("broken archive") from error


def _data(tape: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | Unusable:
    opened = tape.extractfile(info) if info.isfile() else None
    if opened is None:
        return Unusable("not a regular file")
    if info.size > MAX_ROW:
        return Unusable(f"larger than {MAX_ROW >> 20} MiB")
    return opened.read()
