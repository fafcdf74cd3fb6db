"""How the loops of this plane are compiled by numba, and where what was compiled is kept; with the few formulas that several of
them need.

numba keeps compiled code for as long as the file of its function stays the same, though that code also holds all functions that
this one calls, from whatever file. So the folder is named by the contents of all of these files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
from filelock import FileLock, Timeout
from numba import config as numbas
from numba.extending import overload, register_jitable

config: Any = numbas  # its names are made when it is imported
PATIENCE = 120.0  # all of it takes half a minute
INDEX_PATIENCE = 10.0  # milliseconds are enough
_HERE = Path(__file__).parent
_LOOPS = ("attention.py", "decode.py", "draw.py", "floats.py", "integers.py", "tiles.py")
_SOURCES = (*_LOOPS, "compiled.py", "parts.py", "../slots.py")


def _digest():
    return hashlib.sha256(b"".join((_HERE / name).read_bytes() for name in _SOURCES)).hexdigest()[:16]


_KEPT = str(Path(config.CACHE_DIR or _HERE / "__pycache__") / f"numba-{_digest()}")


@contextmanager
def alone() -> Iterator[None]:
    """Only one process at a time compiles: the others find it done. Where it takes more than `PATIENCE` seconds, or the folder
    cannot be written, each goes on by itself."""
    lock = FileLock(f"{_KEPT}.lock", timeout=PATIENCE)
    with suppress(Timeout, OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Rounding:
    """How loops may round. As a decorator: for a function that other loops call, which compile it as a part of themselves; to
    Python it is a function like any other. `called`: for one that Python calls."""

    def __init__(self, **options: Any) -> None:
        """`options`: what numba calls them."""
        self._options = {"error_model": "numpy", "no_cfunc_wrapper": True, **options}

    def __call__(self, function):
        return function if config.DISABLE_JIT else register_jitable(**self._options)(function)

    def called(self, function=None, *, nogil=True):
        """`function` compiled at its first call, or as it was kept; where the folder cannot be written, numba takes the user's.
        With `nogil` other threads go on meanwhile."""
        if function is None:
            return partial(self.called, nogil=nogil)
        before, config.CACHE_DIR = config.CACHE_DIR, _KEPT
        try:
            made = nb.njit(cache=True, nogil=nogil, **self._options)(function)
        finally:
            config.CACHE_DIR = before
        if not config.DISABLE_JIT:
            _kept_one_by_one(made._cache._cache_file)
        return made


def _kept_one_by_one(file):
    """numba reads an index, writes it with one more name, and then what has the name: of two processes that do so at once, one
    would find its code to be the other's. So each waits for the other; what cannot wait is used, and not kept."""
    save = file.save

    def alone_with_the_index(key, data):
        with suppress(Timeout, OSError), FileLock(Path(file._cache_path) / "index.lock", timeout=INDEX_PATIENCE):
            save(key, data)

    file.save = alone_with_the_index


# Sums may be taken in any order, so that they use vector registers. Not "nnan" or "ninf": a broken model is to be seen.
fast = Rounding(fastmath={"reassoc", "contract", "nsz"})
# As `fast`, for numbers that are finite: what is not may become anything. So the search for a largest value uses vector
# registers, too.
finite = Rounding(fastmath=True)
# Every operation rounds as written.
exact = Rounding()


def exp(x):
    """e^x where float32 is enough for float32: a function that vector code can be made of, unlike the C library's."""
    return math.exp(x)


@overload(exp)
def _exp_of(x):
    return _exp32 if x == nb.float32 else exp


def _exp32(x):
    """2^n e^r, r in -ln2/2 .. ln2/2 by the Taylor series: within 2e-7 of e^x for x in -87 .. 88, and held there beyond.
    NaN gives NaN, through r."""
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88) if x > np.float32(88) else x
    n = np.rint(x * np.float32(1.44269504))
    # ln 2 in two parts, the first exact in products
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@fast
def inverse_rms(x, eps):
    """1 / rms(x)."""
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return x.dtype.type(1) / np.sqrt(total / x.dtype.type(len(x)) + x.dtype.type(eps))


@finite
def largest(z):
    """The largest of z; where one is not a number anything, and the sum that it is for gives none by that one itself."""
    top = z[0]
    for i in range(len(z)):
        top = max(top, z[i])
    return top


@exact
def fill(x, value):
    """All of x [D]; `x[:] = value` takes three seconds to compile, for what it would say of shapes that do not fit."""
    for i in range(len(x)):
        x[i] = value


@exact
def copy(x, out):
    """Into out [N, D]; see `fill`."""
    rows, width = x.shape
    for n in range(rows):
        for i in range(width):
            out[n, i] = x[n, i]
