"""Every family against what transformers said of the same weights (tests/data/open/make.py), and there and back."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import Engine, Model, Request, Sampling
from shoal.open_weights import families
from shoal.open_weights.convert import export_model, import_model
from tests.unit.open_weights.conftest import DATA, FAMILIES, READ, edit

PROMPT = 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
Make = Callable[[str], Path]


def imported(source: Path, out: Path, **options: str) -> Model:
    import_model(source, out, **options)  # type: ignore[arg-type]
    return Model.load(out, verify=True)


@pytest.mark.parametrize(
    "family", [name if name in READ else pytest.param(name, marks=pytest.mark.drill) for name in FAMILIES]
)
def test_logits_and_greedy_tokens_are_those_of_transformers(family: str, checkpoint: Make, tmp_path: Path) -> None:
    model = imported(checkpoint(family), tmp_path / "model", dtype="float32")
    told = load_file(str(DATA / f"{family}.safetensors"))
    logits = model.logits(told["tokens"])[:, ::8]
    exact = Model(model.config, copy.deepcopy(model.net).double(), model.tokenizer).logits(told["tokens"])[:, ::8]
    # in float64, since each CPU adds up float32 in another order; what that costs goes with the size of the numbers
    assert (exact - told["logits"]).abs().max() < 1e-5
    assert (exact - logits).abs().max() < 1e-5 * exact.abs().max()
    prompt, answer = told["tokens"][:PROMPT].tolist(), told["answer"].tolist()
    assert model.generate_naive(prompt, len(answer), ignore_eos=True) == answer
    sampling = Sampling(max_tokens=len(answer), temperature=0, ignore_eos=True)
    engine = Engine(model, units=600, max_batch_tokens=48)
    for _ in range(2):  # once more out of the prefix cache
        both = engine.generate([Request(prompt, sampling), Request(told["tokens"][:70].tolist(), sampling)])
        assert both[0].tokens == answer
    assert both[1].finished is not None and both[1].finished.cached_tokens >= 64
    assert both[0].depth == model.config.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_equal_to_the_bit(family: str, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint(family)
    made = import_model(source, tmp_path / "model", shard_bytes=8192)
    assert made.dtype == "bfloat16" and Model.load(tmp_path / "model").net.dtype == torch.bfloat16
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    count = export_model(tmp_path / "model", tmp_path / "back", shard_bytes=8192)
    before, after = load_file(str(source / "model.safetensors")), {}
    for path in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(str(path))
    assert before.keys() == after.keys() and count == len(before) == made.tensors
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        was, now = (json.loads((folder / name).read_text()) for folder in (source, tmp_path / "back"))
        now.pop("torch_dtype", None)
        assert now == was, name
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_source_in_any_of_the_three_dtypes_keeps_it(dtype: torch.dtype, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("llama")
    before = {name: tensor.to(dtype) for name, tensor in load_file(str(source / "model.safetensors")).items()}
    save_file(before, str(source / "model.safetensors"))
    assert f"torch.{import_model(source, tmp_path / 'model').dtype}" == str(dtype)
    export_model(tmp_path / "model", tmp_path / "back")
    after = load_file(str(tmp_path / "back" / "model.safetensors"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype and torch.equal(after[name], tensor), name


def test_what_a_config_json_leaves_out_is_its_familys(checkpoint: Make, tmp_path: Path) -> None:
    """As the classes of transformers say: SmolLM3 is tied and Mistral has a window, unless null takes it away."""
    source = checkpoint("smollm3")
    edit(source / "config.json", tie_word_embeddings=None)
    assert import_model(source, tmp_path / "model").config.tied

    def kinds(family: str, **changes: object) -> str:
        told = {**json.loads((DATA / family / "config.json").read_text()), "max_position_embeddings": 8192}
        told = {key: value for key, value in (told | changes).items() if value is not ...}
        return families.shape_of(told, (), tied=True).attn_pattern

    assert kinds("mistral", layer_types=..., sliding_window=...) == "L"
    assert kinds("mistral", layer_types=..., sliding_window=None) == "D"
    assert kinds("qwen2", layer_types=..., use_sliding_window=True, sliding_window=None, max_window_layers=0) == "D"

    def heads(family: str, **changes: object) -> tuple[int, int]:
        wide = {"hidden_size": 1024, "num_attention_heads": 32, "sliding_window": None, "layer_types": None}
        told = {**json.loads((DATA / family / "config.json").read_text()), **wide, "head_dim": ..., **changes}
        told = {key: value for key, value in told.items() if value is not ...}
        made = families.shape_of(told, (), tied=True)
        return made.kv_heads, made.head_dim

    none: dict[str, object] = {"num_key_value_heads": ...}
    assert [heads(family, **none) for family in ("mistral", "qwen2", "qwen3", "smollm3", "llama")] == [
        (8, 32), (32, 32), (32, 128), (4, 32), (32, 32),
    ]  # fmt: skip
    assert heads("smollm3", num_key_value_heads=None) == (32, 32), "null is as many as of queries"


def test_an_export_of_the_longer_of_longropes_tables_is_held_against_the_same(checkpoint: Make, tmp_path: Path) -> None:
    """It was read again with the shorter one, and said something else."""
    source = checkpoint("phi3-longrope")
    assert import_model(source, tmp_path / "model", context=256).config.context == 256
    export_model(tmp_path / "model", tmp_path / "back")
    one, two = (load_file(str(folder / "model.safetensors")) for folder in (source, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(two[name], one[name]) for name in one)


def test_the_fixtures_can_tell_settings_apart(checkpoint: Make, tmp_path: Path) -> None:
    """Else the tests above could pass with a window, a scaling or a layer without positions left out."""
    for family, changes in (
        ("mistral", {"sliding_window": None, "layer_types": None}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("smollm3", {"no_rope_layers": [1] * 5}),
        ("phi3", {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen3", {"rms_norm_eps": 0.01}),
        ("qwen3-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen3-yarn", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
        ("phi3-longrope", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ):
        shutil.rmtree(tmp_path / f"{family}-source", ignore_errors=True)
        source = checkpoint(family)
        config = source / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        told = load_file(str(DATA / f"{family}.safetensors"))
        logits = imported(source, tmp_path / f"{family}-model", dtype="float32").logits(told["tokens"])
        assert (logits[:, ::8] - told["logits"]).abs().max() > 1e-2, family


# nothing else of `make test` asks for INT8 weights beside keys and values in int8, whose loops take 14 s to compile
@pytest.mark.parametrize("kv", ["auto", pytest.param("int8", marks=pytest.mark.drill)])
def test_an_imported_model_is_rounded_guided_and_kept_in_int8(kv: str, checkpoint: Make, tmp_path: Path) -> None:
    from shoal.engine.events import Guide

    imported(checkpoint("qwen2"), tmp_path / "model").quantized().save(tmp_path / "int8")
    model = Model.load(tmp_path / "int8")
    assert (
        model.config.quantization == "w8a8"
        and model.source is not None
        and model.source["family"] == "Qwen2ForCausalLM"
    )
    engine = Engine(model, kv_cache_dtype=kv, speculative=3, units=300)
    guided = Sampling(max_tokens=30, temperature=0, guided=Guide("choice", ["fish", "whale"]))
    answers = engine.generate([Request("The depth", guided), Request("The depth", Sampling(max_tokens=30, seed=1))])
    assert answers[0].text in ("fish", "whale") and answers[0].finish_reason == "stop"
    assert engine.stats().get("spec_decode_num_draft_tokens_total", 0) == 0, "no early exit drafts"
