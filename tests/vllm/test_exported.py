"""What `shoal export` writes is a checkpoint that vLLM's own Llama loads, at every depth, and says the same tokens of."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model
from shoal.inputs.chat import Encoded
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits
from tests.vllm.conftest import write_llama
from tests.vllm.test_same_tokens import assert_same, ours, theirs

Vllm = Callable[..., Any]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model with early exits of weights of their own."""
    folder = tmp_path_factory.mktemp("adapted")
    import_model(write_llama(folder / "llama", layers=6), folder / "model")
    base = Model.load(folder / "model")
    net, draw = exits.added(base.net, exits.with_exits(base.config)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if exits.is_exits(name, net.config) and weight.dim() > 1:
                weight += torch.empty(weight.shape).normal_(0, weight.std().item() / 4, generator=draw)
    Model(net.config, net, base.tokenizer, name="fish", chat_template=base.chat_template, source=base.source).save(
        folder / "exits"
    )
    return folder / "exits"


@pytest.mark.parametrize("depth", ["shallow", "middle", "full"])
def test_vllm_says_of_an_exported_depth_what_the_exit_says(
    depth: str, adapted: Path, tmp_path: Path, vllm: Vllm
) -> None:
    model, draw = Model.load(adapted), random.Random(0)
    prompts = [Encoded([draw.randrange(2, 258) for _ in range(tokens)]) for tokens in (5, 33, 100, 300)]
    expected = ours(model, prompts, [depth] * len(prompts))
    export_model(adapted, tmp_path / depth, depth=depth)
    engine = vllm(tmp_path / depth, block_size=32)  # of its own attention
    assert engine.llm_engine.model_config.hf_config.architectures == ["LlamaForCausalLM"]
    assert_same(expected, theirs(model, engine, prompts), within=5e-4)  # their order of sums is another
    told = engine.get_tokenizer().apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert told == "<s>[user]Hello[assistant]"
