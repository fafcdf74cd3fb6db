"""Typed configuration, and the one strict way to load it.

A config is a frozen dataclass whose fields carry their meaning and unit in the comment beside them. `load` refuses an
unknown key ("did you mean ..."), a wrong type and a wrong value by name; nothing is ever ignored. Standard library only
(YAML is read by `read_file` with PyYAML), so every plane can import this page.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from shoal.errors import ConfigError, did_you_mean

T = TypeVar("T")

GROUPS = 4  # layer groups of a model; a unit of KV memory is one page of one group
KvCacheDtype = Literal[
    "auto", "int8"
]  # what keys and values are stored as, in vLLM's words; auto: in the model's precision


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and of its attention (design sections 4 to 6). Lengths are in tokens, sizes in pixels."""

    vocab: int  # tokens in the tokenizer, special tokens included
    layers: int  # a multiple of 4
    width: int  # D, the residual stream
    heads: int  # H query heads
    kv_heads: int  # Hk key/value heads; H % Hk == 0
    head_dim: int  # d; rope turns the first d/2 dims, so d % 4 == 0
    ffn: int  # inner width of the SwiGLU
    train_length: int  # T, tokens in a training row
    window: int  # w, tokens that the local branch sees
    block: int  # S, tokens scored as one by the global branch
    page: int  # P, token slots of one page of K/V; P % S == 0
    top_k: int  # K, blocks that the global branch reads
    sinks: int = 1  # s, first blocks that are always among the K
    summary: Literal["mean", "mean_var"] = "mean"  # what a block is scored by; mean_var for long contexts at S >= 16
    mix_mode: Literal["fixed", "per_head"] = "per_head"  # is the gate between the branches learned?
    local_weight: float = 0.7  # gamma, the local branch's share (its start value when learned)
    attn_pattern: str = "H"  # repeated over the layers: H hybrid, L local only
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    patch: int = 8  # p, pixels on a side of an image patch
    image_size: int = 32  # longest side of an image, in pixels, after resizing; a multiple of `patch`
    max_length: int = 0  # longest context served; 0 means 4 * train_length
    quantization: Literal["none", "w8a8"] = "none"  # w8a8: int8 weights, dynamic 7-bit activations (section 8)

    def __post_init__(self) -> None:
        def need(ok: bool, what: str, got: object, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"model.{what}", got=got, allowed=allowed)

        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and f.name not in ("sinks", "max_length"):
                need(value > 0, f.name, value, "a positive integer")
        need(self.layers % GROUPS == 0, "layers", self.layers, f"a multiple of {GROUPS}, one layer group each")
        need(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")
        need(self.head_dim % 4 == 0, "head_dim", self.head_dim, "a multiple of 4 (rope turns half of it, in pairs)")
        need(self.page % self.block == 0, "page", self.page, f"a multiple of block ({self.block})")
        need(0 <= self.sinks <= self.top_k, "sinks", self.sinks, f"0 to top_k ({self.top_k})")
        need(0.0 <= self.local_weight <= 1.0, "local_weight", self.local_weight, "0 to 1")
        need(
            bool(self.attn_pattern) and set(self.attn_pattern) <= {"H", "L"},
            "attn_pattern", self.attn_pattern, "letters H (hybrid) and L (local only)",
        )  # fmt: skip
        need(self.image_size % self.patch == 0, "image_size", self.image_size, f"a multiple of patch ({self.patch})")
        need(
            self.image_tokens <= self.train_length, "image_size", self.image_size,
            f"an image of at most train_length ({self.train_length}) tokens; this one takes {self.image_tokens}",
        )  # fmt: skip
        need(self.max_length >= 0, "max_length", self.max_length, "0 or more")
        need(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "a positive number")
        need(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "above 0, below 1")
        if self.top_k * self.block >= self.train_length:
            warnings.warn(
                f"model.top_k * model.block = {self.top_k * self.block} >= train_length = {self.train_length}: "
                "the global branch reads everything, so it is never sparse in training",
                stacklevel=3,
            )

    @property
    def group_layers(self) -> int:
        """Layers in one group."""
        return self.layers // GROUPS

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths, in layers, at which the model can stop: L/4, L/2, from 24 layers on 3L/4, and L."""
        quarter = self.layers // GROUPS
        return (
            (quarter, 2 * quarter, 3 * quarter, self.layers)
            if self.layers >= 24
            else (quarter, 2 * quarter, self.layers)
        )

    @property
    def exit_names(self) -> dict[str, int]:
        """Exit name -> depth in layers, shallowest first."""
        names = ("shallow", "middle", "deep", "full") if len(self.exits) == 4 else ("shallow", "middle", "full")
        return dict(zip(names, self.exits, strict=True))

    @property
    def context(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self.max_length or 4 * self.train_length

    @property
    def summary_values(self) -> int:
        """Numbers in a block's summary for one KV head: its mean key, and with mean_var the variance as well."""
        return self.head_dim * (2 if self.summary == "mean_var" else 1)

    @property
    def image_tokens(self) -> int:
        """Tokens of the largest image: its patches, one after each row of them, and one at either end."""
        side = self.image_size // self.patch
        return side * (side + 1) + 2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: 3 p^2."""
        return 3 * self.patch**2

    def depth(self, depth: str | int | None) -> int:
        """The depth in layers for an exit name, a layer count, or None (full depth). Raises ConfigError otherwise."""
        if depth is None:
            return self.layers
        layers = self.exit_names.get(depth) if isinstance(depth, str) else depth
        if layers not in self.exits or isinstance(depth, bool):
            raise ConfigError("depth", got=depth, allowed=[*self.exit_names, *self.exits])
        return layers

    def attention_kind(self, layer: int) -> str:
        """``H`` or ``L`` for a layer, from `attn_pattern`."""
        return self.attn_pattern[layer % len(self.attn_pattern)]


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; one config serves pretraining, fine-tuning and quantisation-aware training."""

    learning_rate: float = 3e-3
    min_lr_ratio: float = 0.05  # the rate at the end, as a share of the peak
    warmup: float = 0.05  # share of the run in which the rate rises
    decay: float = 0.4  # share of the run, at its end, in which the rate falls (WSD); 1 - warmup: no plateau
    decay_shape: Literal["linear", "cosine"] = "linear"  # how it falls
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers; AdamW for all else
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 1.0  # largest gradient norm
    batch_tokens: int = 8192  # tokens in one update, over all workers and micro-batches
    accumulate: int = 2  # micro-batches that one worker merges into an update
    exit_weights: tuple[float, ...] = (0.15, 0.25, 1.0)  # loss weight of each exit, shallowest first
    exit_warmup: float = 0.2  # share of the run in which the early exits' weights rise from 0
    patch_weight: float = 0.5  # weight of the next-patch loss beside the cross-entropy
    # One early exit an update, in turn, its weight times their number: one early head instead of all (arXiv 2404.16710).
    rotate_exits: Literal["auto", "on", "off"] = "auto"  # auto: where the vocabulary is above 8192
    # Weight of KL(teacher || exit) beside each exit's cross-entropy. The teacher of early exits is full depth, which is not
    # pulled towards them (0.5 late in a run makes them agree more); of INT8, at each exit, the fp32 model. 0: off
    distill: float = 0.0
    # chance that an update leaves out the last layer; layer l: (2^(l/(L-1)) - 1) of it; 0: off
    layer_dropout: float = 0.0
    lora_rank: int = 0  # train thin matrices of this rank beside the layers' frozen ones; 0: train all weights
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip", "batch_tokens", "accumulate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed="a positive number")
        for name in ("min_lr_ratio", "warmup", "decay", "exit_warmup", "layer_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed="0 to 1")
        for name, allowed in (
            ("decay_shape", ("linear", "cosine")),
            ("optimizer", ("adamw", "muon")),
            ("rotate_exits", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed=allowed)
        for name in ("weight_decay", "patch_weight", "distill", "lora_rank"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed="0 or more")
        if self.warmup + self.decay > 1:
            raise ConfigError("train.warmup + train.decay", got=self.warmup + self.decay, allowed="0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("train.betas", got=self.betas, allowed="0 to 1, 1 left out")
        if not all(0 <= weight < math.inf for weight in self.exit_weights):
            raise ConfigError("train.exit_weights", got=self.exit_weights, allowed="numbers of 0 or more")


@dataclass(frozen=True)
class Preset:
    """A complete, named configuration."""

    name: str
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_exits(self.model, self.train)


def check_exits(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError unless `train` weighs exactly the exits that `model` has, the last (full depth) above 0."""
    weights, exits = train.exit_weights, model.exits
    if len(weights) != len(exits):
        allowed = f"{len(exits)} numbers, one for each exit: {', '.join(model.exit_names)}"
        raise ConfigError("train.exit_weights", got=weights, allowed=allowed)
    if weights[-1] <= 0:
        raise ConfigError("train.exit_weights", got=weights, allowed="full depth, the last, above 0")


def load(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A `kind` (a dataclass) from plain values. Raises ConfigError naming the key: unknown, missing, or of a wrong type."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise ConfigError(f"unknown key {prefix}{key}", allowed=sorted(fields), do=hint)
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {prefix}{missing[0]}", do=f"set {prefix}{missing[0]}")
    return kind(**{key: typed(hints[key], value, prefix + key) for key, value in values.items()})


def dump(config: Any) -> dict[str, Any]:
    """Plain values of a config dataclass, ready for JSON; `load` gives it back."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file. Raises ConfigError when it is missing, malformed, not a
    mapping of names, or when it gives a key twice."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}", got=str(error), do="give a readable UTF-8 file") from error
    try:
        values = json.loads(text, object_pairs_hook=_unique) if path.suffix == ".json" else _yaml(text)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"config {path} is not valid {path.suffix.lstrip('.') or 'YAML'}", got=first) from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}", got=type(values).__name__, allowed="a mapping of keys to values")
    return values


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            _unique([(self.construct_object(key, deep=True), None) for key in keys])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem}{line}") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of `pairs`. Raises ValueError for a key that is given twice: one of its values would be ignored."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return values


def typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks, with lists turned into tuples and ints into floats; anything else is a ConfigError of `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return load(hint, value, where)
    elif origin is Literal:
        if value in args:
            return value
        raise ConfigError(where, got=value, allowed=args)
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return typed(option, value, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) == len(value):
            return tuple(typed(h, v, where) for h, v in zip(inner, value, strict=True))
    elif origin is dict and isinstance(value, Mapping):
        return {typed(args[0], k, where): typed(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif origin is list and isinstance(value, (list, tuple)):
        return [typed(args[0], v, where) for v in value]
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(where, got=value, allowed=name)
