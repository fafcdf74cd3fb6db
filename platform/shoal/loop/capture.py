"""The folder in which a service keeps what it captures, and how it is read:

    CAPTURE/capture.json                 format and version; another version is refused
            salt                         what subjects are hashed with; without it they are nobody
            rows/day=2026-11-27/part-JOURNAL.parquet      written aside and renamed
            texts/day=.../               of requests that were stored; apart, for it has rights and days of its own
            feedback/day=.../            votes and corrections
            journal/JOURNAL.jsonl        a line a request, until its part is made (`writer`)
            forgotten.jsonl              ids and subjects that no reader sees from now on

Notable: a part has its journal's name, so what lies in both for a moment is read once. ``pyarrow.dataset`` and Ray Data read
``rows/`` as it is. Of a capture in S3 that folder is a copy (`bucket`).
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shoal.data.sources.s3 import is_remote
from shoal.errors import DataError, first_line
from shoal.loop.bucket import Bucket
from shoal.loop.rows import COPIES, SCHEMA, table_of
from shoal.machine import see_on_disk, write_aside

FORMAT, VERSION = "shoal.capture", 1
ABOUT, SALT, ROWS, TEXTS, FEEDBACK, JOURNAL, FORGOTTEN = (
    "capture.json",
    "salt",
    "rows",
    "texts",
    "feedback",
    "journal",
    "forgotten.jsonl",
)
SALT_BYTES = 32
DAY = re.compile(r"day=(\d{4}-\d\d-\d\d)")


def day_of(at: int) -> str:
    """The day of `at` (ms since 1970), in UTC: 2026-11-27."""
    return datetime.fromtimestamp(at / 1000, UTC).date().isoformat()


def now_ms() -> int:
    """The present, in ms since 1970."""
    return round(datetime.now(UTC).timestamp() * 1000)


def keyed(salt: bytes, text: str) -> str:
    """A hash of `text` that nobody makes without the `salt`: 32 hexadecimal digits."""
    return hmac.digest(salt, text.encode("utf-8", "surrogateescape"), "sha256").hex()[:32]


def talk(salt: bytes, text: str) -> str:
    """Which talk it is that begins with `text`: as `keyed`, 16 digits, by a hash that takes a quarter of the time."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), key=salt, digest_size=8).hexdigest()


def subject(salt: bytes, key: str | None, user: str | None) -> str | None:
    """Who asked: the `user` that requests of the key of this name give; None where neither is known."""
    return None if key is None and user is None else keyed(salt, f"{key or ''}\0{user or ''}")


@dataclass
class Forgotten:
    """Whose rows no reader sees."""

    ids: set[str] = field(default_factory=set)
    subjects: set[str] = field(default_factory=set)

    def hides(self, row: dict[str, Any]) -> bool:
        """Whether what is kept of `row` belongs to one of them."""
        return row.get("id") in self.ids or row.get("subject") in self.subjects

    def seen(self, table: pa.Table) -> pa.Table:
        """`table` without their rows; the table itself where it has none."""
        if not (self.ids or self.subjects) or not table.num_rows:
            return table
        hidden = pc.is_in(table["id"], pa.array([*self.ids], pa.string()))
        if "subject" in table.column_names:
            hidden = pc.or_(hidden, pc.is_in(table["subject"], pa.array([*self.subjects], pa.string())))
        return table.filter(pc.invert(hidden)) if pc.any(hidden).as_py() else table


