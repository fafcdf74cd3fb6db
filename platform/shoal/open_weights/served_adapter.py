"""An adapter in PEFT's format, of whatever tool wrote it, as matrices beside our linears; all or nothing of it.

Its modules are named as in the checkpoint that a model was imported from, whose several matrices are pieces of one of ours
(`families`), or, for a model of our own, as in our network:

    pieces of one A (ours have one)     A [r, I]            B: their rows, zero where a piece has none
    each its own A                      A [sum of r, I]     B: block diagonal
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shoal.errors import CheckpointError, first_line
from shoal.machine import need_memory
from shoal.model import described
from shoal.model.adapter_files import CONFIG, MOST_RANK, PREFIX, WEIGHTS, AdapterFiles
from shoal.model.adapters import Adapter, Pair, kept
from shoal.model.linears import Int8Linear, Linear
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.open_weights import adapter_place, families

Module = tuple[str, tuple[str, ...], tuple[int, ...]]
Thin = dict[str, dict[str, Tensor]]  # module -> "A" [r, I] and "B" [O, r]


def read(directory: str | Path, model: Model) -> Adapter:
    """The adapter in a directory, or at ``s3://...``, for `model` where it is now. Raises CheckpointError naming the file, the
    key or the tensor that is missing, not finite, or of another base; ResourceError where memory or room on the disk lacks;
    DataError where S3 does not answer."""
    directory = str(directory).rstrip("/")
    if model.smoothed:
        raise CheckpointError(
            f"{directory}: the base was INT8 whose channels were moved, and does not say how",
            do="serve the fp32 model, or quantize it again",
        )
    linears = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.net.named_modules()
        if isinstance(module, (Linear, Int8Linear)) and name.startswith("groups.")
    }
    files = adapter_place.read(directory, most=sum(8 * MOST_RANK * sum(shape) for shape in linears.values()) + 2**20)
    weights = f"{directory}/{WEIGHTS}"
    _need_base(str(directory), files, model)
    thin = _thin(weights, files.data)
    need_memory(3 * len(files.data))
    pairs: dict[str, Pair] = {}
    for ours, theirs, rows in _modules(model, linears):
        found = [thin.pop(name, None) for name in theirs]
        if any(found):
            shapes = [(count, linears[ours][1]) for count in rows]
            for name, piece, shape in zip(theirs, found, shapes, strict=True):
                _need_shape(weights, name, piece, shape, files.rank)
            if ours in pairs:  # of an imported model each linear has two names
                got = "matrices of a linear by its other name as well"
                raise CheckpointError(f"{weights}: {theirs[0]}", got=got, do="save the adapter again")
            a, b = _joined(found, rows)
            pairs[ours] = kept(model.net.get_submodule(ours), a, files.scale * b.T)
    if thin:
        name = sorted(thin)[0]
        raise CheckpointError(f"{weights}: {name}", got="no linear of this model's layers", do="give its own base")
    if not pairs:
        raise CheckpointError(f"{weights}", got="no thin matrices", do="give a LoRA adapter")
    if not all(tensor.isfinite().all() for pair in pairs.values() for tensor in pair):
        raise CheckpointError(f"{weights}", got="NaN or infinity", do="train it again")
    moved = {name: (a.to(model.device), b.to(model.device)) for name, (a, b) in pairs.items()}
    return Adapter(files.identity, moved)


def check(directory: str | Path, model: str | Path) -> None:
    """Raises as `read` does for the adapter in a directory beside the model in another, whose weights are not read."""
    it = described.read(model)
    source = Path(model) / described.SOURCE
    with torch.device("meta"):
        net = Net(it.config)
    told = described.read_json(source) if source.exists() else None
    read(directory, Model(it.config, net, it.tokenizer, name=it.name, source=told, base=described.base(model)))


def _need_base(directory: str, files: AdapterFiles, model: Model) -> None:
    """Raises CheckpointError for an adapter of other weights, as one of ours knows, and for one that names another base, which
    is all that others say: another last part of a path or of a repository's name."""
    own = [str(model.source["name"])] if model.source else []
    known = {_last(name) for name in (*own, model.name, model.name.removesuffix("-int8"))}
    if files.base and _last(files.base) not in known:
        where, allowed = f"{directory}/{CONFIG}: base_model_name_or_path", own[0] if own else model.name
        raise CheckpointError(where, got=files.base, allowed=allowed)
    if files.base_sha256 and model.base and files.base_sha256 != model.base:
        what, allowed = f"{directory}/{WEIGHTS}: sha256 of its base", f"{model.base[:16]}, which is {model.name}'s"
        do = "serve it beside the model that it was trained on, or train it again"
        raise CheckpointError(what, got=files.base_sha256[:16], allowed=allowed, do=do)


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _thin(path: str, data: bytes) -> Thin:
    """The matrices of each module. Raises CheckpointError for a tensor of any other name."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}", got=first_line(error), allowed="safetensors") from None
    thin: Thin = {}
    for name, tensor in tensors.items():
        module, dot, rest = name.removeprefix(PREFIX).rpartition(".lora_")
        side = rest.removesuffix(".weight").removesuffix(".default")
        if not (name.startswith(PREFIX) and dot and side in ("A", "B")) or side in thin.get(module, {}):
            raise CheckpointError(f"{path}: tensor {name}", allowed=f"{PREFIX}MODULE.lora_A.weight and lora_B.weight")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise CheckpointError(
                f"{path}: tensor {name}", got=f"{tensor.dtype} {list(tensor.shape)}", allowed="a float matrix"
            )
        # torch compares no numbers of one byte
        thin.setdefault(module, {})[side] = tensor if tensor.element_size() > 1 else tensor.float()
    return thin


def _modules(model: Model, linears: Mapping[str, tuple[int, int]]) -> list[Module]:
    """Each linear of ours, its names in an adapter, and the output rows of each: theirs for an imported model, else its own."""
    made: list[Module] = [(name, (name,), (outputs,)) for name, (outputs, _) in linears.items()]
    if model.source is None:
        return made
    table = dict(families.names(str(model.source["family"]), model.config))
    for ours, (outputs, _) in linears.items():
        theirs = tuple(name.removesuffix(".weight") for name in table[f"{ours}.weight"])
        made.append((ours, theirs, families.rows(model.config, f"{ours}.weight", outputs, len(theirs))))
    return made


def _need_shape(path: str, name: str, piece: Mapping[str, Tensor] | None, shape: tuple[int, int], rank: int) -> None:
    if piece is None:
        return
    for side in ("A", "B"):
        if side not in piece:
            raise CheckpointError(f"{path}: {name}", got=f"no lora_{side}", do="save the adapter again")
    a, b = piece["A"], piece["B"]
    if (len(b), a.shape[1]) != shape or len(a) != b.shape[1]:
        got = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        raise CheckpointError(
            f"{path}: {name}", got=got, allowed=f"[r, {shape[1]}] and [{shape[0]}, r]", do="give its own base"
        )
    if len(a) != rank:  # the scale is of the rank that the config says
        raise CheckpointError(f"{path}: rank of {name}", got=len(a), allowed=f"{rank}, which {CONFIG} says")


def _joined(pieces: Sequence[Mapping[str, Tensor] | None], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r], in fp64, of the `pieces` of one linear, which have so many of its `rows`."""
    held = [piece for piece in pieces if piece is not None]
    first = held[0]["A"]
    shared = all(torch.equal(piece["A"], first) for piece in held)
    a = first if shared else torch.cat([piece["A"] for piece in held])
    b = torch.zeros(sum(rows), len(a), dtype=torch.float64)
    row = rank = 0
    for piece, count in zip(pieces, rows, strict=True):
        if piece is not None:
            r = len(piece["A"])
            b[row : row + count, rank : rank + r] = piece["B"].double()
            rank += 0 if shared else r
        row += count
    return a.double(), b
