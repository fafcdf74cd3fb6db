"""One rank's share of a checkpoint: copied between two updates, and written by a thread beside the updates that follow.

    take    copies the rank's own shards into memory that is kept (pinned where there is a GPU): all that training waits for
    write   a thread writes them as safetensors and hashes what it writes, in one pass, then the random state

Which shards are a rank's own follows from how they are sharded, so that no rank asks another: of a sharded tensor its shard,
of one that all hold the rank that a hash of its name says. torch.distributed.checkpoint reads the files back, at any number of
ranks, by the offsets in their headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shoal.train.parallel import Ranks

BLOCK = 2**24  # bytes that are written and hashed at once; between two of them a thread can be told to stop
NICENESS = 10  # of the thread that writes, beside those that train: where they have all cores, it takes what is left
_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip  # names in the safetensors format

Entry = dict[str, Any]  # `bytes` and `sha256` of a file


class Piece(NamedTuple):
    """A part of a tensor that one rank writes."""

    name: str
    offsets: tuple[int, ...]  # where it begins in the whole tensor
    tensor: Tensor


def share(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[Piece]:
    """The parts of `tensors` that this rank writes; all ranks' together are each tensor once."""
    found = []
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            copies = zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
            if any(place.is_replicate() and at for place, at in copies):  # another group of ranks has the same (HSDP)
                continue
            local = tensor.to_local()
            if local.numel():
                found.append(Piece(name, offsets_of(tensor), local))
        elif zlib.crc32(name.encode()) % ranks.world == ranks.rank:
            found.append(Piece(name, (0,) * tensor.dim(), tensor))
    return found


def offsets_of(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's shard begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets)


class Snapshot:
    """The copy of this rank's share, and the thread that writes it. One at a time: `take`, `write`, then `result`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._buffers: dict[str, Tensor] = {}
        self._pieces: list[Piece] = []
        self._random: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._entries: dict[str, Entry] = {}
        self._met: BaseException | None = None
        self.seconds = 0.0  # of a processor, that the last write took

    def take(self, tensors: Mapping[str, Tensor]) -> bool:
        """Copy this rank's share of `tensors`, and the random state. False where there is no memory for it: then the tensors
        themselves will be written, which must not change until that is done."""
        self._random = random_state(self._ranks)
        pieces = share(tensors, self._ranks)
        try:
            self._pieces = [piece._replace(tensor=self._copied(piece)) for piece in pieces]
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "memory" not in str(error):
                raise
            self._buffers, self._pieces = {}, pieces
            return False
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)  # the copies above were only asked for
        return True

    def _copied(self, piece: Piece) -> Tensor:
        source = piece.tensor.detach()
        buffer = self._buffers.get(piece.name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[piece.name] = buffer
        return buffer.copy_(source, non_blocking=True)

    def write(self, folder: Path, send: Callable[[Path], Entry] | None = None) -> None:
        """Begin to write what was taken into `folder`. `send`: what is done with each file then; it gives what a manifest is to
        say of it besides."""
        self._stop.clear()
        self._entries, self._met = {}, None
        how = {"target": self._work, "args": (folder, send), "name": "write-checkpoint", "daemon": True}
        self._thread = threading.Thread(**how)  # type: ignore[arg-type]
        self._thread.start()

    @property
    def running(self) -> bool:
        """Is there still something to be written?"""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Until all is written, or `seconds` are over."""
        if self._thread is not None:
            self._thread.join(seconds)

    def result(self) -> dict[str, Entry]:
        """The files that were written, by name, once they are. Raises what the thread met."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._met is not None:
            raise self._met
        return self._entries

    def stop(self) -> None:
        """Give up what is being written; returns when no more is."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _work(self, folder: Path, send: Callable[[Path], Entry] | None) -> None:
        with contextlib.suppress(OSError, AttributeError):  # on Linux a thread has a niceness of its own
            # Added to training's own, which is 15 where Ray started it.
            mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, mine + NICENESS))
        try:
            files = {
                f"shard-{self._ranks.rank:05d}.safetensors": self._pieces,
                random_file(self._ranks): [Piece(name, (0,), tensor) for name, tensor in self._random.items()],
            }
            for name, pieces in files.items():
                entry = write_file(folder / name, pieces, self._stop)
                self._entries[name] = entry | (send(folder / name) if send is not None else {})
        except BaseException as error:  # `result` raises it where somebody hears it
            self._met = error
        self.seconds = time.thread_time()


def write_file(path: Path, pieces: Iterable[Piece], stop: threading.Event | None = None) -> Entry:
    """Write `pieces` as one safetensors file, seen on the disk; returns its size and sha256. Raises OSError, also where it was
    told to `stop` before the end."""
    ordered = sorted(pieces, key=lambda piece: (-piece.tensor.element_size(), piece.name))  # so each lies aligned
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in _blocks(ordered):
            if stop is not None and stop.is_set():
                raise OSError("it was told to stop")
            rest = block
            while rest:
                rest = rest[file.write(rest) :]
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(pieces: list[Piece]) -> Iterator[memoryview]:
    """A safetensors file, a block at a time: neither writing nor hashing holds Python's lock, so training goes on beside."""
    # What torch.distributed.checkpoint reads shards by.
    offsets = {piece.name: {"saved_offsets": list(piece.offsets)} for piece in pieces}
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"}}
    at = 0
    for piece in pieces:
        end = at + piece.tensor.numel() * piece.tensor.element_size()
        kind, shape = _KINDS[piece.tensor.dtype], list(piece.tensor.shape)
        header[piece.name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for piece in pieces:
        flat = piece.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        view = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's annotation
        for start in range(0, len(view), BLOCK):
            yield view[start : start + BLOCK]


def random_file(ranks: Ranks) -> str:
    """The name of the file of this rank's random state."""
    return f"rng-{ranks.rank:05d}.safetensors"


def random_state(ranks: Ranks) -> dict[str, Tensor]:
    """The state of this rank's random generators, a copy."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put random generators into `state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
