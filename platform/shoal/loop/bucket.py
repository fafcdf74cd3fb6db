"""A capture in S3: the same folders and names in a bucket, and a copy on this machine's disk in which all work is done.

    gateway    journal ─> part, text, vote, on the disk as ever ─> thread: `push`, again and again until the bucket takes it
    reader     `pull`: what others pushed, and without what they removed ─> reads the copy as any capture

Notable: no request waits for the bucket. A part has the name of its gateway's journal, and of files that several append to,
each machine has its own in the bucket (``forgotten-NAME.jsonl``, ``votes-NAME.jsonl``): so nobody writes over another's. What
was sent is known by size and time of the file and by the bucket's tag, in ``.bucket.json``. What others wrote is written anew
only as it was fetched (If-Match): where they changed it since, theirs stands, and is fetched. A file that was sent, and is not
there though its day has its ``.sent``, was deleted, and goes from the bucket; to remove days, kinds or all of the copy costs a
download. Copies lie in SHOAL_CACHE, or ~/.cache/shoal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.data.ranged import cache
from shoal.data.sources import s3
from shoal.data.sources.s3 import told
from shoal.errors import DataError
from shoal.machine import aside, write_aside

STATE, LOCK = ".bucket.json", ".bucket.lock"
MARK = ".sent"  # in the folder of a day: what is not there any more was deleted, and not removed with the folder
OURS = re.compile(
    r"(?:(?:rows|texts|feedback)/day=\d{4}-\d\d-\d\d/[A-Za-z0-9][\w.-]*|forgotten-[\w-]+\.jsonl|tokens-\w+\.npz)",
    re.ASCII,
)
SHARED = ("rows/", "texts/", "feedback/")  # what several machines may write anew: who forgets does
REFUSED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404")
APPENDED = re.compile(r"(.*/)?(forgotten|votes)\.jsonl")  # on the disk; in the bucket with the name of its machine
SAVED = 50  # files after which it is noted what was sent


class Bucket:
    """The bucket of one capture, and its copy in `folder`."""

    def __init__(self, uri: str, service: s3.S3 | None = None) -> None:
        """Raises ConfigError for what is no URI."""
        self.uri = uri.rstrip("/")
        self._bucket, key = s3.split(self.uri)
        self._prefix = f"{key.strip('/')}/" if key.strip("/") else ""
        self.folder = cache() / "captures" / hashlib.sha256(self.uri.encode()).hexdigest()[:32]
        self._saved = ""  # as `STATE` holds it
        self.waiting = 0  # files that the bucket does not have yet, as of the last `push`
        self._service, self._made = service or s3.S3(), None

    @property
    def _client(self) -> Any:
        self._made = self._made or self._service.client()
        return self._made

    def begin(self, names: tuple[str, ...], make: Callable[[], dict[str, bytes]] | None) -> None:
        """See that the copy has the files `names`, of which the first is the bucket's once and for all. Where there are none,
        those that `make` gives, if anything does. Needs no bucket where the copy has them. Raises DataError."""
        if all((self.folder / name).is_file() for name in names):
            return
        with told(self.uri):
            found, _ = self._get(names[0])
            if found is None and make is None:
                return
            made = make() if make is not None else {}
            if found is None:
                first = self._put(names[0], made[names[0]], IfNoneMatch="*") is not None
                found = made[names[0]] if first else self._get(names[0])[0]
            files = {name: found if name == names[0] else self._get(name)[0] or made.get(name) for name in names}
            for name in names[1:] if make is not None else ():
                self._put(name, files[name] or b"", IfNoneMatch="*")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, data in files.items():
            if data is not None:
                with aside(self.folder / name) as beside:
                    beside.touch(0o600)
                    beside.write_bytes(data)

    def push(self, begins: str = "") -> int:
        """Send what the bucket does not have whose name begins so, what was forgotten first, and remove there what was removed
        here; returns how many files that were. What another machine has changed there meanwhile is fetched instead: what was
        to be done with it is to be done again. Raises DataError at the first that the bucket does not take; what was sent
        stays sent."""
        with self._alone() as state, told(self.uri):
            sent, count = state["sent"], 0
            here = {self._named(path, state): path for path in self._files()}
            wait = [name for name, path in here.items() if sent.get(name, [])[:2] != _stamp(path)]
            gone = [name for name in sent if name not in here]
            self.waiting = len(wait) + len(gone)
            for name in sorted(wait, key=lambda name: not name.startswith("forgotten")):
                if not name.startswith(begins):
                    continue
                if (path := here[name]).is_file():
                    stamp = _stamp(path)  # before it is read: what is appended meanwhile is sent the next time
                    only = {} if self._is_own(name, state) else _as_known(name, sent)
                    tag = self._put(name, path.read_bytes(), **only)
                    if tag is not None:
                        sent[name] = [*stamp, tag]
                    elif not self._fetched(name, state):  # it was removed there
                        path.unlink(missing_ok=True)
                        sent.pop(name, None)
                self.waiting, count = self.waiting - 1, count + 1
                if count % SAVED == 0:
                    self._save(state)
            for name in gone:
                if name.startswith(begins):
                    self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
                    del sent[name]
                    self.waiting, count = self.waiting - 1, count + 1
            return count

    def pull(self, begins: str = "", *, only: str = "", left: bool = False) -> int:
        """Fetch what others sent whose name `begins` so, and ends as `only` does, and remove what they removed; returns how
        many files that were. Days that went from here to make room (`leave`) come again where what they have `left` is asked
        for, or one of their files is named. Raises DataError."""
        with self._alone() as state, told(self.uri):
            sent, count = state["sent"], 0
            there = {
                name: tag
                for name, tag in self._listed(begins)
                if OURS.fullmatch(name) and not self._is_own(name, state)
            }
            if left:
                state["left"] = []
            hiding_first = sorted(there, key=lambda name: not name.startswith("forgotten"))
            for name in hiding_first:
                path = self.folder / name
                if not name.endswith(only) or (not only and name.rpartition("/")[0] in state["left"]):
                    continue
                # a text that is not there was deleted, which the bucket has not heard of
                is_here = path.is_file() or (name.startswith("texts/") and (path.parent / MARK).is_file())
                if name in sent and sent[name][2] == there[name] and is_here:
                    continue
                count += self._fetched(name, state)
            for name in [name for name in sent if name.startswith(begins) and name not in there]:
                path = self.folder / name
                if not self._is_own(name, state) and (not path.is_file() or _stamp(path) == sent[name][:2]):
                    path.unlink(missing_ok=True)
                    del sent[name]
                    count += 1
            return count

    def leave(self, folder: Path) -> bool:
        """Whether the bucket has all that lies in `folder`, which is below the copy; then it keeps it, though it is removed
        here."""
        with self._alone() as state:
            paths = [path for path in self._files() if folder in path.parents]
            names = [self._named(path, state) for path in paths]
            if any(state["sent"].get(name, [])[:2] != _stamp(path) for name, path in zip(names, paths, strict=True)):
                return False
            for name in names:
                del state["sent"][name]
            state["left"] = sorted({*state["left"], folder.relative_to(self.folder).as_posix()})
            return True

    # --- names --------------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        """What of the copy belongs into the bucket."""
        found = [path for kind in ("rows", "texts", "feedback") for path in (self.folder / kind).glob("day=*/[!.]*")]
        return [*found, *self.folder.glob("forgotten*.jsonl"), *self.folder.glob("tokens-*.npz")]

    def _named(self, path: Path, state: dict[str, Any]) -> str:
        name = path.relative_to(self.folder).as_posix()
        appended = APPENDED.fullmatch(name)
        return f"{appended[1] or ''}{appended[2]}-{state['name']}.jsonl" if appended else name

    def _is_own(self, name: str, state: dict[str, Any]) -> bool:
        return name.endswith(f"-{state['name']}.jsonl")

    # --- what was sent ------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[dict[str, Any]]:
        """What was sent, kept at the end however it ends; one process at a time."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._saved = (self.folder / STATE).read_text("utf-8")
                state = json.loads(self._saved)
            except FileNotFoundError:
                self._saved = ""
                state = {"name": secrets.token_hex(6), "sent": {}}
            except ValueError as error:
                raise DataError(f"{self.folder / STATE} cannot be read", do="remove it: all is sent again") from error
            state.setdefault("left", [])  # days that went to make room
            self._take_stock(state)
            try:
                yield state
            finally:
                self._save(state)

    def _take_stock(self, state: dict[str, Any]) -> None:
        """Forget that was sent what somebody removed to make room, so that the bucket keeps it. Where that was of what this
        machine appends to, it has another name from then on: what it begins anew takes the place of nothing there."""
        own, lost = f"-{state['name']}.jsonl", list[str]()
        for name in state["sent"]:
            path = self.folder / name
            path = path.with_name(path.name.removesuffix(own) + ".jsonl") if name.endswith(own) else path
            if not ((path.parent / MARK).is_file() or path.is_file()):
                lost.append(name)
        for name in lost:
            del state["sent"][name]
        if any(self._is_own(name, state) for name in lost):
            state["name"] = secrets.token_hex(6)

    def _save(self, state: dict[str, Any]) -> None:
        for folder in {(self.folder / name).parent for name in state["sent"]} - {self.folder}:
            if folder.is_dir():
                (folder / MARK).touch(0o600)
        if (text := json.dumps(state) + "\n") != self._saved:
            write_aside(self.folder / STATE, text, sync=True)
            self._saved = text

    # --- the bucket ---------------------------------------------------------------------------------------------------

    def _listed(self, begins: str) -> Iterator[tuple[str, str]]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + begins):
            for item in page.get("Contents", ()):
                yield item["Key"][len(self._prefix) :], item["ETag"]

    def _fetched(self, name: str, state: dict[str, Any]) -> bool:
        """Whether the bucket has it; then the copy has it as it is there."""
        path, (data, tag) = self.folder / name, self._get(name)
        if data is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with aside(path) as beside:
            beside.touch(0o600)
            beside.write_bytes(data)
        state["sent"][name] = [*_stamp(path), tag]
        return True

    def _get(self, name: str) -> tuple[bytes | None, str]:
        """What it holds, and its tag; None where there is none."""
        try:
            answer, data = s3.got(self._client, Bucket=self._bucket, Key=self._prefix + name)
            return data, str(answer["ETag"])
        except self._client.exceptions.NoSuchKey:
            return None, ""

    def _put(self, name: str, data: bytes, **only: str) -> str | None:
        """Put it there, `only` where S3 finds this so (IfMatch, IfNoneMatch); its tag, or None where it did not."""
        from botocore.exceptions import ClientError

        try:
            answer = self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data, **only)
        except ClientError as error:
            if only and error.response.get("Error", {}).get("Code") in REFUSED:
                return None
            raise
        return str(answer["ETag"])


def _as_known(name: str, sent: dict[str, list[Any]]) -> dict[str, str]:
    """On what condition a file of the copy takes the place of the bucket's."""
    if not name.startswith(SHARED):
        return {}
    return {"IfMatch": sent[name][2]} if name in sent else {"IfNoneMatch": "*"}


def _stamp(path: Path) -> list[int]:
    """What tells whether a file has changed; of none nothing does."""
    try:
        known = path.stat()
    except FileNotFoundError:
        return []
    return [known.st_size, known.st_mtime_ns]
