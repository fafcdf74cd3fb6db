"""The kernels in Python. With NUMBA_DISABLE_JIT numba leaves loops as they are, so that their lines can be watched and a change
costs no compilation; but it leaves out what is chosen by a type (`overload`) or made in LLVM (`intrinsic`). Both are given
here, the latter by what the docstrings in `cpu.floats` and `cpu.integers` say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import extending, typeof


def in_python() -> None:
    """To be called before any module of `shoal` is imported."""
    extending.overload = _overload
    extending.intrinsic = _intrinsic


def _overload(stub: Any) -> Callable[[Any], Any]:
    def decorate(choose: Any) -> Any:
        def chosen(*args: Any) -> Any:
            found = choose(*map(typeof, args))
            return (stub if found is chosen else found)(*args)

        setattr(sys.modules[stub.__module__], stub.__name__, chosen)
        return choose

    return decorate


def _intrinsic(function: Any) -> Any:
    if function.__name__ == "_line":  # asks for memory ahead
        return lambda x, offset: None
    if function.__name__ == "_weigh":
        return _weigh
    held = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    shape = held["rows"].cell_contents, held["outputs"].cell_contents
    return lambda *args: (_levels if len(args) == 8 else _numbers)(*shape, *args)


def _weigh(weights: Any, x: Any, out: Any, column: int, to: int) -> None:
    from shoal.model.cpu import floats

    size = floats.COLUMNS * max(floats._BYTES // x.itemsize, 4)
    out[to : to + size] += weights @ x[:, column : column + size]


def _numbers(rows: int, outputs: int, x: Any, w: Any, out: Any, row: int, output: int, column: int, ahead: int) -> None:
    """A tile of `cpu.floats`."""
    product = x[row : row + rows] @ w[output : output + outputs, : x.shape[1]].T
    out[row : row + rows, column : column + outputs] = product


def _levels(
    rows: int, outputs: int, x: Any, w: Any, shift: Any, w_scale: Any, x_scale: Any, out: Any, row: int, output: int
) -> None:
    """A tile of `cpu.integers`."""
    over, across = slice(row, row + rows), slice(output, output + outputs)
    whole = x[over].astype(np.int32) @ w[across].astype(np.int32).T - shift[across]
    out[over, across] = whole.astype(np.float32) * w_scale[across] * x_scale[over, None]
