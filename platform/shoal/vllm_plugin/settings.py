"""A model directory as vLLM sees it: a Hugging Face config, a tokenizer, and the options of vLLM that a Shoal model refuses.

Depth is the deployment's: ``--hf-overrides '{"depth": "middle"}'`` serves the model cut off after its second exit, with K/V
memory for those layers alone. ``"per-request"`` keeps all layers and lets every request say (`depths.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from shoal import config
from shoal.config import FULL, ModelConfig
from shoal.errors import ConfigError
from shoal.inputs.tokenizer import END, END_ID, PAD, PAD_ID
from shoal.vllm_plugin import ARCHITECTURE, PER_REQUEST

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ShoalConfig(PretrainedConfig):  # type: ignore[misc]
    """``config.json`` of a model directory, under the names that vLLM asks for."""

    model_type = "shoal"

    def __init__(self, model: dict[str, Any] | None = None, depth: str | int = FULL, **rest: Any) -> None:
        """`model`: a ModelConfig's fields (None: transformers makes an empty one to compare with); `depth`: an exit, or
        ``per-request``."""
        self.model = model or {}
        self.depth = depth
        shape = self.shape if model else None
        for ours, theirs in _NAMES.items():
            setattr(self, theirs, getattr(shape, ours, 0))
        if model:
            rest = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, **rest}
        rest = {"architectures": [ARCHITECTURE], "tie_word_embeddings": True, **rest}
        super().__init__(**rest)

    @property
    def shape(self) -> ModelConfig:
        return config.load(ModelConfig, self.model, "model")

    @property
    def layers(self) -> int:
        """Layers that are served. Raises ConfigError for a depth that is no exit."""
        return self.shape.depth(FULL if self.depth == PER_REQUEST else self.depth)


_NAMES = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
}


class ShoalTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]
    """``tokenizer.json`` with its control tokens named. Unlike in our own service, a user's text can spell them."""

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """What the base class is made of: the file as it is, which transformers would else rebuild, and lose spaces by it."""
        made = PreTrainedTokenizerFast.convert_to_native_format(**kwargs)
        return {"eos_token": END, "pad_token": PAD} | {name: value for name, value in made.items() if value is not None}


def register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Check(VerifyAndUpdateConfig):  # type: ignore[misc]
        """What vLLM runs where an engine is configured, before any process of it starts."""

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check(vllm_config)

    AutoConfig.register(ShoalConfig.model_type, ShoalConfig, exist_ok=True)
    AutoTokenizer.register(ShoalConfig, fast_tokenizer_class=ShoalTokenizer, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"shoal.vllm_plugin.network:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Check


def check(vllm_config: VllmConfig) -> None:
    """Raises ConfigError for the first option, by vLLM's name of it, that a Shoal model cannot be served with; and for a depth
    or a block size that does not fit the model. Sets what follows from a Shoal model."""
    from vllm.config import CompilationMode

    c, hf = vllm_config, vllm_config.model_config.hf_config
    _need_ours(hf)
    for name, (bad, allowed) in _refused(c).items():
        if bad:
            raise ConfigError(f"vLLM's {name} with a Shoal model", allowed=allowed)
    if c.compilation_config.mode is None:
        # nothing of the network is compiled, and then vLLM has graphs of decoding steps alone
        c.compilation_config.mode = CompilationMode.NONE
    if hf.depth == PER_REQUEST:
        from shoal.vllm_plugin.depths import NAME, Depths

        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # of the processes that vLLM starts, too
        Depths.shape = hf.shape  # requests are checked in this process
        others = c.model_config.logits_processors or []
        c.model_config.logits_processors = [*(other for other in others if other != NAME), NAME]


def _refused(c: VllmConfig) -> dict[str, tuple[bool, str]]:
    """By vLLM's name of an option: is it one that a Shoal model cannot be served with, and what is allowed."""
    from vllm import envs

    hf, parallel, cache = c.model_config.hf_config, c.parallel_config, c.cache_config
    per_request = hf.depth == PER_REQUEST
    return {
        "pipeline_parallel_size": (
            parallel.pipeline_parallel_size > 1,
            "1: a request leaves at its exit, and the later stages would wait for it",
        ),
        "decode_context_parallel_size": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1,
            "1: blocks are chosen from all of the context",
        ),
        "prefill_context_parallel_size": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "1: blocks are chosen from all of the context",
        ),
        "speculative_config": (
            c.speculative_config is not None,
            "none: drafts of another model are not verified by block; Shoal's own engine drafts with its first exit",
        ),
        "kv_transfer_config": (
            c.kv_transfer_config is not None,
            "none: the summaries of blocks lie beside vLLM's memory and are not transferred with it",
        ),
        "lora_config": (c.lora_config is not None, "none: adapters are not built for these layers"),
        "kv_cache_dtype": (
            cache.cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
            "auto: blocks are scored by keys as they were computed",
        ),
        "cudagraph_mode": (
            per_request and _captures(c),
            "NONE with depth per-request (--enforce-eager): how many rows reach a layer differs from step to step",
        ),
        "VLLM_USE_V2_MODEL_RUNNER": (
            per_request and envs.VLLM_USE_V2_MODEL_RUNNER is True,
            "0 with depth per-request, which it is set to: vLLM's second runner tells nobody who stands in which row",
        ),
        "enable_prefix_caching": (
            per_request and cache.enable_prefix_caching and not getattr(hf, "salted", False),
            "false with depth per-request, or cache_salt in every request and {\"salted\": true} beside the depth:"
            " a shallow request leaves no keys in the deeper layers",
        ),
        "block_size": (
            bool(cache.block_size) and cache.block_size % hf.shape.block != 0,
            f"a multiple of the model's select block ({hf.shape.block})",
        ),
        "tensor_parallel_size": (
            hf.shape.kv_heads % parallel.tensor_parallel_size != 0,
            f"a divisor of the model's K/V heads ({hf.shape.kv_heads})",
        ),
    }  # fmt: skip


def _need_ours(hf: ShoalConfig) -> None:
    """Raises ConfigError for a depth that is no exit, and for a model that was imported: these layers do not have all that open
    models do."""
    shape, _ = hf.shape, hf.layers  # which raises for a depth that is none
    dense = not set(shape.attn_pattern) <= set("HL") or not shape.image_size
    if other := shape.of_open_models or (("attn_pattern",) if dense else ()):
        do = "serve it with `engine: vllm` of a serve config, or give vLLM what `shoal export` writes"
        raise ConfigError("an imported model in vLLM", got=f"{other[0]} of an open model", do=do)


def _captures(vllm_config: VllmConfig) -> bool:
    """Is vLLM to make graphs, as it does where nothing is said?"""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or vllm_config.model_config.enforce_eager:
        return False
    return vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
