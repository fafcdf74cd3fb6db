"""vLLM's own model of each family loads our export of one, and says the same tokens, at full depth and at an exit."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal import Model
from shoal.inputs.chat import Encoded
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits
from tests.vllm.test_same_tokens import assert_same, ours, theirs

SHAPE = {
    "vocab_size": 258, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # what is each one's own, of heads of 32, the least that vLLM has on a CPU
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_says_of_an_export_what_we_say(family: str, llama: Path, tmp_path: Path, vllm: Callable[..., Any]) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
    torch.manual_seed(len(family))
    source = getattr(transformers, f"{family}ForCausalLM")(config)
    for weight in source.parameters():
        weight.data.normal_(1.0 if weight.dim() < 2 else 0.0, 0.12)
    source.tie_weights()
    source.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "base")
    base = Model.load(tmp_path / "base")
    net, more = exits.added(base.net, exits.with_exits(base.config)), {"source": base.source, "name": base.name}
    model = Model(net.config, net, base.tokenizer, chat_template=base.chat_template, **more)
    model.save(tmp_path / "exits")
    draw = random.Random(0)
    prompts = [Encoded([draw.randrange(2, 258) for _ in range(tokens)]) for tokens in (5, 33, 100, 200)]
    for depth in ("full", "middle"):
        export_model(tmp_path / "exits", tmp_path / depth, depth=depth)
        engine = vllm(tmp_path / depth, block_size=32)
        assert engine.llm_engine.model_config.hf_config.architectures == [f"{family}ForCausalLM"]
        assert_same(ours(model, prompts, [depth] * len(prompts)), theirs(model, engine, prompts), within=5e-4)
