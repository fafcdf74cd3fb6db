"""What a file of somebody else's says, held to the kind of value that it can be: a line where it is another."""

from __future__ import annotations

import sys
from typing import Any

from shoal.errors import CheckpointError


def is_number(value: object) -> bool:
    """Is it a number that a float holds, and neither infinite nor none?"""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return known and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def positive(what: str, value: Any) -> float:
    """`value`, which `what` has. Raises CheckpointError unless it is a number above 0."""
    if not is_number(value) or value <= 0:
        raise CheckpointError(what, got=value, allowed="a number above 0")
    return float(value)


def whole(what: str, value: Any, most: int, least: int = 1) -> int:
    """Likewise for a whole number from `least` to `most`."""
    if not is_whole(value) or not least <= value <= most:
        raise CheckpointError(what, got=value, allowed=f"a whole number above {least - 1}, at most {most}")
    return int(value)


def texts(what: str, value: Any) -> list[str]:
    """Likewise for a list of texts."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        odd = next((each for each in value if not isinstance(each, str)), value) if isinstance(value, list) else value
        raise CheckpointError(what, got=odd, allowed="a list of texts")
    return value
