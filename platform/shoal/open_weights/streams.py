"""Weights written as they come: where each tensor will lie is known from its shape, so none waits in memory for the others.

The layout is that of safetensors: eight bytes of length, a JSON of names, and the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.machine import need_disk, write_json
from shoal.model import files
from shoal.open_weights.sources import DTYPES

Planned = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def write(
    directory: Path, planned: Planned, pieces: Iterable[tuple[str, Tensor]], shard_bytes: int = files.SHARD
) -> None:
    """Write the `planned` tensors to a directory, cut into files of about `shard_bytes`. `pieces` are theirs in the same order,
    the first dim of each tensor in as many as it likes. Raises ResourceError, before any is written, where the disk has no room
    for all."""
    need_disk(directory.parent, sum(size(*each) for each in planned.values()))
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = shard_bytes
    for name, (dtype, shape) in planned.items():
        if size(dtype, shape) > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = dtype, shape
        room -= size(dtype, shape)
    coming, places = iter(pieces), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        file = files.WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            _header(out, shard)
            for name, (dtype, shape) in shard.items():
                left = size(dtype, shape)
                while left > 0:
                    got, piece = next(coming)
                    assert got == name and piece.dtype == dtype, (got, name, piece.dtype)
                    out.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
                    left -= piece.nbytes
                assert left == 0, name
    if len(shards) > 1:
        total = sum(size(*each) for each in planned.values())
        write_json(directory / files.INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _header(out: IO[bytes], shard: Planned) -> None:
    at, said = 0, dict[str, object]({"__metadata__": {"format": "pt"}})
    for name, (dtype, shape) in shard.items():
        end = at + size(dtype, shape)
        said[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def need_finite(name: str, tensor: Tensor) -> Tensor:
    """`tensor`. Raises CheckpointError when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"tensor {name} is not finite", got=f"{count} numbers", do="fetch the checkpoint again")
    return tensor
