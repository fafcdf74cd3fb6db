"""The process that a program is run in: shuts itself in, then runs it. Started as a script by `process.py`, and of the standard
library alone, so that nothing of Shoal is in its memory.

Standard input has a JSON object: the program, the calls, limits, the filter. To the descriptor in its last argument it writes
``shut`` once the filter holds, and then for each call a line of JSON: ``value``, or nothing where it raised.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import io
import json
import linecache
import os
import re
import resource
import signal
import sys
import traceback
import types
from typing import Any

NAME = "<program>"
# what a program may import, beside what is there already; each is imported before, if the program's text has the word
MODULES = (
    "abc", "array", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "graphlib", "hashlib", "heapq",
    "hmac", "inspect", "io", "itertools", "json", "math", "numbers", "operator", "pprint", "queue", "random", "re",
    "secrets", "statistics", "string", "struct", "textwrap", "threading", "time", "timeit", "traceback", "types",
    "typing", "unicodedata", "unittest", "uuid", "zlib",
)  # fmt: skip
CODECS = ("utf_8", "ascii", "latin_1", "utf_16", "idna")
# prctl (linux/prctl.h, linux/seccomp.h)
_DEATH_SIGNAL, _DUMPABLE, _NO_NEW_PRIVILEGES, _SECCOMP, _BY_FILTER = 1, 4, 38, 22, 2
_CAPABILITIES = 0x20080522  # of capset, its third version (linux/capability.h)


def written(value: object) -> str:
    """A plain value (None, numbers, strings, lists, tuples, sets, dicts of such) as text that two have only if they are equal
    and of the same types; of anything else its type's name."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return repr(value)
    if kind in (list, tuple):
        inner = ", ".join(written(one) for one in value)  # type: ignore[attr-defined]
        return f"[{inner}]" if kind is list else f"({inner},)"
    if kind in (set, frozenset):
        return f"{kind.__name__}({', '.join(sorted(written(one) for one in value))})"  # type: ignore[attr-defined]
    if kind is dict:
        pairs = sorted((written(key), written(one)) for key, one in value.items())  # type: ignore[attr-defined]
        return "{" + ", ".join(f"{key}: {one}" for key, one in pairs) + "}"
    return f"<{kind.__name__}>"


def _bound(seconds: int, memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, (seconds, seconds + 1)),
        (resource.RLIMIT_AS, (memory, memory)),
        (resource.RLIMIT_FSIZE, (0, 0)),
        (resource.RLIMIT_CORE, (0, 0)),
        (resource.RLIMIT_NOFILE, (16, 16)),
    ):
        resource.setrlimit(kind, most)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _shut(steps: bytes, parent: int) -> None:
    """Nothing but the filter's calls from here on, none of root's powers in them, and an end with the parent's. Raises OSError
    where the kernel will not."""

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    program = Filter(len(steps) // 8, steps)
    # root's `madvise` may take pages from the machine for good (MADV_SOFT_OFFLINE)
    if libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for option, one, two in (
        (_DEATH_SIGNAL, int(signal.SIGKILL), None),
        (_DUMPABLE, 0, None),  # no limit holds for a core that goes to a program (core(5))
        (_NO_NEW_PRIVILEGES, 1, None),
        (_SECCOMP, _BY_FILTER, ctypes.byref(program)),
    ):
        if option == _SECCOMP and os.getppid() != parent:
            raise OSError("the process that wanted the program run has ended")
        if libc.prctl(option, ctypes.c_ulong(one), two or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        os.close(os.open(os.sep, os.O_RDONLY))
    except PermissionError:
        return
    raise OSError("the kernel took a filter and does not keep to it")


def _call(found: dict[str, Any], function: str, arguments: list[Any]) -> dict[str, str]:
    try:
        return {"value": written(found[function](*arguments))}
    except BaseException:  # a program may raise whatever it likes
        return {}


def _run(program: str, names: dict[str, Any]) -> int | None:
    """Run it, and print its error as Python does: its exit code, None where it came to its end."""
    try:
        exec(compile(program, NAME, "exec"), names)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return int.__and__(end.code or 0, 0xFF)
        with contextlib.suppress(BaseException):  # what a program exits with may be anything, and so may its text
            print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        of_program = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, of_program)
        return 1
    return None


def main() -> None:
    asked = json.loads(sys.stdin.buffer.read())
    program, answers = asked["program"], io.FileIO(int(sys.argv[-1]), "w")
    for name in (*MODULES, *(f"encodings.{codec}" for codec in CODECS)):
        if re.search(rf"\b{name.removeprefix('encodings.')}\b", program.replace("-", "_")):
            importlib.import_module(name)
    linecache.cache[NAME] = (len(program), None, program.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.argv, sys.modules["__main__"] = [NAME], module
    _bound(asked["seconds"], asked["memory"])
    _shut(base64.b64decode(asked["filter"]), asked["parent"])
    answers.write(b"shut\n")
    code = _run(program, module.__dict__)
    for call in asked["calls"] if code is None else ():
        answers.write(json.dumps(_call(module.__dict__, **call)).encode() + b"\n")
    with contextlib.suppress(BaseException):  # a program may close it, or put another in its place
        sys.stdout.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
