"""The files of a model directory: weights in one file or in several, and the manifest that they are held against.

Weights beyond `SHARD` bytes are cut into model-00001-of-0000N.safetensors with model.safetensors.index.json, as Hugging Face
does. manifest.json lists every other file with its size and sha256, in the form of ``{"files": {name: {"bytes", "sha256"}}}``.

What is checked when a directory is read: that all listed files are there, their sizes, and the sha256 of each; but README.md is
left out, since people edit cards, and weights beyond `HASHED` bytes in all are hashed by ``verify=True`` only: that would take
longer than loading them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from safetensors import SafetensorError, safe_open

from shoal.errors import CheckpointError, ResourceError
from shoal.machine import sha256_of, write_json
from shoal.model.described import read_json

if TYPE_CHECKING:  # who holds a directory against its manifest, as what deploys on Ray Serve does, needs no torch
    from torch import Tensor

WEIGHTS, INDEX, MANIFEST, CARD = "model.safetensors", "model.safetensors.index.json", "manifest.json", "README.md"
SHARD = 2 * 10**9  # bytes of tensors in one file of weights
HASHED = SHARD  # bytes of weights, over all files, that are hashed at every load
READ = (".safetensors", ".json", ".jinja")  # kinds of files that loading reads: each must be listed


def save_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write named tensors, which may be made as they are asked for: those of one file are held at a time."""
    from safetensors.torch import save_file

    written: list[tuple[Path, list[str]]] = []  # files beside their names, which say how many there are
    held: dict[str, Tensor] = {}
    total = room = 0

    def write() -> None:
        beside = directory / f".weights-{len(written)}.tmp"
        save_file(held, str(beside), metadata={"format": "pt"})
        written.append((beside, list(held)))
        held.clear()

    for key, tensor in tensors:
        if held and tensor.nbytes > room:
            write()
        room = (room if held else shard_bytes) - tensor.nbytes
        total += tensor.nbytes
        held[key] = tensor
    write()
    if len(written) == 1:
        written[0][0].rename(directory / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, (beside, names) in enumerate(written, 1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        beside.rename(directory / name)
        places |= dict.fromkeys(names, name)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def weight_files(directory: str | Path) -> dict[Path, set[str] | None]:
    """The files of a directory's weights, each with the tensors that the index says it holds (None: one file, no index).
    Raises CheckpointError for an index that names anything but files of this directory."""
    directory = Path(directory)
    index = directory / INDEX
    if not index.exists():
        return {directory / WEIGHTS: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map", do="export the model again")
    found: dict[Path, set[str] | None] = {}
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: file of {key}", got=name, allowed="a .safetensors file in this directory")
        held = found.setdefault(directory / name, set())
        assert held is not None
        held.add(key)
    return found


def licences(*directories: Path) -> list[Path]:
    """Files of directories that must travel with the weights beside them."""
    heads = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
    found = [path for directory in directories for path in sorted(directory.iterdir())]
    return [path for path in found if path.is_file() and path.name.upper().startswith(heads)]


def weight_bytes(directory: str | Path) -> int:
    """Bytes of all files of a model directory's weights."""
    return sum(path.stat().st_size for path in weight_files(directory))


def load_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory. Raises CheckpointError for a file that cannot be read; ResourceError, with the arithmetic,
    for more than the memory holds."""
    from safetensors.torch import load_file

    size = sum(path.stat().st_size for path in weight_files(directory) if path.is_file())
    free = psutil.virtual_memory().available
    if size > free:
        raise ResourceError(
            f"the weights of {directory} do not fit the memory", got=f"{size / 1e9:.1f} GB",
            allowed=f"{free / 1e9:.1f} GB that are free", do="round them with shoal quantize where there is more, or free some",
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for path, held in weight_files(directory).items():
        try:
            found = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}", got=str(error)) from error
        for key in sorted(found.keys() ^ held) if held is not None else ():
            what = "lacks" if key not in found else "has, against the index,"
            raise CheckpointError(f"{path} {what} tensor {key}", do="export the model again")
        tensors |= found
    return tensors


def stream_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a directory by name, read as they are asked for and in the order that they were written in. Raises
    CheckpointError for a file that cannot be read."""
    several = weight_files(directory).keys() != {directory / WEIGHTS}
    places = read_json(directory / INDEX)["weight_map"] if several else {}
    for name in dict.fromkeys(places.values()) or [WEIGHTS]:
        try:
            with safe_open(str(directory / name), "pt") as file:
                for key in [key for key, of in places.items() if of == name] or file.keys():
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {directory / name}", got=str(error)) from error


def write_manifest(directory: Path) -> None:
    """List what lies in `directory`; call it last."""
    found = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(directory.iterdir())}
    write_json(directory / MANIFEST, {"files": found})


def weights_sha256(directory: str | Path) -> str:
    """One sha256 for all weights of a model directory: of those that its manifest lists, or of the files where it has none.
    Raises CheckpointError for a manifest that cannot be read."""
    directory = Path(directory)
    listed = _listed(directory / MANIFEST) if (directory / MANIFEST).exists() else {}
    found = {
        path.name: listed[path.name][1] if path.name in listed else sha256_of(path) for path in weight_files(directory)
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def check(directory: Path, verify: bool = False) -> None:
    """Hold the files of a model directory against its manifest; `verify`: weights of any size by their sha256 too.

    Raises CheckpointError naming the file that is missing, was cut short or was changed. A directory without a manifest (made
    before there was one) gets a warning, and with `verify` is refused.
    """
    path = directory / MANIFEST
    if not path.exists():
        if verify:
            raise CheckpointError(f"{directory} has no {MANIFEST} to verify by", do="export the model again")
        warnings.warn(f"{directory} has no {MANIFEST}: its files are not verified", stacklevel=3)
        return
    listed = _listed(path)
    found = {file.name for file in directory.iterdir() if file.suffix in READ and file.name != MANIFEST}
    for name in sorted(found - listed.keys()):
        raise CheckpointError(f"{path} does not list {name}", do="remove it, or export the model again")
    weights = sum(size for name, (size, _) in listed.items() if name.endswith(".safetensors"))
    for name, (size, sha256) in listed.items():
        file = directory / name
        if name == CARD:
            continue
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks {name}", do="copy or export the model again")
        if file.stat().st_size != size:
            got, allowed = f"{file.stat().st_size} bytes", f"{size} bytes"
            raise CheckpointError(f"{file} was cut short or changed", got=got, allowed=allowed)
        hashed = verify or weights <= HASHED or not name.endswith(".safetensors")
        if hashed and sha256_of(file) != sha256:
            raise CheckpointError(f"{file} was changed: another sha256", do="copy or export the model again")


def unlisted(directory: Path) -> str:
    """What lies in a directory beside what its manifest lists, in words; "" where there is nothing. Raises CheckpointError for
    a manifest that cannot be read."""
    path = directory / MANIFEST
    if not path.exists():
        return f"no {MANIFEST}, which says what is the model's"
    more = sorted({file.name for file in directory.iterdir()} - {*_listed(path), MANIFEST})
    more += [name for name in _listed(path) if (directory / name).is_dir()]
    beside = f" and {len(more) - 1} more" if len(more) > 1 else ""
    return f"{more[0]}{beside}, which {MANIFEST} does not list" if more else ""


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    """Name -> bytes and sha256 of each file in a manifest."""
    try:
        entries = read_json(path)["files"].items()
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} lists no files with bytes and sha256", do="export the model again") from error
    for name in listed:
        if Path(name).name != name:
            raise CheckpointError(f"{path}: file", got=name, allowed="names of files in this directory")
    return listed
