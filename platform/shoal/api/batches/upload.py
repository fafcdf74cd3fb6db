"""A form with a file in it (multipart/form-data), whose file goes to the disk as it comes."""

from __future__ import annotations

import asyncio
from typing import IO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from shoal.api.client import ClientGone
from shoal.api.wire import BodyTooLargeError, MediaTypeError
from shoal.errors import DeadlineError, RequestError, did_you_mean

FIELDS = ("file", "purpose")
REFUSED = {"expires_after": "files are kept until they are deleted"}
LONGEST_FIELD = 1024  # bytes of a field that is no file
LONGEST_NAME = 255
SECONDS = 600.0  # for all of it to come


async def receive(request: Request, to: IO[bytes], most: int) -> tuple[str, dict[str, str]]:
    """Writes the file of the form to `to`, `most` bytes at the most, and returns its name, and the other fields. Raises
    MediaTypeError, BodyTooLargeError, DeadlineError, ClientGone, RequestError naming the field; OSError of the disk."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise MediaTypeError("Content-Type", got=kind.decode("latin-1")[:80], allowed="multipart/form-data")
    form = _Form(options[b"boundary"], most)
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():
                if data := form.take(chunk):
                    await asyncio.to_thread(_write, to, data)
    except TimeoutError:
        raise DeadlineError("the body did not arrive", do=f"send it within {SECONDS:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return form.end()


def _write(to: IO[bytes], data: bytes) -> None:
    to.write(data)


class _Form:
    """What has come of a form."""

    def __init__(self, boundary: bytes, most: int) -> None:
        self._most, self._size = most, 0
        self._filename: str | None = None  # of the part that comes, as the four after it
        self._name, self._header, self._value = "", b"", b""
        self._data = bytearray()
        self._taken = bytearray()  # of the file, from the chunk that comes
        self._ended = False
        self._file: str | None = None
        self._fields: dict[str, str] = {}
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part,
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _broken(error) from None

    def take(self, chunk: bytes) -> bytes:
        """What of the file is in `chunk`."""
        self._taken = bytearray()
        if chunk:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise _broken(error) from None
        return bytes(self._taken)

    def end(self) -> tuple[str, dict[str, str]]:
        """The name of the file and the other fields, once all has come."""
        if not self._ended:
            raise RequestError("the form is cut off", do="send it to its last boundary")
        if self._file is None:
            raise RequestError("file is missing", param="file")
        if not self._size:
            raise RequestError("the file is empty", param="file")
        return self._file, self._fields

    # --- what the parser calls ----------------------------------------------------------------------------------------

    def _part(self) -> None:
        self._name, self._filename, self._header, self._value = "", None, b"", b""
        self._data = bytearray()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value.decode("latin-1"))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            filename = options.get(b"filename")
            self._filename = None if filename is None else _printable(filename.decode("utf-8", "replace"))
        self._header, self._value = b"", b""

    def _on_headers(self) -> None:
        name = self._name.partition("[")[0]
        if name in REFUSED:
            raise RequestError(f"{name}: not supported; {REFUSED[name]}", param=name)
        if self._name not in FIELDS:
            hint = did_you_mean(self._name, FIELDS)
            raise RequestError("unknown field", param=self._name[:80], got=self._name[:80], allowed=FIELDS, do=hint)
        if self._name in self._fields or (self._name == "file" and self._file is not None):
            raise RequestError(f"{self._name} is given twice", param=self._name)
        if self._name == "file":
            self._file = self._filename or "file"

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._size += end - start
            if self._size > self._most:
                raise BodyTooLargeError("the file is too large", param="file", allowed=f"at most {self._most} bytes")
            self._taken += data[start:end]
            return
        self._data += data[start:end]
        if len(self._data) > LONGEST_FIELD:
            raise RequestError(self._name, param=self._name, allowed=f"at most {LONGEST_FIELD} bytes")

    def _on_part_end(self) -> None:
        if self._name != "file":
            self._fields[self._name] = self._data.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._ended = True


def _printable(name: str) -> str:
    """It is shown, and never a path."""
    return "".join(letter for letter in name if letter.isprintable())[:LONGEST_NAME]


def _broken(error: Exception) -> RequestError:
    return RequestError("the body is no form", got=str(error)[:200], allowed="multipart/form-data")
