"""How much a program may take, and which of its functions are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_PROGRAM = 100_000  # characters


@dataclass(frozen=True)
class Limits:
    """`seconds` of processor time (whole ones, as the kernel counts) and at most `wall` by the clock; bytes of `memory`
    (addresses, Python's own 40 MB among them, and not the kernel's tables of pages, which may be twice as much) and of `output`
    (each of what it prints, its errors, and its values)."""

    seconds: int = 2
    wall: float = 10.0
    memory: int = 256 * 2**20
    output: int = 64 * 2**10


@dataclass(frozen=True)
class Call:
    """A function of the program by its name, and arguments that JSON can say."""

    function: str
    arguments: Sequence[Any] = ()
