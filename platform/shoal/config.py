"""Typed configuration, and the one strict way to load it.

A config is a frozen dataclass whose fields carry their meaning and unit in the comment beside them. `load` refuses an
unknown key ("did you mean ..."), a wrong type and a wrong value by name; nothing is ever ignored. Standard library only
(YAML is read by `read_file` with PyYAML), so every plane can import this page.
"""

# long: all that can be set of a model and of training, beside the one reader that holds people to it
from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from shoal.errors import ConfigError, RequestError, did_you_mean, first_line

T = TypeVar("T")

# numbers of a ModelConfig that may be 0
MAY_BE_ZERO = ("sinks", "max_length", "rope_dims", "image_size", "exit_ffn", "dense_length")
GROUPS = 4  # layer groups of a model; a unit of KV memory is one page of one group
# what keys and values are stored as, in vLLM's words; auto: in the model's precision
KvCacheDtype = Literal["auto", "int8"]
Dtype = Literal["auto", "bfloat16", "float32"]  # of weights and activations on a GPU

AUTO = "auto"  # the depth of a request that leaves it to the router
FULL = "full"  # the name of the last exit


class Exits:
    """What stops at several depths: here a depth is read, and nowhere else."""

    @property
    def exit_names(self) -> dict[str, int]:
        """Exit name -> depth in layers, shallowest first."""
        raise NotImplementedError

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths, in layers, shallowest first."""
        return tuple(self.exit_names.values())

    def depth(self, depth: str | int) -> int:
        """The layers that `depth` means: an exit's name, or its layers. Raises ConfigError otherwise."""
        layers = self.exit_names.get(depth) if isinstance(depth, str) else depth
        if layers not in self.exits or isinstance(depth, bool):
            raise ConfigError("depth", got=depth, allowed=[*self.exit_names, *self.exits])
        return layers

    def asked(self, depth: str | int, *, auto: bool = True, tolerance: float | None = None) -> int | None:
        """As `depth`, of a request; None for `AUTO`, where that is allowed. Raises RequestError otherwise, and for a
        `tolerance` at the first of several exits: nothing is beyond it that could look at its words."""
        if auto and depth == AUTO:
            return None
        try:
            layers = self.depth(depth)
        except ConfigError as error:
            allowed = [*((AUTO,) if auto else ()), *self.exit_names, *self.exits]
            raise RequestError("depth", param="depth", got=depth, allowed=allowed) from error
        if tolerance is not None and len(self.exits) > 1 and layers == self.exits[0]:
            do = "leave it out, or ask for a deeper one"
            raise RequestError("quality_tolerance at the first exit", param="quality_tolerance", do=do)
        return layers


