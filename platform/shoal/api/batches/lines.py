"""The lines of a batch: requests in, answers and errors out; the same for `/v1/batches` and for ``shoal batch``.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}                              in
    {"id": "batch_req_..._1", "custom_id": "a", "response": {"status_code": 200, "body": {...}, ...}, "error": null}
    {"id": "batch_req_..._2", "custom_id": null, "response": null, "error": {"code": ..., "message": ..., "line": 2}}

Notable: the id of an answer ends in the number of its line, so what was written says which lines need no asking again.
"""

from __future__ import annotations

import codecs
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

from shoal.api.batches.shapes import Endpoint
from shoal.api.json_text import dumps, loads
from shoal.errors import RequestError, did_you_mean

ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
LONGEST_ID = 512  # characters of a custom_id
FIELDS = ("custom_id", "method", "url", "body")
CHUNK = 2**20


class LineError(RequestError):
    """A line that is no request; `custom_id` where it has one."""

    custom_id: str | None = None


@dataclass(frozen=True)
class Line:
    """One request: `number` is its line in the file, from 1; `body` is JSON."""

    number: int
    custom_id: str
    url: str
    body: bytes


def read(file: IO[bytes], most_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of those that hold something: without the mark that some programs put at the beginning of UTF-8,
    without line feeds, the last one also where it has none. None for a line of more than `most_bytes`, of which no more are
    held."""
    return ((number, text) for number, _, text in read_at(file, most_bytes))


def read_at(file: IO[bytes], most_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """As `read`, with the byte of `file` at which each begins between the two."""
    number, start, end = 0, 0, 0
    while line := file.readline(most_bytes + 3):  # with CR, LF, and one that is too many
        number, start, end = number + 1, end, end + len(line)
        whole = line.endswith(b"\n")
        while not whole and (rest := file.readline(CHUNK)):  # the rest of one that is too long
            line, whole, end = b"", rest.endswith(b"\n"), end + len(rest)
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        text = line.strip()
        if not line or len(text) > most_bytes:
            yield number, start, None
        elif text:
            yield number, start, text


def parse(number: int, text: bytes | None, url: str | None) -> Line:
    """The request in a line. `url`: the only one that it may be for; None: any of `ENDPOINTS`. Raises LineError."""
    if text is None:
        raise _wrong(None, "the line", code="line_too_long", do="send a shorter one")
    try:
        values = loads(text, "the line")
    except RequestError as error:
        raise _wrong(None, error.message) from None
    if not isinstance(values, dict):
        raise _wrong(None, "the line", got=type(values).__name__, allowed="a JSON object")
    name = values.get("custom_id")
    known = name if isinstance(name, str) and 0 < len(name) <= LONGEST_ID else None
    for field in values:
        if field not in FIELDS:
            hint = did_you_mean(field, FIELDS)
            raise _wrong(known, "unknown field", got=field[:80], allowed=None if hint else FIELDS, do=hint)
    if known is None:
        raise _wrong(None, "custom_id", got=_short(name), allowed=f"a text of 1 to {LONGEST_ID} characters")
    if values.get("method") != "POST":
        raise _wrong(known, "method", got=_short(values.get("method")), allowed="POST")
    if values.get("url") not in ((url,) if url else ENDPOINTS):
        what = url or ENDPOINTS
        raise _wrong(known, "url", code="mismatched_endpoint", got=_short(values.get("url")), allowed=what)
    body = values.get("body")
    if not isinstance(body, dict):
        raise _wrong(known, "body", got=type(body).__name__, allowed="a JSON object")
    if body.get("stream"):
        raise _wrong(known, "body.stream", do="leave it out: an answer is a line")
    return Line(number, known, values["url"], dumps(body))


def parse_new(number: int, text: bytes | None, url: str | None, seen: set[str]) -> Line:
    """As `parse`, and of a custom_id that is not yet among those `seen`, where it is put. Raises LineError."""
    line = parse(number, text, url)
    if line.custom_id in seen:
        do = "give each line one of its own"
        raise _wrong(line.custom_id, "custom_id", code="duplicate_custom_id", got=line.custom_id[:80], do=do)
    seen.add(line.custom_id)
    return line


def answered(line_id: str, custom_id: str, status: int, request_id: str, body: bytes, unused: list[str]) -> bytes:
    """The line of an answer, `body`, which is JSON; `unused`: fields of the request that changed nothing."""
    head: dict[str, Any] = {"status_code": status, "request_id": request_id}
    head |= {"unused": unused} if unused else {}
    before = dumps({"id": line_id, "custom_id": custom_id, "response": head})
    return before.removesuffix(b"}}") + b',"body":' + body + b'},"error":null}\n'


def refused(line_id: str, custom_id: str | None, code: str, message: str, line: int) -> bytes:
    """The line of a request that was not run, and why."""
    error = {"code": code, "message": f"line {line}: {message}", "line": line}
    return dumps({"id": line_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"


def number_of(line: bytes) -> int | None:
    """The number of the line that an answer is to; None where it is none."""
    try:
        values = json.loads(line)
        return int(values["id"].rpartition("_")[2])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


class Log:
    """A file of lines that only grows. What a crash or a full disk tore is taken away, so that each line begins on its own."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises OSError."""
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._lock = threading.Lock()
        self.numbers: set[int] = set()  # of the lines that it has something about
        self._end = 0
        with path.open("rb") as file:
            for line in file:
                number = number_of(line) if line.endswith(b"\n") else None
                if number is None:
                    break
                self._end += len(line)
                self.numbers.add(number)
        self._file.truncate(self._end)

    def __len__(self) -> int:
        return len(self.numbers)

    def append(self, number: int, line: bytes) -> None:
        """Adds what is said of line `number`, unless something is there already. Raises OSError, and then nothing was added."""
        with self._lock:
            if number in self.numbers:
                return
            try:
                self._file.seek(self._end)
                left = memoryview(line)
                while left:
                    left = left[self._file.write(left) :]
            except BaseException:
                self._file.truncate(self._end)
                raise
            self._end += len(line)
            self.numbers.add(number)

    def close(self) -> None:
        """After this what was appended is on the disk. Raises OSError, and is closed all the same."""
        with self._lock:
            if self._file.closed:
                return
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()


def _short(value: object) -> object:
    return value[:80] if isinstance(value, str) else value if isinstance(value, (int, float)) else type(value).__name__


def _wrong(custom_id: str | None, what: str, *, code: str = "invalid_line", **more: Any) -> LineError:
    error = LineError(what, **more)
    error.custom_id, error.code = custom_id, code
    return error
