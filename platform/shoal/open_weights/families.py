"""What the families of open models have in common with our network, and where they differ: one table of names for all, and for
each family the settings of our one block. Read forwards it imports, read backwards it exports.

A name of ours stands for one tensor of theirs, or for several that are joined along their first dim in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import CheckpointError, ConfigError
from shoal.open_weights import rope
from shoal.open_weights.told import positive, texts, whole

Names = Mapping[str, tuple[str, ...]]
PAGE = 16  # tokens of a page and of a block, of which no dense layer makes use
# of any number in a config.json, of layers, and of a head's dims: more would only take time and memory to refuse
MOST, MOST_LAYERS, MOST_HEAD = 2**31, 4096, 2**14

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_LAYER: Names = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": tuple(f"self_attn.{name}.weight" for name in _PROJECTIONS),
    "attention.qkv_bias": tuple(f"self_attn.{name}.bias" for name in _PROJECTIONS),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
_FUSED: Names = {
    "attention.qkv.weight": ("self_attn.qkv_proj.weight",),
    "mlp.up.weight": ("mlp.gate_up_proj.weight",),
}
_NORMS_AFTER: Names = {
    "attention_norm.weight": ("post_attention_layernorm.weight",),
    "mlp_norm.weight": ("post_feedforward_layernorm.weight",),
}
EMBEDDING, HEAD, LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_DERIVED = ("rotary_emb.inv_freq",)  # ends of names of tensors that say nothing new


@dataclass(frozen=True)
class Family:
    """`layer`: what its tensors of a layer are called, where not as Llama's; `settings`: of our block; `defaults`: what its
    config.json means where it does not say it."""

    layer: Names = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False  # does its class read partial_rotary_factor?
    typed: tuple[str, ...] = ()  # it reads layer_types, and what must be set where they name windows
    skips: bool = False  # does it read no_rope_layers and no_rope_layer_interval?
    schemes: tuple[str, ...] = rope.KINDS  # of rope, that its class takes
    # has a layer a window, where layer_types does not say it? `turned`: has it positions?
    windowed: Callable[[Mapping[str, Any], int, bool], bool] = lambda config, layer, turned: False


_SWITCHED = ("sliding_window", "use_sliding_window")


def _all_windowed(config: Mapping[str, Any], layer: int, turned: bool) -> bool:
    return config.get("sliding_window") is not None


def _used(config: Mapping[str, Any]) -> bool:
    return bool(config.get("use_sliding_window") and config.get("sliding_window"))


def _late_windowed(config: Mapping[str, Any], layer: int, turned: bool) -> bool:
    return _used(config) and layer >= int(config.get("max_window_layers", 28))


def _unturned_windowed(config: Mapping[str, Any], layer: int, turned: bool) -> bool:
    return _used(config) and not turned


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(defaults={"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
        typed=("sliding_window",),
        windowed=_all_windowed,
    ),
    "Qwen2ForCausalLM": Family(
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32}, typed=_SWITCHED, windowed=_late_windowed
    ),
    "Qwen3ForCausalLM": Family(
        settings={"qk_norm": "head"},
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        typed=_SWITCHED,
        windowed=_late_windowed,
    ),
    "Olmo2ForCausalLM": Family(
        layer=_NORMS_AFTER,
        settings={"qk_norm": "all", "norm_place": "after"},
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "Phi3ForCausalLM": Family(
        layer=_FUSED,
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        partial=True,
        schemes=("default", "longrope"),
        windowed=_all_windowed,
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        typed=_SWITCHED,
        skips=True,
        windowed=_unturned_windowed,
    ),
}
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip

# Classes of transformers with biases of q, k, v: always, and where `attention_bias` says so.
BIASED = ("Qwen2ForCausalLM",)
MAY_BE_BIASED = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Olmo2ForCausalLM", "SmolLM3ForCausalLM")

# What is known and cannot be had: a word in the name of the architecture, and the reason.
REFUSED = (
    ("Moe", "a mixture of experts"), ("Mixtral", "a mixture of experts"), ("Deepseek", "a mixture of experts"),
    ("GptOss", "a mixture of experts"), ("Llama4", "a mixture of experts"), ("Dbrx", "a mixture of experts"),
    ("Jamba", "linear attention"), ("Mamba", "linear attention"), ("Bamba", "linear attention"), ("Zamba", "linear attention"),
    ("Rwkv", "linear attention"), ("Qwen3Next", "linear attention"), ("Qwen3_5", "linear attention"),
    ("Lfm2", "linear attention"), ("RecurrentGemma", "linear attention"), ("FalconH1", "linear attention"),
    ("NemotronH", "linear attention"), ("KimiLinear", "linear attention"), ("MiniMax", "a mixture of experts"),
    ("Gemma2", "soft-capped scores"), ("Grok", "a mixture of experts"), ("Gemma", "norms around each part, and GeGLU"),
)  # fmt: skip
_KEYS = {  # of config.json, when they say something: the reason
    "quantization_config": "quantised: give the checkpoint that it was made from",
    "num_experts": "a mixture of experts", "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts", "attn_logit_softcapping": "soft-capped scores",
    "final_logit_softcapping": "soft-capped scores", "clip_qkv": "clipped queries, keys and values",
    "query_pre_attn_scalar": "another scale of scores", "attention_multiplier": "another scale of scores",
    "rope_interleaved": "pairs of neighbouring dims", "use_qk_norm": "norms that its class does not have",
    "qk_layernorm": "norms that its class does not have", "per_layer_config": "a configuration for each layer",
    "per_layer_heterogeneous_config": "a configuration for each layer",
}  # fmt: skip
# Factors, of which 1 changes nothing, as other classes have them.
_FACTORS = (
    "embedding_multiplier", "residual_multiplier", "lm_head_multiplier", "logits_scaling", "logit_scale", "scale_emb",
    "scale_depth", "mup_scale", "mup_width_scale", "mup_embeddings_multiplier",
)  # fmt: skip


def family_of(config: Mapping[str, Any]) -> str:
    """The architecture that a ``config.json`` names. Raises CheckpointError with the reason for one that cannot be imported."""
    named = texts("config.json: architectures", config.get("architectures") or [])
    name = next(iter(named), None) or _MODEL_TYPES.get(str(config.get("model_type"))) or str(config.get("model_type"))
    reason = next((reason for word, reason in REFUSED if word.lower() in name.lower()), None)
    if name not in FAMILIES:
        got = f"{name}: {reason}" if reason else name
        raise CheckpointError("architecture", got=got, allowed=list(FAMILIES))
    for key, why in _KEYS.items():
        if config.get(key):
            raise CheckpointError(f"config.json: {key}", got=why, do="choose a dense checkpoint of plain weights")
    for key in _FACTORS:
        if config.get(key) not in (None, 1):
            raise CheckpointError(f"config.json of {name}: {key}", got=config[key], allowed=1)
    return name


def confirmed(family: str, config: Mapping[str, Any], *, tied: bool, biased: bool) -> dict[str, Any]:
    """A ``config.json`` with the flags that its tensors say, where it says others: who reads them with transformers would get a
    head that is the table, no biases of q, k, v, or fresh ones. Raises CheckpointError where transformers' class can have
    none."""
    found = dict(config)
    if says_tied(config) != tied:
        found["tie_word_embeddings"] = tied
    if biased and family not in BIASED:
        if family not in MAY_BE_BIASED:
            raise CheckpointError(
                f"biases of q, k and v in a {family}", got="no flag for them", do="serve it here alone"
            )
        found["attention_bias"] = True
    for key, has in (("attention_bias", biased), ("mlp_bias", False)):
        if found.get(key) and not has:
            found[key] = False
    return found


def says_tied(config: Mapping[str, Any]) -> bool:
    """Does a ``config.json`` say that the token table is the head as well? What it leaves out, its family says."""
    return bool({**FAMILIES[family_of(config)].defaults, **config}.get("tie_word_embeddings"))


def shape_of(config: Mapping[str, Any], tensors: Collection[str], *, tied: bool, context: int = 0) -> ModelConfig:
    """Our configuration of what a ``config.json`` describes and the names of its `tensors` confirm; `tied`: is the token table
    the head as well? `context`: serve no longer texts than this many tokens [the source's]. Raises CheckpointError naming the
    key that is missing, contradictory, or of something that our network does not do."""
    name = family_of(config)
    family = FAMILIES[name]
    told: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu"}
    told |= {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in ("sliding_window", "num_key_value_heads", "head_dim"):  # null is no window, and not the family's
        if config.get(key, ...) is None:
            told.pop(key, None)

    def size(key: str, most: int = MOST, least: int = 1) -> int:
        return whole(f"config.json: {key}", told.get(key), most, least)

    layers = size("num_hidden_layers", MOST_LAYERS)
    width, heads = size("hidden_size"), size("num_attention_heads")
    if told["hidden_act"] not in ("silu", "swish"):
        raise CheckpointError("config.json: hidden_act", got=told["hidden_act"], allowed="silu")
    head_dim = size("head_dim", MOST_HEAD) if "head_dim" in told else width // heads
    if not 2 <= head_dim <= MOST_HEAD:
        got, allowed = f"{width} for {heads} heads", f"2 to {MOST_HEAD} dims a head"
        raise CheckpointError("config.json: hidden_size", got=got, allowed=allowed)
    dims, theta = _turns(told, name, head_dim)
    kind = rope.scheme(told)[1]
    if kind in rope.KINDS and kind not in family.schemes:
        raise CheckpointError(f"config.json of {name}: rope_type", got=kind, allowed=family.schemes)
    rates, most, scale = rope.rates(told, dims, theta, context)
    length = min(n for n in (size("max_position_embeddings"), most, context) if n)
    for key, least in (("max_window_layers", 0), ("no_rope_layer_interval", 1)):
        if key in told:
            size(key, least=least)
    turned = _turned(told, family, layers)
    kinds = _kinds(told, family, turned)
    window = size("sliding_window") if "L" in kinds else length
    if window >= length:
        kinds, window = "D" * layers, length
    values: dict[str, Any] = {
        "vocab": size("vocab_size"), "layers": layers, "width": width, "heads": heads,
        "kv_heads": size("num_key_value_heads") if "num_key_value_heads" in told else heads, "head_dim": head_dim,
        "ffn": size("intermediate_size"), "train_length": length, "max_length": length, "window": window, "block": PAGE,
        "page": PAGE, "top_k": 1, "sinks": 0, "mix_mode": "fixed", "attn_pattern": _short(kinds),
        "rope_theta": theta, "rope_dims": dims,
        "rope_rates": rates, "rope_scale": scale, "rope_pattern": _short(turned),
        "norm_eps": positive("config.json: rms_norm_eps", told["rms_norm_eps"]), "qk_norm": "none",
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in tensors, "tied": tied, "embed_scale": 1.0, "early_exits": False,
        "image_size": 0,
    }  # fmt: skip
    try:
        return ModelConfig(**{**values, **family.settings})
    except ConfigError as error:
        raise CheckpointError(f"config.json of {name}: {error.message}") from error


def _turns(told: Mapping[str, Any], name: str, head_dim: int) -> tuple[int, float]:
    """How many dims of a head are turned, and theta. Raises CheckpointError."""
    inner, _ = rope.scheme(told)
    given = next(
        (each["partial_rotary_factor"] for each in (inner, told) if each.get("partial_rotary_factor") is not None), None
    )
    share = 1.0 if given is None else positive("config.json: partial_rotary_factor", given)
    if share != 1 and not FAMILIES[name].partial:  # its class turns all, whatever this says
        raise CheckpointError(f"config.json of {name}: partial_rotary_factor", got=share, allowed=1)
    dims = int(head_dim * share)
    if not 2 <= dims <= head_dim:  # 0 would be a form of our own
        raise CheckpointError(
            "config.json: partial_rotary_factor", got=share, allowed=f"two dims of {head_dim}, or more"
        )
    theta = positive("config.json: rope_theta", told["rope_theta"])
    if inner.get("rope_theta") is not None:
        theta = positive("config.json: rope_theta", inner["rope_theta"])
    return dims, theta


def _kinds(told: Mapping[str, Any], family: Family, turned: str) -> str:
    """D or L of each layer, of which it is known whether it is `turned`. Raises CheckpointError for layer_types that its class
    does not read, and that say something else."""
    letters = {"full_attention": "D", "sliding_attention": "L"}
    types, layers = told.get("layer_types"), len(turned)
    own = "".join("L" if family.windowed(told, n, turned[n] == "R") else "D" for n in range(layers))
    if types is None:
        return own
    odd = next((kind for kind in texts("config.json: layer_types", types) if kind not in letters), None)
    if odd is not None or len(types) != layers:
        got = odd if odd is not None else f"{len(types)} for {layers} layers"
        raise CheckpointError("config.json: layer_types", got=got, allowed=list(letters))
    kinds = "".join(letters[kind] for kind in types)
    if not family.typed and kinds != own:
        alone = {"D": "full_attention", "L": "sliding_attention"}[own[0]]
        raise CheckpointError(
            "config.json: layer_types", got="windows by layer", allowed=f"{alone} in all, as its class has it"
        )
    for key in family.typed if "L" in kinds else ():
        if not told.get(key):
            raise CheckpointError(f"config.json: {key}", got=told.get(key), allowed="set, as layer_types names windows")
    return kinds


def _turned(told: Mapping[str, Any], family: Family, layers: int) -> str:
    """R or N of each layer: 1 in `no_rope_layers` means that rope is used. Raises CheckpointError."""
    flags, each = told.get("no_rope_layers"), told.get("no_rope_layer_interval")
    if flags is None:
        flags = [(n + 1) % each for n in range(layers)] if each else [1] * layers
    if not isinstance(flags, list) or len(flags) < layers:
        got = f"{len(flags)} numbers" if isinstance(flags, list) else flags
        raise CheckpointError("config.json: no_rope_layers", got=got, allowed=f"{layers}, one a layer")
    turned = "".join("R" if flag else "N" for flag in flags[:layers])
    if "N" in turned and not family.skips:  # its class turns all, whatever this says
        raise CheckpointError(
            "config.json: no_rope_layers", got="layers without positions", allowed="none in this family"
        )
    return turned


def _short(letters: str) -> str:
    return letters[0] if len(set(letters)) == 1 else letters


def names(family: str, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each tensor of our network, and theirs that it is joined of. Gates, which they have not, have none."""
    layer = {**_LAYER, **FAMILIES[family].layer}
    yield "embed.weight", (EMBEDDING,)
    first = 0
    for group, end in enumerate(config.ends):
        for number in range(first, end):
            for ours, theirs in layer.items():
                if ours == "attention.qkv_bias" and not config.qkv_bias:
                    continue
                if ours.endswith(("q_norm.weight", "k_norm.weight")) and config.qk_norm == "none":
                    continue
                at = f"groups.{group}.blocks.{number - first}"
                yield f"{at}.{ours}", tuple(f"model.layers.{number}.{name}" for name in theirs)
            if config.attention_kind(number) != "D":
                yield f"groups.{group}.blocks.{number - first}.attention.gate", ()
        first = end
    yield f"exit_norms.{config.layers}.weight", (LAST_NORM,)
    if not config.tied:
        yield "output.weight", (HEAD,)


def rows(config: ModelConfig, ours: str, total: int, pieces: int) -> tuple[int, ...]:
    """How many of the `total` first-dim rows of a tensor of ours each of its `pieces` has."""
    if pieces == 1:
        return (total,)
    if "qkv" in ours:
        return config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim
    return (config.ffn,) * pieces


def is_derived(name: str) -> bool:
    """Does a tensor say nothing that the configuration does not?"""
    return name.endswith(_DERIVED)