@dataclass(frozen=True)
class ModelConfig(Exits):
    """The shape of a model and of its attention (docs/architecture.md). Lengths are in tokens, sizes in pixels.

    Examples:
        >>> import dataclasses
        >>> from shoal import presets
        >>> config = presets.get("tiny").model
        >>> config.exit_names, config.context
        ({'shallow': 2, 'middle': 4, 'full': 8}, 1024)
        >>> dataclasses.replace(config, layers=3)
        Traceback (most recent call last):
        shoal.errors.ConfigError: model.layers: got 3; allowed: 4 or more, one layer group each
    """

    vocab: int  # tokens in the tokenizer, special tokens included
    layers: int  # 4 or more: four groups, of which the first have one more where 4 does not divide them
    width: int  # D, the residual stream
    heads: int  # H query heads
    kv_heads: int  # Hk key/value heads; H % Hk == 0
    head_dim: int  # d; a multiple of 4, as rope turns the first d/2 dims in pairs
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
    # repeated over the layers: H hybrid, L local only, D dense (all of the context), S sparse (one softmax over the window and
    # the best blocks before it; all of the context for a query before `dense_length`)
    attn_pattern: str = "H"
    dense_length: int = 0  # of S layers; a multiple of `page`
    rope_theta: float = 10_000.0
    rope_dims: int = 0  # leading dims of a head that rope turns; 0: half of them
    rope_rates: tuple[float, ...] = ()  # radians a token of each pair of those; none: rope_theta^(-i / pairs)
    rope_scale: float = 1.0  # what turned dims are multiplied by, of queries and of keys
    rope_pattern: str = "R"  # repeated over the layers: R turned, N without positions
    norm_eps: float = 1e-6
    norm_place: Literal["before", "after"] = "before"  # where the norms of attention and MLP stand
    qk_norm: Literal["head", "all", "none"] = "head"  # of queries and keys: each head, all heads as one, or none
    qkv_bias: bool = False  # is something added to queries, keys and values?
    tied: bool = True  # is the token table the head as well?
    embed_scale: float = 0.0  # what a token's row is multiplied by; 0: sqrt(D)
    early_exits: bool = True  # False: full depth alone, as in open models
    exit_ffn: int = 0  # inner width of a SwiGLU that each early exit has before its norm; 0: the norm alone
    patch: int = 8  # p, pixels on a side of an image patch
    image_size: int = 32  # longest side of an image, in pixels, after resizing; a multiple of `patch`; 0: text alone
    max_length: int = 0  # longest context served; 0 means 4 * train_length
    quantization: Literal["none", "w8a8"] = "none"  # w8a8: int8 weights, dynamic 7-bit activations (decision 0003)

    def __post_init__(self) -> None:
        def need(ok: bool, what: str, got: object, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"model.{what}", got=got, allowed=allowed)

        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and f.name not in MAY_BE_ZERO:
                need(value > 0, f.name, value, "a positive integer")
        need(self.layers >= GROUPS, "layers", self.layers, f"{GROUPS} or more, one layer group each")
        need(self.heads % self.kv_heads == 0, "heads", self.heads, f"a multiple of kv_heads ({self.kv_heads})")
        need(self.head_dim % 4 == 0, "head_dim", self.head_dim, "a multiple of 4 (rope turns half of it, in pairs)")
        need(self.page % self.block == 0, "page", self.page, f"a multiple of block ({self.block})")
        need(0 <= self.sinks <= self.top_k, "sinks", self.sinks, f"0 to top_k ({self.top_k})")
        need(0.0 <= self.local_weight <= 1.0, "local_weight", self.local_weight, "0 to 1")
        need(
            bool(self.attn_pattern) and set(self.attn_pattern) <= {"H", "L", "D", "S"},
            "attn_pattern", self.attn_pattern, "letters H (hybrid), L (local only), D (dense) and S (sparse)",
        )  # fmt: skip
        dense = self.dense_length >= 0 and self.dense_length % self.page == 0
        need(dense, "dense_length", self.dense_length, f"0 or more, a multiple of page ({self.page})")
        holds_tail = "S" not in self.attn_pattern or self.window >= self.block
        need(holds_tail, "window", self.window, f"at least block ({self.block}) where layers are sparse")
        rope = bool(self.rope_pattern) and set(self.rope_pattern) <= {"R", "N"}
        need(rope, "rope_pattern", self.rope_pattern, "letters R (turned) and N (without positions)")
        dims = 0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0
        need(dims, "rope_dims", self.rope_dims, f"an even number up to head_dim ({self.head_dim})")
        pairs = (self.rope_dims or self.head_dim // 2) // 2
        need(len(self.rope_rates) in (0, pairs), "rope_rates", len(self.rope_rates), f"{pairs} numbers, or none")
        need(self.exit_ffn >= 0, "exit_ffn", self.exit_ffn, "0 or more")
        need(self.early_exits or not self.exit_ffn, "exit_ffn", self.exit_ffn, "0 where early_exits is false")
        need(self.embed_scale >= 0, "embed_scale", self.embed_scale, "0 or more")
        need(self.image_size >= 0, "image_size", self.image_size, "0 or more")
        need(self.image_size % self.patch == 0, "image_size", self.image_size, f"a multiple of patch ({self.patch})")
        need(
            self.image_tokens <= self.train_length, "image_size", self.image_size,
            f"an image of at most train_length ({self.train_length}) tokens; this one takes {self.image_tokens}",
        )  # fmt: skip
        need(self.max_length >= 0, "max_length", self.max_length, "0 or more")
        need(0 < self.rope_theta < math.inf, "rope_theta", self.rope_theta, "a positive number")
        need(0 < self.rope_scale < math.inf, "rope_scale", self.rope_scale, "a positive number")
        need(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "above 0, below 1")
        if self.top_k * self.block >= self.train_length:
            warnings.warn(
                f"model.top_k * model.block = {self.top_k * self.block} >= train_length = {self.train_length}: "
                "the global branch reads everything, so it is never sparse in training",
                stacklevel=3,
            )

    @property
    def group_layers(self) -> int:
        """Layers in the largest group, which is the first."""
        return -(-self.layers // GROUPS)

    @property
    def ends(self) -> tuple[int, ...]:
        """Depth in layers after each group."""
        size, more = divmod(self.layers, GROUPS)
        return tuple(accumulate(size + (group < more) for group in range(GROUPS)))

    def groups(self, layers: int) -> int:
        """How many groups a depth of `layers` runs through; it must be the end of one."""
        return self.ends.index(layers) + 1

    @property
    def exits(self) -> tuple[int, ...]:
        """Depths, in layers, at which the model can stop: L/4, L/2, from 24 layers on 3L/4, and L; or L alone."""
        first, second, third, last = self.ends
        if not self.early_exits:
            return (last,)
        return (first, second, third, last) if self.layers >= 24 else (first, second, last)

    @property
    def exit_names(self) -> dict[str, int]:
        """Exit name -> depth in layers, shallowest first."""
        names = {4: ("shallow", "middle", "deep", FULL), 3: ("shallow", "middle", FULL), 1: (FULL,)}
        return dict(zip(names[len(self.exits)], self.exits, strict=True))

    @property
    def context(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self.max_length or 4 * self.train_length

    @property
    def of_open_models(self) -> tuple[str, ...]:
        """Names of the settings that models of our own leave as they are, and this one does not."""
        names = (
            "rope_dims", "rope_rates", "rope_scale", "rope_pattern", "norm_place", "qk_norm", "qkv_bias", "tied",
            "embed_scale", "early_exits", "exit_ffn",
        )  # fmt: skip
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        return tuple(name for name in names if getattr(self, name) != plain[name])

    @property
    def summary_values(self) -> int:
        """Numbers in a block's summary for one KV head: its mean key, and with mean_var the variance as well."""
        return self.head_dim * (2 if self.summary == "mean_var" else 1)

    @property
    def image_tokens(self) -> int:
        """Tokens of the largest image: its patches, one after each row of them, and one at either end."""
        side = self.image_size // self.patch
        return side * (side + 1) + 2 if side else 0

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: 3 p^2."""
        return 3 * self.patch**2

    def attention_kind(self, layer: int) -> str:
        """``H``, ``L``, ``D`` or ``S`` for a layer, from `attn_pattern`."""
        return self.attn_pattern[layer % len(self.attn_pattern)]

    def turned(self, layer: int) -> bool:
        """Does rope turn the queries and keys of a layer?"""
        return self.rope_pattern[layer % len(self.rope_pattern)] == "R"


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
    cross_entropy: float = 1.0  # weight of each exit's cross-entropy; 0: `distill` alone
    # DPO (arXiv 2305.18290) on preference pairs in place of cross-entropy, against the model that the run starts from: how much
    # a nat more between the two answers weighs (0.1). 0: off
    dpo: float = 0.0
    # exits: the early ones alone, beside weights that stay as they are; tuned: these with the backbone, or, where there is a
    # lora_rank, with thin matrices beside it; biases: those of sparse layers alone
    trains: Literal["all", "exits", "tuned", "biases"] = "all"
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
            ("trains", ("all", "exits", "tuned", "biases")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed=allowed)
        for name in ("weight_decay", "patch_weight", "distill", "dpo", "cross_entropy", "lora_rank"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"train.{name}", got=getattr(self, name), allowed="0 or more")
        if self.dpo and (self.distill or self.trains != "all"):
            raise ConfigError("train.dpo", got=self.dpo, allowed="0 beside distill, and where exits alone are trained")
        if not self.distill and not self.cross_entropy:
            raise ConfigError("train.distill", got=0.0, allowed="above 0 where train.cross_entropy is 0")
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
    """A `kind` (a dataclass) from plain values. Raises ConfigError naming the key: unknown, missing, or of a wrong type.

    Examples:
        >>> from shoal.config import TrainConfig, load
        >>> load(TrainConfig, {"optimizer": "muon"}, "train").optimizer
        'muon'
        >>> load(TrainConfig, {"optimiser": "muon"}, "train")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        shoal.errors.ConfigError: unknown key train.optimiser: ...did you mean 'optimizer'?
    """
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
        what = f"config {path} is not valid {path.suffix.lstrip('.') or 'YAML'}"
        raise ConfigError(what, got=first_line(error)) from error
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
        if (type(value), value) in [(type(arg), arg) for arg in args]:  # 1 is not true
            return value
        raise ConfigError(where, got=value, allowed=args)
    elif origin in (typing.Union, types.UnionType):
        known = [option for option in args if dataclasses.is_dataclass(option)]
        if len(known) == 1 and isinstance(value, Mapping):
            return typed(known[0], value, where)  # whose error names the key within
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
