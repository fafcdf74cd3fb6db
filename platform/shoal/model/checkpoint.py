"""The model directory: config.json, model.safetensors, tokenizer.json, chat_template.jinja, router.json, README.md and
manifest.json, which lists the others.

Written aside and renamed, so a directory that exists is whole; safetensors and JSON only, so loading runs no code. How weights
are cut into files, and what is verified when they are read, is decided in `files.py`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shoal.config import ModelConfig, dump, load
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import files
from shoal.model.depth import Calibration, Router
from shoal.model.net import Net
from shoal.model.quant import SCHEME

T = TypeVar("T")

FORMAT, VERSION = "shoal-model", 1
ROUTER = "router."  # prefix of the router's tensors among the weights
_HUGGING_FACE = {"model_type": "shoal", "architectures": ["ShoalForCausalLM"]}  # by which vLLM finds `vllm_plugin`

# What other tools need to read the INT8 weights (compressed-tensors, W8A8 with dynamic activations). Ours are rounded to 7 of
# these 8 bits, by the scheme whose version stands beside this in config.json.
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["patch_in", "patch_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "Embedding"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def save(
    directory: str | Path,
    *,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    name: str,
    chat_template: str = DEFAULT_TEMPLATE,
    router: Router | None = None,
    card: str = "",
    shard_bytes: int = files.SHARD,
) -> None:
    """Write a model directory. `state` is the state of `Net(config)` on the CPU. Replaces an existing model directory.

    Weights of more than `shard_bytes` are cut into several files. Raises CheckpointError when something else is there.
    """
    directory = Path(directory)
    if directory.exists() and not _replaceable(directory):
        raise CheckpointError(f"{directory} exists and is not a model directory", do="choose another --out")
    meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": name, "model": dump(config), **_HUGGING_FACE}
    if config.quantization == "w8a8":
        meta |= {"quantization_config": _W8A8, "int8_scheme": SCHEME}
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    if router is not None:
        tensors |= {ROUTER + key: value.contiguous() for key, value in router.state_dict().items()}
    with _aside(directory) as aside:
        files.write_json(aside / "config.json", meta)
        files.save_weights(aside, tensors, shard_bytes)
        tokenizer.save(aside / "tokenizer.json")
        (aside / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        (aside / "README.md").write_text(card or f"# {name}\n\nA Shoal model.\n", encoding="utf-8")
        if router is not None:
            files.write_json(aside / "router.json", dataclasses.asdict(router.calibration))
        files.write_manifest(aside)


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").exists() or not any(path.iterdir()))


@contextmanager
def _aside(directory: Path) -> Iterator[Path]:
    """A directory to write in, which takes the place of `directory` once it is whole and is gone when that fails."""
    aside, before = (directory.with_name(f".{directory.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if directory.exists():
            directory.rename(before)
        aside.rename(directory)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclasses.dataclass
class Loaded:
    """The parts of a model directory; `net` holds the weights on the CPU."""

    name: str
    config: ModelConfig
    net: Net
    tokenizer: Tokenizer
    chat_template: str
    router: Router | None


def read_config(directory: str | Path) -> tuple[str, ModelConfig]:
    """Name and configuration of a model directory. Raises CheckpointError when it is not one of ours."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a model directory", got="no config.json", do="give a directory made by shoal"
        )
    meta = files.read_json(path)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        got = f"{meta.get('format')} version {meta.get('version')}"
        raise CheckpointError(f"{path}", got=got, allowed=f"{FORMAT} version {VERSION}")
    if not isinstance(meta.get("name"), str) or not isinstance(meta.get("model"), dict):
        raise CheckpointError(f"{path} lacks a name or a model", do="export the model again")
    config = _loaded(ModelConfig, meta["model"], path)
    scheme = meta.get("int8_scheme", 1)  # the first did not say so
    if config.quantization == "w8a8" and scheme != SCHEME:
        raise CheckpointError(
            f"{path}: int8_scheme", got=scheme, allowed=SCHEME, do="quantise the fp32 model with this version of shoal"
        )
    return meta["name"], config


def read(directory: str | Path, *, verify: bool = False) -> Loaded:
    """A model directory as parts; `verify` as `files.check`. Raises CheckpointError naming the file, and the key or tensor, at
    fault."""
    directory = Path(directory)
    name, config = read_config(directory)
    files.check(directory, verify)
    tensors = files.load_weights(directory)
    router_state = {key.removeprefix(ROUTER): tensors.pop(key) for key in list(tensors) if key.startswith(ROUTER)}
    with torch.device("meta"):
        net = Net(config)
    expected = net.state_dict()
    for key in sorted(expected.keys() ^ tensors.keys()):
        what = "lacks" if key in expected else "has an unknown"
        raise CheckpointError(f"{directory}: the model {what} tensor {key}", do="export the model again")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"tensor {key} of {directory}", got=list(tensor.shape), allowed=str(list(expected[key].shape))
            )
        whole = not expected[key].is_floating_point()
        if tensor.dtype != expected[key].dtype if whole else not tensor.is_floating_point():
            raise CheckpointError(f"tensor {key} of {directory}", got=tensor.dtype, allowed=str(expected[key].dtype))
    net.load_state_dict(tensors, assign=True)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    if len(tokenizer) > config.vocab:
        raise CheckpointError(
            f"{directory}: tokenizer", got=f"{len(tokenizer)} tokens", allowed=f"at most {config.vocab}"
        )
    try:
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {directory / 'chat_template.jinja'}", got=str(error)) from error
    return Loaded(name, config, net, tokenizer, template, _router(directory, config, router_state))


def _router(directory: Path, config: ModelConfig, state: dict[str, Tensor]) -> Router | None:
    if not state:
        return None
    router = Router(config)
    try:
        router.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"router of {directory}", got=str(error).splitlines()[0]) from error
    path = directory / "router.json"
    router.calibration = _loaded(Calibration, files.read_json(path), path)
    return router.requires_grad_(False)


def _loaded(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    try:
        return load(kind, values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}") from error
