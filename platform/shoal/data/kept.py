"""Results of finished tasks, so that a run that was killed goes on where it was: one JSON for each, beside the files it made.
Of a corpus that is made in S3 both are put there, the result last, and looked for there (`place`), while the command has its
lease.

Notable: a result is taken again only under the same key, a digest of all that it follows from and that is known before; while
what it came upon is the same; and while its files are byte for byte what they were. So nothing of another request, of changed
sources or of other code is ever mixed in.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import platform
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from shoal import inputs
from shoal.data import place
from shoal.machine import write_aside

AT_ONCE = 1024  # values that are JSON together
# what mends, hashes, decodes, tells the language and fits a tokenizer; Python itself parses code and HTML
LIBRARIES = ("datasketch", "ftfy", "numpy", "pillow", "py3langid", "pyarrow", "tokenizers", "xxhash")

T = TypeVar("T")


def digest(*values: Any) -> str:
    """A key out of plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def digest_of_list(values: Iterable[Any]) -> str:
    """`digest` of the list of them, which there is none of: what a million of them say is gigabytes as JSON is made."""
    hash, rest = xxhash.xxh3_128(b"[["), iter(values)
    before = b""
    while some := list(islice(rest, AT_ONCE)):
        hash.update(before + json.dumps(some, sort_keys=True)[1:-1].encode())
        before = b", "
    hash.update(b"]]")
    return hash.hexdigest()


def code_digest() -> str:
    """Of the code that makes a corpus, ours and what it calls: what other code made is not gone on with."""
    folders = (Path(__file__).parent, Path(inputs.__file__).parent)
    ours = [[path.name, _hash(path)] for folder in folders for path in sorted(folder.rglob("*.py"))]
    return digest(ours, [[name, metadata.version(name)] for name in LIBRARIES], platform.python_version())


def kept(
    path: Path,
    key: str,
    kind: type[T],
    task: Callable[[], T],
    made: Callable[[T], Iterable[Path]],
    holds: Callable[[T], bool] = lambda result: True,
) -> T:
    """What `task` gives: as kept in `path` when that is of this `key`, its files are whole and it `holds`, else by doing it
    now.

    `kind`: type of the result, such as ``list[int]``; it is kept as JSON. `made`: the files that belong to a result.
    """
    try:
        had = json.loads(_read(path))
        if had["key"] == key and all(_stamp(path.parent / name) == was for name, was in had["files"].items()):
            result = _typed(kind, had["result"])
            if holds(result):
                return result
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: do it (again)
    result = task()
    place.need_held(path)
    files = {os.path.relpath(file, path.parent): place.put(file) or _hash(file) for file in made(result)}
    _write(path, json.dumps({"key": key, "files": files, "result": _plain(result)}))
    return result


def _read(path: Path) -> bytes:
    there = place.bucket_of(path)
    return path.read_bytes() if there is None else there[0].text(there[1]) or b""


def _write(path: Path, text: str) -> None:
    there = place.bucket_of(path)
    if there is None:
        write_aside(path, text)
    else:
        there[0].put_text(there[1], text.encode())


def _stamp(path: Path) -> str | None:
    """What changes with the bytes of a file, which need not be on this machine."""
    there = place.bucket_of(path)
    return _hash(path) if there is None else there[0].tag(there[1])


def _hash(path: Path) -> str:
    hash = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hash.update(block)
    return hash.hexdigest()


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; `_typed` gives it back."""
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        named = all(isinstance(key, str) for key in value)
        return {k: _plain(v) for k, v in value.items()} if named else [[_plain(k), _plain(v)] for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _typed(kind: Any, value: Any) -> Any:
    """The value of type `kind` that `_plain` made `value` of."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: _typed(hints[name], one) for name, one in zip(names, value, strict=True)})
    if kind is bytes:
        return base64.b64decode(value)
    if origin in (dict, Counter):
        pairs = value.items() if isinstance(value, dict) else value
        of = of if origin is dict else (of[0], int)
        return origin({_typed(of[0], key): _typed(of[1], one) for key, one in pairs})
    if origin is list:
        return [_typed(of[0], one) for one in value]
    if origin is tuple:
        kinds = [of[0]] * len(value) if of[-1] is Ellipsis else of
        return tuple(_typed(kind, one) for kind, one in zip(kinds, value, strict=True))
    return value
