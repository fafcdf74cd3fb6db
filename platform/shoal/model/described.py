"""What a model directory says of itself: format, name, configuration, tokenizer and chat template. Read without torch, for who
loads the weights too (`checkpoint`) and for who does not (`api.served`), so that both refuse the same."""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shoal.config import ModelConfig, load, read_file
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.tokenizer import Tokenizer

T = TypeVar("T")

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
BASE = "base_sha256"  # in CONFIG: see `base`
SOURCE = "source.json"  # what an open model was imported from: family, what describes it, sha256 of its weights
ADAPTED = "adapted"  # there: see `adapted`
# how an answer is drawn: what a source may have a say in where a request is silent, and from what to what it may be
DRAWN: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_p": (0, 1), "top_k": (-1, 2**31), "min_p": (0, 1), "repetition_penalty": (1e-3, 100),
}  # fmt: skip
FORMAT, VERSION = "shoal-model", 1
OLD = ".old"  # end of the name of what was there before, while another takes its place (`checkpoint`)
INT8_SCHEME = 1  # version of `quant`: weights that another rounded are refused


@dataclass(frozen=True)
class Described:
    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: str


def read(directory: str | Path) -> Described:
    """Raises CheckpointError naming the file at fault: missing, of another format, or in contradiction with another."""
    directory = Path(directory)
    name, config = read_config(directory)
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if len(tokenizer) > config.vocab:
        raise CheckpointError(
            f"{directory}: tokenizer", got=f"{len(tokenizer)} tokens", allowed=f"at most {config.vocab}"
        )
    try:
        template = (directory / TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {directory / TEMPLATE}", got=str(error)) from error
    return Described(name, config, tokenizer, template)


def read_config(directory: str | Path) -> tuple[str, ModelConfig]:
    """Name and configuration of a model directory. Raises CheckpointError when it is not one of ours."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        do = "give a directory made by shoal"
        if not path.parent.exists():
            left = path.parent.parent.glob(f".{glob.escape(path.parent.name)}.*{OLD}")
            for name in sorted(((each.stat().st_ctime, each.name) for each in left), reverse=True)[:1]:
                do = f"what was to replace it was killed: give that command again, or rename {name[1]}, which it was"
        raise CheckpointError(f"{directory} is not a model directory", got=f"no {CONFIG}", do=do)
    meta = read_json(path)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        got = f"{meta.get('format')} version {meta.get('version')}"
        raise CheckpointError(f"{path}: format", got=got, allowed=f"{FORMAT} version {VERSION}")
    if not isinstance(meta.get("name"), str) or not isinstance(meta.get("model"), dict):
        raise CheckpointError(f"{path} lacks a name or a model", do="export the model again")
    config = loaded(ModelConfig, meta["model"], path)
    scheme = meta.get("int8_scheme", 1)  # the first did not say so
    if config.quantization == "w8a8" and scheme != INT8_SCHEME:
        raise CheckpointError(
            f"{path}: int8_scheme", got=scheme, allowed=INT8_SCHEME,
            do="quantise the fp32 model with this version of shoal",
        )  # fmt: skip
    return meta["name"], config


def base(directory: str | Path) -> str:
    """sha256 of the weights beside which adapters of this model are trained: of what it was imported from, or of what a run
    wrote. Adding exits and rounding keep it, and other training does not. Empty where nobody wrote it down. Raises
    CheckpointError for a file that cannot be read."""
    return str(read_json(Path(directory) / CONFIG).get(BASE, ""))


def sampling(directory: str | Path) -> dict[str, Any]:
    """What the source of an imported model says of `DRAWN`, for requests that do not; empty for a model of our own. One that is
    not to be sampled is greedy, whatever temperature stands beside that, as in transformers. Raises CheckpointError for a file
    that cannot be read, and for what is no number."""
    path = Path(directory) / SOURCE
    told = (read_json(path).get("generation_config") or {}) if path.exists() else {}
    return drawn(told, path) | ({"temperature": 0} if told.get("do_sample") is False else {})


def drawn(told: Mapping[str, Any], where: object) -> dict[str, Any]:
    """What a generation_config says of `DRAWN`. Raises CheckpointError for what no request may have."""
    numbers = {name: told[name] for name in DRAWN if told.get(name) is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise CheckpointError(f"{where}: generation_config.{name}", got=value, allowed="a number")
        low, high = DRAWN[name]
        if not low <= value <= high or (name == "top_k" and not isinstance(value, int)):
            allowed = f"{'a whole number from ' if name == 'top_k' else ''}{low:.10g} to {high:.10g}"
            raise CheckpointError(f"{where}: generation_config.{name}", got=value, allowed=allowed)
    return numbers


def known_weights(directory: str | Path) -> str:
    """The first 16 hexadecimal digits of `files.weights_sha256`, where a manifest lists all weights; else empty."""
    try:
        listed = read_json(Path(directory) / "manifest.json")["files"]
        found = {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".safetensors")}
    except (CheckpointError, LookupError, TypeError, AttributeError):
        return ""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16] if found else ""


def trained_further(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a model says of its `source` once its weights have changed: no longer what its early exits were worth before."""
    return None if source is None else {key: value for key, value in source.items() if key != ADAPTED}


def adapted(directory: str | Path) -> dict[str, Any] | None:
    """What is known of the early exits that an imported model was given: ``minutes`` of training, and the ``agreement`` of each
    by name; None where nobody measured it. Raises CheckpointError for a file that cannot be read."""
    path = Path(directory) / SOURCE
    told: dict[str, Any] | None = read_json(path).get(ADAPTED) if path.exists() else None
    return told


def is_ours(directory: Path) -> bool:
    """Does its configuration say that a directory is of our format, in whatever version?"""
    try:
        return read_json(directory / CONFIG).get("format") == FORMAT
    except CheckpointError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file of a model directory. Raises CheckpointError: the directory is at fault, not the command line."""
    try:
        return read_file(path)
    except ConfigError as error:
        raise CheckpointError(error.message) from error


def loaded(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    """A `kind` from the `values` in the file `path`. Raises CheckpointError naming the file and the key."""
    try:
        return load(kind, values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
