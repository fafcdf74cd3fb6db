"""transformers, where it is installed, beside what we make of the checkpoint that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import Model
from shoal.errors import CheckpointError
from shoal.inputs.chat import encode_chat
from shoal.open_weights import adapter
from shoal.open_weights.convert import export_model, import_model
from shoal.train import lora
from shoal.train.loop import fit
from shoal.train.plan import finetune_plan
from tests.extra import package
from tests.unit.open_weights import taught
from tests.unit.open_weights.conftest import DATA, edit

transformers = package("transformers")
KINDS = {
    "Llama": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "Qwen3": {"head_dim": 24},
    "Olmo2": {},
    "Phi3": {},
    "SmolLM3": {"num_hidden_layers": 9},
}


def made(kind: str, changes: dict[str, Any]) -> Any:
    """A model of other sizes than those in tests/data/open."""
    shape = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "pad_token_id": None,
        "eos_token_id": 2,  # a family's own lies beyond so few tokens, which is refused
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 200}
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**shape, **changes}))
    for p in model.parameters():
        p.data.normal_(1.0 if p.dim() < 2 else 0.0, 0.2)
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("kind", ["Qwen2", "Phi3"])
def test_peft_reads_what_lora_has_learned(kind: str, tmp_path: Path) -> None:
    """The source with the adapter says what the model that was written says."""
    peft = package("peft")
    theirs = made(kind, KINDS[kind])
    theirs.save_pretrained(tmp_path / "source")
    shutil.copytree(DATA / "tokenizer", tmp_path / "source", dirs_exist_ok=True)
    import_model(tmp_path / "source", tmp_path / "model")
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "A fish."}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 8)
    more = {"steps": 5, "lora_rank": 3, "learning_rate": 1e-2, "batch_tokens": 512}
    plan = finetune_plan(str(tmp_path / "model"), str(tmp_path / "chats.jsonl"), str(tmp_path / "run"), **more)
    fit(plan)
    adapter.write(tmp_path / "run" / lora.FILE, tmp_path / "model", tmp_path / "adapter", alpha=3 * lora.SCALE)
    tokens = torch.arange(1, 61)[None] * 7 % 300
    with torch.no_grad():
        before = theirs(tokens).logits
        told = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()(tokens).logits
    scale = max(1.0, float(told.abs().max()))
    assert (Model.load(plan.model_dir).logits(tokens) - told).abs().max() < 1e-5 * scale
    assert (before - told).abs().max() > 1e-2 * scale, "the adapter says something"


def test_flags_that_the_tensors_contradict_are_put_right_in_an_export(tmp_path: Path) -> None:
    """A head of its own where the flag says tied, and biases where it says none: transformers left both out."""
    theirs = made("Llama", {"tie_word_embeddings": False, "attention_bias": True})
    for layer in theirs.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    theirs.save_pretrained(tmp_path / "source")
    shutil.copytree(DATA / "tokenizer", tmp_path / "source", dirs_exist_ok=True)
    edit(tmp_path / "source" / "config.json", tie_word_embeddings=True, attention_bias=False)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "o_proj.bias" not in name}
    save_file(kept, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    import_model(tmp_path / "source", tmp_path / "model")
    tokens = torch.arange(1, 61)[None] * 7 % 300
    with torch.no_grad():
        told = theirs(tokens).logits
    assert (Model.load(tmp_path / "model").logits(tokens) - told).abs().max() < 1e-5 * float(told.abs().max())
    export_model(tmp_path / "model", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, told)
    edit(tmp_path / "model" / "source.json", family="MistralForCausalLM")
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="biases of q, k and v in a MistralForCausalLM"):
        export_model(tmp_path / "model", tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
def test_both_say_the_same_and_transformers_reads_what_is_exported(kind: str, tmp_path: Path) -> None:
    theirs = made(kind, KINDS[kind])
    theirs.save_pretrained(tmp_path / "source")
    shutil.copytree(DATA / "tokenizer", tmp_path / "source", dirs_exist_ok=True)
    import_model(tmp_path / "source", tmp_path / "model")
    ours, tokens = Model.load(tmp_path / "model"), torch.arange(1, 181)[None] * 7 % 300
    with torch.no_grad():
        told = theirs(tokens).logits
    scale = max(1.0, float(told.abs().max()))
    assert (ours.logits(tokens) - told).abs().max() < 1e-5 * scale
    export_model(tmp_path / "model", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, told)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    chat = [{"role": "user", "content": " What is 12 + 3?\n"}, {"role": "assistant", "content": "15"}]
    ids = fast.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encode_chat(chat, ours.tokenizer, ours.config, template=ours.chat_template).ids == list(ids)


@pytest.mark.parametrize("family", taught.FORMATS)
def test_chats_with_tools_are_what_transformers_makes_of_them(family: str) -> None:
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=taught.core_of(family), **taught.TOLD[family]["names"])
    fast.chat_template = taught.jinja(family)
    ours, config = taught.tokenizer(family), taught.served(family).config
    call = {"name": "look", "arguments": {"sea": ["\u6f6e", {"a": None, "b": -1.5e-7}], "\u00e9": ""}}
    chat = [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '[1] "two"\n'},
    ]
    assert ours.calls is not None
    given = ours.calls.for_template(chat) if ours.calls.as_text else chat
    for tools in (taught.TOOLS, None):
        more = {"tools": tools, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
        ids = list(fast.apply_chat_template(given, **more))
        assert encode_chat(chat, ours, config, template=taught.jinja(family), tools=tools).ids == ids
