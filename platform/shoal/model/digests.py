"""One sha256 for many tensors, wherever they are stored and in however many files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def add(found: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Give `found` a tensor's name, type, shape and values."""
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values."""
    return digest_as_they_come(sorted(tensors.items()))


def digest_as_they_come(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`digest` of tensors that come in the order of their names."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        add(found, name, tensor)
    return found.hexdigest()
