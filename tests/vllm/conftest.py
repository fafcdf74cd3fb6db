"""Checkpoints with random weights, of our shape and of Llama's, and vLLM in this process; `make test-vllm` sets it up.

Where vLLM is not installed, nothing in this folder is collected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model
from shoal.config import ModelConfig
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net
from shoal.model.router import Calibration, Router

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
}

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ |= ENVIRONMENT

# Sparse from 16 + 4 * 4 = 32 tokens on; prompts go to 300.
SHAPE = ModelConfig(
    vocab=300, layers=8, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, train_length=256, window=16, block=4, page=16,
    top_k=4, patch=4, image_size=12, max_length=1024,
)  # fmt: skip


@pytest.fixture(scope="session")
def model() -> Model:
    """Weights so large that attention is sharp: another window or another choice of blocks moves every logprob. The
    router sends all to the second exit."""
    net = Net(SHAPE).init_(3)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "attention.qkv" in name:
                weight.mul_(2.0)
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.mul_(3.0)
    router = Router(SHAPE).requires_grad_(False)
    router.quantile.weight.zero_()
    router.quantile.bias.copy_(torch.tensor([1.0, -1.0]))  # nats: the first exit is too bad, the second good enough
    router.calibration = Calibration(thresholds=[(0.01, 0.0)])
    return Model(SHAPE, net, Tokenizer.bytes_only(), name="fish", router=router)


@pytest.fixture(scope="session")
def directory(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "fish"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Llama's shape as Hugging Face lays it out, with a byte-level tokenizer."""
    return write_llama(tmp_path_factory.mktemp("models") / "llama", layers=2)


def write_llama(path: Path, *, layers: int) -> Path:
    """One of so many `layers`, in the folder `path`, which is made."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    path.mkdir()
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [],
        trainers.BpeTrainer(
            vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.save(str(path / "tokenizer.json"))
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    width, heads, kv_heads, dim, inner, vocab = 128, 4, 2, 32, 256, 258
    shape: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "intermediate_size": inner,
        "vocab_size": vocab, "max_position_embeddings": 512, "tie_word_embeddings": True, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(shape))
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes).normal_(0, 3 / sizes[-1] ** 0.5, generator=generator)

    weights = {"model.embed_tokens.weight": random(vocab, width), "model.norm.weight": torch.ones(width)}
    for layer in range(layers):
        lead = f"model.layers.{layer}."
        for name, out in {"q": heads, "k": kv_heads, "v": kv_heads}.items():
            weights[f"{lead}self_attn.{name}_proj.weight"] = random(out * dim, width)
        weights[f"{lead}self_attn.o_proj.weight"] = random(width, heads * dim)
        weights[f"{lead}mlp.gate_proj.weight"] = random(inner, width)
        weights[f"{lead}mlp.up_proj.weight"] = random(inner, width)
        weights[f"{lead}mlp.down_proj.weight"] = random(width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{lead}{norm}.weight"] = torch.ones(width)
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a vLLM engine in this process, in fp32 and with pages of 16 tokens; it is gone after the test."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    made: list[Any] = []

    def make(directory: Path, **options: Any) -> Any:
        from vllm import LLM

        given = {"dtype": "float32", "enforce_eager": True, "block_size": 16, "max_num_seqs": 16, **options}
        # vLLM looks through every module that is loaded for kernels, and stumbles over llvmlite's `lib`, which has every
        # attribute that it is asked for. Its own processes load numba later; here our engine has loaded it.
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith("llvmlite")}
        try:
            made.append(LLM(model=str(directory), **given))
        finally:
            sys.modules.update(hidden)
        return made[-1]

    yield make
    from vllm.distributed import cleanup_dist_env_and_memory

    for engine in made:
        engine.llm_engine.engine_core.shutdown()
    made.clear()
    cleanup_dist_env_and_memory()
