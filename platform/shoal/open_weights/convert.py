"""A checkpoint of an open model to a model directory of ours, and back, a tensor at a time.

Every tensor of the source is used exactly once or named in an error, and what is written takes its place when it is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.config import FULL, ModelConfig
from shoal.errors import CheckpointError, ShoalError
from shoal.inputs.patterns import is_panic
from shoal.machine import write_json
from shoal.model import checkpoint, described, digests, files
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.open_weights import depths, families, known, proof, rope, streams
from shoal.open_weights.gguf import Gguf
from shoal.open_weights.sources import DTYPES, Folder, Source, opened_weights, read_of
from shoal.open_weights.vocabulary import calling, closing, need_whole

FETCHED = "fetched"  # folder beside a model directory, with what pip fetched for it
PRECISIONS = ("source", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Imported:
    """What an import gave."""

    out: str
    family: str
    config: ModelConfig
    dtype: str
    tensors: int  # of the source
    bytes: int  # of the weights that were written


def opened(path: str | Path, directory: Path) -> Source:
    """The checkpoint at `path`, a folder or a ``.gguf``, or one of `known.names`, which is fetched into `directory`. Raises
    CheckpointError when it is none of them."""
    if str(path) in known.names() and not Path(path).exists():
        path = known.fetched(str(path), directory)
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return Gguf(path)
    what = "a file" if path.is_file() else "nothing"
    allowed = ["a folder with config.json and safetensors", "a .gguf", *known.names()]
    raise CheckpointError(f"{path}", got=what, allowed=allowed)


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    dtype: str = "source",
    context: int = 0,
    chat_template: str | None = None,
    shard_bytes: int = files.SHARD,
) -> Imported:
    """Write the model directory `out` from a checkpoint. `name` [the source's], `dtype` of its weights, one of `PRECISIONS`,
    `context`: longest text in tokens [the source's], `chat_template` in place of the source's. Raises CheckpointError naming
    the file, key or tensor at fault; then nothing is written."""
    checkpoint.require_replaceable(out)
    with _readable(source):
        origin = opened(source, Path(out).resolve().parent / FETCHED)
        family = families.family_of(origin.config)
        there = {each: told for each, told in origin.tensors().items() if not families.is_derived(each)}
        tied = _tied(origin, there)
        config = families.shape_of(origin.config, there.keys(), tied=tied, context=context)
        fetched = {} if Path(source).exists() else known.names().get(str(source), {})
        name = name or (str(source) if fetched else origin.name)
        need_whole("the model's name", name)
        tokenizer, template = origin.vocabulary(chat_template)
        tokenizer = calling(closing(tokenizer, template, config), template)
    generation = {**origin.generation, **fetched.get("generation", {})}
    described.drawn(generation, source)
    if tied:
        there.pop(families.HEAD, None)
    table = dict(families.names(family, config))
    _need_all(there, table, family, config)
    kept = (
        _dtype(there) if dtype == "source" else DTYPES[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]]
    )
    exactly = dtype == "source"
    with torch.device("meta"):
        state = Net(config).state_dict()
    assert state.keys() == table.keys(), state.keys() ^ table.keys()
    _need_shapes(there, table, state, config)
    if len(tokenizer) > config.vocab:
        got = f"{len(tokenizer)} tokens"
        raise CheckpointError(f"tokenizer of {source}", got=got, allowed=f"at most vocab_size ({config.vocab})")
    planned = {ours: (kept, tuple(state[ours].shape)) for ours in table}
    with checkpoint.replacing(Path(out)) as aside:
        base = hashlib.sha256()
        streams.write(aside, planned, _pieces(origin, table, state, kept, base, exactly=exactly), shard_bytes)
        told = {"family": family, "name": origin.name, "config": dict(origin.config)}
        told |= {"weights_sha256": files.weights_sha256(aside), "generation_config": generation}
        told |= {"dtype": str(kept).removeprefix("torch."), **origin.extra}
        for licence in origin.licences():
            shutil.copy(licence, aside / licence.name)
        origin.need_same()
        card = _card(name, family, origin)
        checkpoint.describe(aside, config, name, tokenizer, template, told, base.hexdigest(), card)
        files.write_manifest(aside)
    total = sum(streams.size(*each) for each in planned.values())
    return Imported(str(out), family, config, str(kept).removeprefix("torch."), len(there), total)


@contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """What others wrote may say anything: whatever their values break in this block is a CheckpointError."""
    try:
        yield
    except (ShoalError, AssertionError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        got = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise CheckpointError(f"cannot read {source}", got=got, do="fetch it again, or mend what it says") from error


def _pieces(
    origin: Source,
    table: Mapping[str, tuple[str, ...]],
    state: Mapping[str, Tensor],
    kept: torch.dtype,
    base: hashlib._Hash,
    *,
    exactly: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of ours, a piece for each of theirs; `base` is given what they are in the source, which is the same in
    whatever dtype they are written. Raises CheckpointError as `_cast`."""
    for ours, theirs in table.items():
        if not theirs:
            yield ours, torch.zeros(state[ours].shape, dtype=kept)
        for name in theirs:
            tensor = origin.read(name)
            digests.add(base, name, tensor)
            yield ours, _cast(name, tensor, kept, exactly=exactly)


def _cast(name: str, tensor: Tensor, kept: torch.dtype, *, exactly: bool) -> Tensor:
    """A tensor of the source in the dtype that is written. Raises CheckpointError where it is not finite, or no longer, and
    where numbers would change although it is to be written `exactly`."""
    cast = streams.need_finite(name, tensor).to(kept)
    if kept == tensor.dtype:
        return cast
    lost = not torch.equal(cast.to(tensor.dtype), tensor) if exactly else not torch.isfinite(cast).all()
    if lost:
        got = f"numbers of {str(tensor.dtype).removeprefix('torch.')} beyond it"
        allowed = f"those of {str(kept).removeprefix('torch.')}"
        raise CheckpointError(f"tensor {name}", got=got, allowed=allowed, do="import it with --dtype float32")
    return cast


def _tied(origin: Source, there: Mapping[str, Any]) -> bool:
    """Is the token table the head as well? As the tensors say: a head of its own that equals the table where the configuration
    says so is none. Raises CheckpointError where there is no head and the configuration wants one."""
    said = families.says_tied(origin.config)
    if families.HEAD not in there:
        if not said:
            raise CheckpointError(f"tensor {families.HEAD} is missing", got="tie_word_embeddings false")
        return True
    if not said or there[families.HEAD] != there.get(families.EMBEDDING):
        return False
    return torch.equal(origin.read(families.HEAD), origin.read(families.EMBEDDING))


def _need_all(there: Mapping[str, Any], table: Mapping[str, tuple[str, ...]], family: str, config: ModelConfig) -> None:
    """Raises CheckpointError naming a tensor that is missing, or that nothing is made of."""
    wanted = {name for theirs in table.values() for name in theirs}
    for name in sorted(wanted - there.keys()):
        near = [other for other in sorted(there.keys() - wanted) if other.split(".")[:3] == name.split(".")[:3]]
        raise CheckpointError(f"tensor {name} is missing", got=f"{near[0]} in its place" if near else None)
    for name in sorted(there.keys() - wanted):
        allowed = f"the tensors of {config.layers} layers of {family}"
        raise CheckpointError(f"tensor {name} is not used", allowed=allowed, do="it would change what the model says")


def _need_shapes(
    there: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    table: Mapping[str, tuple[str, ...]],
    state: Mapping[str, Tensor],
    config: ModelConfig,
) -> None:
    """Raises CheckpointError naming a tensor of another shape than the configuration gives it."""
    for ours, theirs in table.items():
        first, *rest = state[ours].shape
        for name, rows in zip(theirs, families.rows(config, ours, first, len(theirs)) if theirs else (), strict=True):
            if there[name][1] != (rows, *rest):
                allowed = f"{[rows, *rest]} by config.json"
                raise CheckpointError(f"tensor {name}", got=list(there[name][1]), allowed=allowed)


def _dtype(there: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> torch.dtype:
    """What most of the weights are stored as."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, shape in there.values():
        counts[dtype] += torch.Size(shape).numel()
    return counts.most_common(1)[0][0]


def _card(name: str, family: str, origin: Source) -> str:
    return f"# {name}\n\nImported from {origin.name} ({family}). Its licence holds for these weights too.\n"


def _generation(told: Mapping[str, Any], ends: Sequence[int], vocab: int) -> dict[str, Any]:
    """The source's generation config, which also says what ends an answer where the source did not, or not all: where there is
    one, nobody looks into config.json, and to a base model its chat template has added an end. Else others never stop."""
    found = dict(told.get("generation_config") or {})
    said = (found or told["config"]).get("eos_token_id")
    known = {end for end in (said if isinstance(said, list) else [said]) if end is not None and 0 <= end < vocab}
    return found if known == set(ends) else {**found, "eos_token_id": list(ends)}


def need_exportable(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration of an imported model, and what its source said. Raises CheckpointError where it cannot be exported."""
    _, config = described.read_config(directory)
    if not (directory / described.SOURCE).exists() or config.quantization != "none":
        got = "a quantised model" if config.quantization != "none" else f"no {described.SOURCE}"
        raise CheckpointError(f"{directory} cannot be exported", got=got, do="give a model that `shoal import` made")
    told = described.read_json(directory / described.SOURCE)
    if (told["config"].get("rope_scaling") or {}).get("rope_type") == rope.RATES:
        got = "rates of a GGUF that no scheme of Hugging Face's is known to give"
        raise CheckpointError(
            f"{directory} cannot be exported", got=got, do="import the checkpoint that the GGUF was made from"
        )
    return config, told


def _need_empty(to: Path) -> None:
    """Raises CheckpointError for a place where something is, or that nothing can take."""
    checkpoint.need_movable(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to}", got="something that is there", do="choose a place that is empty")


def _need_beside(to: Path, directory: Path) -> None:
    """Raises as `_need_empty`, and for a place in the model that is exported, which could be replaced no more."""
    _need_empty(to)
    if to.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(f"{to}", got="a place in the model", do="choose one beside it")


def export_model(
    directory: str | Path,
    to: str | Path,
    *,
    depth: str | int = FULL,
    check: bool = True,
    shard_bytes: int = files.SHARD,
) -> int:
    """Write an imported model as a checkpoint of its family again, its tensors equal to the bit where its dtype was kept; or an
    early `depth` of an adapted one, which has a layer more than it runs. With `check` it is read again and compared, in the
    memory of one model. Returns how many tensors. Raises CheckpointError for a model that was not imported, or is quantised,
    and where the comparison fails; ConfigError for a depth that it has not. Then nothing is written."""
    directory, to = Path(directory), Path(to)
    config, told = need_exportable(directory)
    _need_beside(to, directory)
    config_json = families.confirmed(told["family"], told["config"], tied=config.tied, biased=config.qkv_bias)
    seen = read_of(directory)
    files.check(directory)
    held = map(opened_weights, files.weight_files(directory))
    at = {name: opened for opened in held for name in opened.keys()}  # noqa: SIM118, no mapping
    cut, layers = depths.alone(config, depth), config.depth(depth)
    table = {ours: theirs for ours, theirs in families.names(told["family"], cut) if theirs}
    with torch.device("meta"):
        state = Net(cut).state_dict()
    kept = DTYPES[at["embed.weight"].get_slice("embed.weight").get_dtype()]
    planned: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    cuts: dict[str, tuple[str, int, int]] = {}
    for ours, theirs in table.items():
        first, *rest = state[ours].shape
        start = 0
        for name, rows in zip(theirs, families.rows(cut, ours, first, len(theirs)), strict=True):
            planned[name] = kept, (rows, *rest)
            cuts[name] = ours, start, start + rows
            start += rows

    def part(ours: str, a: int, b: int) -> Tensor:
        found = depths.origin(ours, config, layers, cut)
        if isinstance(found, float):
            return torch.full((b - a, *state[ours].shape[1:]), found, dtype=kept)
        read: Tensor = at[found].get_slice(found)[a:b]
        return read

    loaded = described.read(directory)
    source = proof.Told(Model.load(directory), depth) if check else None
    with checkpoint.replacing(to, _need_empty) as aside:
        streams.write(aside, planned, ((name, part(*where)) for name, where in cuts.items()), shard_bytes)
        stored = dict.fromkeys(("dtype", "torch_dtype"), str(kept).removeprefix("torch."))
        write_json(aside / "config.json", {**depths.described(config_json, layers, cut), **stored})
        generation = _generation(told, loaded.tokenizer.ends, config.vocab)
        for key, values in (("generation_config", generation), ("tokenizer_config", told.get("tokenizer_config"))):
            if values:
                write_json(aside / f"{key}.json", values)
        (aside / described.TOKENIZER).write_text(loaded.tokenizer.plain_json, encoding="utf-8")
        (aside / described.TEMPLATE).write_text(loaded.chat_template, encoding="utf-8")
        for licence in files.licences(directory):
            shutil.copy(licence, aside / licence.name)
        seen.need_same()
        if source is not None:
            proof.hold(source, aside, aside)
    return len(planned)
