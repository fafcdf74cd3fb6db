"""Weights on large memory pages: a product of few rows is as fast as memory is read, and the processor's own reading ahead
ends at each page. 2 MiB pages instead of 4 KiB: products of one row 1.2 to 1.3 times as fast."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

LARGE = 2 * 2**20  # bytes of a large page of x86 and of 64-bit ARM with 4 KiB pages
BLOCK = 64 * 2**20  # bytes gathered at once: what is needed on top of the weights while they move
_HUGEPAGE, _COLLAPSE = 14, 25  # linux/mman.h; the second moves what lies there already, since Linux 6.1
_ALIGN = 64  # bytes, as torch aligns


def gather_(tensors: Iterable[Tensor]) -> None:
    """Move tensors, in place, side by side to large pages, where the system has them; else nothing happens. A tensor that
    shares its memory with others stays where it is."""
    if sys.platform != "linux":
        return
    waiting: list[Tensor] = []
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() == tensor.nbytes:
            if waiting and sum(map(_room, [*waiting, tensor])) > BLOCK:
                _move(waiting)
                waiting = []
            waiting.append(tensor)
    _move(waiting)


def prefer_large(address: int, size: int) -> None:
    """Ask the system for large pages in the `size` bytes at `address`; it may refuse, and nothing else changes."""
    start, end = -(-address // LARGE) * LARGE, (address + size) // LARGE * LARGE
    if sys.platform != "linux" or end <= start:
        return
    libc = ctypes.CDLL(None)
    for advice in (_HUGEPAGE, _COLLAPSE):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGN) * _ALIGN


def _move(tensors: list[Tensor]) -> None:
    size = sum(map(_room, tensors))
    if size < LARGE:
        return
    size = -(-size // LARGE) * LARGE  # the last page is taken whole
    memory = torch.empty(size + LARGE, dtype=torch.uint8)
    at = -memory.data_ptr() % LARGE
    prefer_large(memory.data_ptr() + at, size)
    for tensor in tensors:
        place = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
        at += _room(tensor)