class Capture:
    """A folder of captured rows."""

    def __init__(self, folder: str | Path, *, create: bool = False) -> None:
        """With `create` an empty or missing folder becomes one. Raises DataError for a folder that is none, is of another
        version, or cannot be read or made."""
        self.bucket = Bucket(str(folder)) if is_remote(folder) else None
        self.folder = Path(folder) if self.bucket is None else self.bucket.folder
        about = self.folder / ABOUT
        if self.bucket is not None:
            self.bucket.begin((SALT, ABOUT), _first if create else None)
        try:
            if create and not about.exists():
                self._make(about)
            found = json.loads(about.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(
                "capture", got=f"{folder}: no {ABOUT}", do="give the folder of shoal serve --capture"
            ) from None
        except OSError as error:
            raise DataError(
                "capture", got=f"{folder}: {error.strerror}", allowed="a folder to read and write"
            ) from error
        except ValueError as error:
            raise DataError("capture", got=f"{about}: not JSON", do="give another folder") from error
        got = (found.get("format"), found.get("version")) if isinstance(found, dict) else (None, None)
        if got != (FORMAT, VERSION):
            told = f"{folder}: {got[0]} {got[1]}"
            raise DataError(
                "capture", got=told, allowed=f"{FORMAT} {VERSION}", do="give another folder, or that version of Shoal"
            )
        self._hidden: tuple[list[Any], Forgotten] = [], Forgotten()  # what was read, and of which files
        for name in (ROWS, JOURNAL) if self.bucket is not None else ():
            (self.folder / name).mkdir(exist_ok=True)
        if not create:
            self.fresh()

    def fresh(self) -> None:
        """See what others have sent, where it is in S3. Raises DataError where the bucket does not answer."""
        if self.bucket is not None:
            self.bucket.pull(left=True)

    def sent(self, begins: str = "") -> None:
        """Send what was changed here whose name begins so, where it is in S3. Raises DataError where the bucket does not
        answer."""
        if self.bucket is not None:
            self.bucket.push(begins)

    def _make(self, about: Path) -> None:
        """An empty capture; what is there already stays. `capture.json` comes last: where it is, all is."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        others = [path.name for path in self.folder.iterdir() if path.name not in (SALT, ROWS, JOURNAL)]
        if about.exists():  # another gateway that starts now was quicker
            return
        if any(not name.startswith(".") for name in others):
            raise DataError("capture", got=f"{self.folder} holds other files", do="give a folder of its own")
        for name in (ROWS, JOURNAL):
            (self.folder / name).mkdir(exist_ok=True)
        beside = self.folder / f".{SALT}.{secrets.token_hex(4)}"
        try:
            descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(_first()[SALT].decode())
            os.link(beside, self.folder / SALT)  # in full or not at all; another's stays
        except FileExistsError:
            pass
        finally:
            beside.unlink(missing_ok=True)
        write_aside(about, _first()[ABOUT].decode())

    @property
    def salt(self) -> bytes:
        """What subjects and conversations are hashed with. Raises DataError where it is lost."""
        try:
            found = bytes.fromhex((self.folder / SALT).read_text("ascii").strip())
            if len(found) != SALT_BYTES:  # a hash with nothing is anybody's to make
                raise ValueError(f"{len(found)} bytes")
            return found
        except (OSError, ValueError) as error:
            raise DataError(
                "capture", got=f"no {SALT} in {self.folder}", do="put it back: subjects are hashed with it"
            ) from error

    # --- reading ------------------------------------------------------------------------------------------------------

    def days(self, kind: str = ROWS) -> list[str]:
        """The days that have parts of this kind, oldest first."""
        folder = self.folder / kind
        names = (DAY.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
        return sorted(found[1] for found in names if found and any((folder / found[0]).glob("[!.]*")))

    def rows(
        self,
        days: int | None = None,
        *,
        since: int | None = None,
        columns: Iterable[str] | None = None,
        copies: bool = False,
    ) -> pa.Table:
        """The rows of requests of the last `days` days that have any [all], those of `since` (ms, 1970) and later, by the time
        at which they ended; those in journals too, none that is forgotten, and of copies (`rows.COPIES`) only with `copies`. A
        table of `rows.SCHEMA`, or of its `columns`. Raises DataError for a part that cannot be read."""
        wanted = list(columns) if columns is not None else SCHEMA.names
        needed = [*dict.fromkeys([*wanted, "id", "subject", "at", "role"])]
        journals = dict(self.journals())  # before the parts: what becomes a part meanwhile is known by its name
        open_ = [table_of(lines).select(needed) for lines in journals.values()]
        tables = [self._part(path, needed) for path in self.parts() if journal_of(path) not in journals]
        table = self.forgotten().seen(pa.concat_tables([SCHEMA.empty_table().select(needed), *open_, *tables]))
        if not copies:
            table = table.filter(pc.invert(pc.is_in(table["role"], pa.array(COPIES))))
        if since is not None:
            table = table.filter(pc.greater_equal(table["at"], since))
        if days is not None and table.num_rows:
            each = pc.divide(table["at"], 86_400_000)
            kept = pc.unique(each).sort("descending")[:days]
            table = table.filter(pc.is_in(each, kept))
        return table.take(pc.sort_indices(table, [("at", "ascending")])).select(wanted)

    def parts(self, kind: str = ROWS) -> list[Path]:
        """The files of this kind, by day and name."""
        return [
            path
            for day in self.days(kind)
            for path in sorted((self.folder / kind / f"day={day}").glob("part-*.parquet"))
        ]

    def journals(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Name and lines of each journal whose part is not made yet."""
        for path in sorted((self.folder / JOURNAL).glob("*.jsonl")):
            try:
                yield path.stem, lines_of(path)
            except FileNotFoundError:
                continue  # it has become a part

    def _part(self, path: Path, columns: list[str]) -> pa.Table:
        """A part in the columns of today; those that it does not have are null."""
        try:
            file = pq.ParquetFile(path)
            found = file.read([name for name in columns if name in file.schema_arrow.names])
        except FileNotFoundError:  # its day went since it was listed, or all that it had was forgotten
            return SCHEMA.empty_table().select(columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError("capture", got=f"{path}: {first_line(error)}", do="move that part away") from error
        arrays = [
            found[name].cast(SCHEMA.field(name).type)
            if name in found.column_names
            else pa.nulls(found.num_rows, SCHEMA.field(name).type)
            for name in columns
        ]
        return pa.table(arrays, schema=pa.schema([SCHEMA.field(name) for name in columns]))

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def forgotten(self) -> Forgotten:
        """Whose rows no reader may see. Read again where the files have changed: each text that is found asks for it."""
        paths = (self.folder / FORGOTTEN, *sorted(self.folder.glob("forgotten-*.jsonl")))  # and of other machines
        files = [(path, stamp) for path in paths if (stamp := _stamp(path))]  # before they are read
        known, found = self._hidden
        if files == known:
            return found
        lines = [line for path, _ in files for line in lines_of(path)]
        found = Forgotten({str(line["id"]) for line in lines if line.get("id")},
                          {str(line["subject"]) for line in lines if line.get("subject")})  # fmt: skip
        self._hidden = files, found
        return found


def _first() -> dict[str, bytes]:
    """The files of a capture that nobody has begun."""
    about = json.dumps({"format": FORMAT, "version": VERSION}) + "\n"
    return {SALT: secrets.token_hex(32).encode(), ABOUT: about.encode()}


def held(path: Path) -> int:
    """A descriptor of the file `path`, to append to, which nobody else holds until it is closed. Raises OSError."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # another file took its name while it was waited for


def append(path: Path, line: dict[str, Any], unless: Callable[[], bool] = lambda: False, *, sync: bool = False) -> None:
    """One more line of JSON in `path`, whole, whoever else appends; none where `unless`, asked while nobody else writes there,
    says so. With `sync` a power cut does not take it back. Raises OSError."""
    data = (json.dumps(line, separators=(",", ":")) + "\n").encode()
    descriptor = held(path)
    try:
        if unless():
            return
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data  # a line that a machine was lost over ends here: this one is not lost with it
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, size)
            raise OSError(28, "No space left on device")
        if sync:
            os.fsync(descriptor)
            see_on_disk(path.parent)
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells that a file, which only grows or is replaced, has changed; of none nothing does."""
    try:
        known = path.stat()
    except FileNotFoundError:
        return ()
    return known.st_ino, known.st_size, known.st_mtime_ns


def journal_of(part: Path) -> str:
    """The name of the journal that a part was made of."""
    return part.stem.removeprefix("part-")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal. One that a machine was lost over, in the middle or at the end, is left out. Raises
    FileNotFoundError."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
