"""JSON of the API: bodies are read here, and answers written.

Notable: one reader serves every body and every line of a batch, so all refuse the same, and name the place. It refuses what
later readers could not repeat: numbers that are infinite as a double, half of a surrogate pair, deep nesting. Of a key that is
given twice the last value counts, as for Python's own reader. A long answer is written in pieces, with turns of the event loop
between them: nothing here keeps the loop for longer than some milliseconds.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import math
import re
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import islice
from typing import Any

import pydantic_core

from shoal.errors import RequestError

MOST_COMMAS = 2**20 + 2**16  # in a body: as many as `Limits.tokenized` ids or characters need, and room
MOST_COLONS = 2**17
MOST_BRACKETS = 2**17  # a list or object costs five times what a number does
LONGEST_PLACE = 200  # characters of a place that an error repeats

PIECE_BYTES = 2**16
PIECE_SECONDS = 0.005  # of the event loop, before others have their turn
SLICE = 1024  # values that are written at once
MADE = 16  # items of an iterator that are made at once

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
_NUMBER = re.compile(rb"-?([0-9]|inf|nan)", re.IGNORECASE)
_POSITION = re.compile(r" at line (\d+) column (\d+)$")
_LARGEST = sys.float_info.max
_FINITE = "a number that is finite as a double"

# ---- bodies ----------------------------------------------------------------------------------------------------------


def loads(text: bytes, what: str = "the body") -> Any:
    """The value of JSON. Raises RequestError, with `param` set to the place at fault where there is one.

    Commas, colons and brackets are counted first, those in texts too: each small value costs about a hundred bytes and a
    hundred nanoseconds, a list or a named one some microseconds, and meanwhile no other thread of this process runs.
    """
    _must_be_few(text, what)
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise _unreadable(text, str(error), what) from None
    if _holds_infinite(value):
        for place, token in _tokens(text):
            if _NUMBER.match(token) and math.isinf(float(token)):
                raise _infinite(place_of(place), token)
    return value


def place_of(path: list[int | str]) -> str:
    """``messages[0].content`` of keys and positions."""
    place = ""
    for item in path:
        place += f"[{item}]" if isinstance(item, int) else f".{item}" if place else item
    return place[:LONGEST_PLACE]


def _must_be_few(text: bytes, what: str) -> None:
    for name, count, most in (
        ("commas", text.count(b","), MOST_COMMAS),
        ("colons", text.count(b":"), MOST_COLONS),
        ("brackets", text.count(b"[") + text.count(b"{"), MOST_BRACKETS),
    ):
        if count > most:
            raise RequestError(f"too many values in {what}", got=f"{count} {name}", allowed=f"at most {most}")


def _unreadable(text: bytes, said: str, what: str) -> RequestError:
    """Why pydantic could not read `text`: what it `said`, and where that is."""
    found = _POSITION.search(said)
    at = _offset(text, int(found[1]), int(found[2])) if found else len(text)
    path, token = list[int | str](), b""
    for path, token in _tokens(text, at):  # noqa: B007, the last is meant
        pass
    place = place_of(path)
    if _NUMBER.match(token):
        return _infinite(place, token)
    name = f"{what} is not valid JSON"
    return RequestError(f"{name} at {place}" if place else name, param=place or None, got=said, allowed="UTF-8 JSON")


def _infinite(place: str, token: bytes) -> RequestError:
    return RequestError(place or "number", param=place or None, got=_short(token), allowed=_FINITE)


def _short(token: bytes) -> str:
    text = token.decode("utf-8", "replace")
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text)} characters)"


def _offset(text: bytes, line: int, column: int) -> int:
    """Of a position as pydantic tells it, from 1."""
    start = 0
    for _ in range(line - 1):
        start = text.find(b"\n", start) + 1
    return start + column - 1


def _tokens(text: bytes, end: int | None = None) -> Iterator[tuple[list[int | str], bytes]]:
    """Each token of JSON up to the one that holds the byte `end`, with the path of the value that it is of. The list is the
    same one at each step."""
    path, is_key = list[int | str](), False
    kinds = bytearray()  # of the open brackets
    for found in _TOKEN.finditer(text):
        token = found[0]
        if is_key and token[:1] == b'"':
            path[-1] = _key(token)
            is_key = False
        yield path, token
        if end is not None and found.end() > end:
            return
        if token in (b"[", b"{"):
            kinds += token
            is_key = token == b"{"
            path.append("" if is_key else 0)
        elif token in (b"]", b"}") and kinds:
            kinds.pop()
            path.pop()
            is_key = False
        elif token == b"," and kinds:
            is_key = kinds[-1:] == b"{"
            path[-1] = "" if is_key else int(path[-1]) + 1


def _key(token: bytes) -> str:
    try:
        return str(json.loads(token)).encode("utf-8", "replace").decode()
    except ValueError:
        return token.strip(b'"').decode("utf-8", "replace")


def _holds_infinite(value: Any) -> bool:
    """Whether a number in it is too large for a double, as a double or as a whole number."""
    left = [value]
    while left:
        each = left.pop()
        kind = type(each)
        if kind is float or kind is int:
            if not -_LARGEST <= each <= _LARGEST:
                return True
        elif kind is list:
            left.extend(each)
        elif kind is dict:
            left.extend(each.values())
    return False


# ---- answers ---------------------------------------------------------------------------------------------------------


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"{type(value).__name__} in JSON")


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_listed).encode


_SCALARS = frozenset({int, float, str, bool, type(None)})


def dumps(payload: Any) -> bytes:
    """Compact UTF-8 JSON; an iterator is a list. Raises ValueError for NaN and infinities, which JSON does not have."""
    return _encode(payload).encode()


def pieces(value: Any) -> Iterator[bytes]:
    """As `dumps`, in pieces. Items of an iterator are made as they are written. Bytes are JSON already; an iterator gives
    nothing but those, or none."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        before = b"{"
        for key, each in value.items():
            yield before + dumps(key) + b":"
            yield from pieces(each)
            before = b","
        yield b"{}" if before == b"{" else b"}"
    elif isinstance(value, Iterator):
        before = b"["
        while some := [*islice(value, MADE)]:
            yield before + (b",".join(some) if isinstance(some[0], bytes) else dumps(some)[1:-1])
            before = b","
        yield b"[]" if before == b"[" else b"]"
    elif isinstance(value, (list, tuple)) and not _SCALARS.issuperset(map(type, value)):
        before = b"["
        for each in value:
            yield before
            yield from pieces(each)
            before = b","
        yield b"]"
    elif isinstance(value, (list, tuple)) and len(value) > SLICE:
        for at in range(0, len(value), SLICE):
            yield (b"," if at else b"[") + dumps(value[at : at + SLICE])[1:-1]
        yield b"]"
    else:
        yield dumps(value)


def value_of(made: Any) -> Any:
    """The value that `pieces` would write."""
    if isinstance(made, bytes):
        return json.loads(made)
    if isinstance(made, dict):
        return {key: value_of(each) for key, each in made.items()}
    return [value_of(each) for each in made] if isinstance(made, (list, tuple, Iterator)) else made


async def paced(made: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """What is `made`, joined; others on the loop have their turn after `PIECE_SECONDS`, and after a last part that took long
    enough for many such ends in a row to keep the loop."""
    part, size, until = list[bytes](), 0, time.perf_counter() + PIECE_SECONDS
    for each in made:
        part.append(each)
        size += len(each)
        if size >= PIECE_BYTES or time.perf_counter() >= until:
            yield b"".join(part)
            await asyncio.sleep(0)
            part, size, until = [], 0, time.perf_counter() + PIECE_SECONDS
    if part:
        yield b"".join(part)
    if until - time.perf_counter() < 0.9 * PIECE_SECONDS:
        await asyncio.sleep(0)


async def spread(parts: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    """`parts`, with a turn of others between two, whose sender may never wait: one for a client that has left does not."""
    for number, part in enumerate(parts):
        if number:
            await asyncio.sleep(0)
        yield part
