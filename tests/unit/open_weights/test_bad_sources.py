"""What cannot be imported is named in one line, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.api.served import ServedModel
from shoal.cli import main
from shoal.errors import CheckpointError, ShoalError
from shoal.open_weights.convert import export_model, import_model
from tests.unit.open_weights.conftest import edit

Make = Callable[[str], Path]
LAYER = "model.layers.1."


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER + "self_attn.query.weight"] = tensors.pop(LAYER + "self_attn.q_proj.weight")


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER + "self_attn.o_proj.bias"] = torch.ones(16)


def one_layer_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {
        name.replace(".1.", ".5."): tensor.clone() for name, tensor in tensors.items() if name.startswith(LAYER)
    }


def broken(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER + "mlp.down_proj.weight"][3, 3] = float("nan")


def cut(tensors: dict[str, torch.Tensor]) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()


def quantised(tensors: dict[str, torch.Tensor]) -> None:
    name = LAYER + "mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            renamed,
            rf"tensor {LAYER}self_attn.q_proj.weight is missing: got '{LAYER}self_attn.query.weight in its place'",
        ),
        (one_more, rf"tensor {LAYER}self_attn.o_proj.bias is not used: allowed: the tensors of 5 layers of Qwen2"),
        (one_layer_more, r"tensor model.layers.5.input_layernorm.weight is not used"),
        (broken, rf"tensor {LAYER}mlp.down_proj.weight is not finite: got '1 numbers'"),
        (cut, rf"tensor {LAYER}mlp.up_proj.weight: got \[23, 16\]; allowed: \[24, 16\] by config.json"),
        (quantised, rf"tensor {LAYER}mlp.up_proj.weight: got 'F8_E4M3'; allowed: F32, F16, BF16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tensor_that_is_wrong_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], says: str, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint("qwen2")
    tensors = load_file(str(source / "model.safetensors"))
    change(tensors)
    save_file(tensors, str(source / "model.safetensors"))
    with pytest.raises(CheckpointError, match=says):
        import_model(source, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [source.name], "nothing is left"


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen2", {"num_hidden_layers": 6}, "tensor model.layers.5.input_layernorm.weight is missing"),
        ("qwen2", {"num_key_value_heads": 4}, r"k_proj.weight: got \[8, 16\]; allowed: \[16, 16\]"),
        ("qwen2", {"vocab_size": 300}, r"tensor model.embed_tokens.weight: got \[288, 16\]; allowed: \[300, 16\]"),
        ("qwen2", {"tie_word_embeddings": False}, "tensor lm_head.weight is missing: got 'tie_word_embeddings false'"),
        ("qwen2", {"hidden_size": None}, "config.json: hidden_size: allowed: a whole number"),
        ("qwen2", {"hidden_act": "gelu"}, "config.json: hidden_act: got 'gelu'; allowed: silu"),
        (
            "qwen2",
            {"architectures": ["Qwen3MoeForCausalLM"]},
            "architecture: got 'Qwen3MoeForCausalLM: a mixture of experts'",
        ),
        ("qwen2", {"architectures": ["Qwen3NextForCausalLM"]}, "linear attention"),
        ("qwen2", {"architectures": ["Gemma2ForCausalLM"]}, "soft-capped scores"),
        ("qwen2", {"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM: norms around each part, and GeGLU"),
        (
            "qwen2",
            {"architectures": ["BertModel"]},
            "architecture: got 'BertModel'; allowed: LlamaForCausalLM, Mistral",
        ),
        (
            "qwen2",
            {"quantization_config": {"quant_method": "awq"}},
            "quantised: give the checkpoint that it was made from",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, "rope_type: got 'ntk'; allowed: default"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "type yarn: got 'no original_max_position_embeddings'",
        ),
        (
            "phi3-longrope",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "type longrope: got '1 rates'; allowed: 2, one for each",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "linear"}}, "rope scaling of type linear: got 'no factor'"),
        ("qwen2", {"layer_types": ["linear_attention"] * 5}, "layer_types: got 'linear_attention'"),
        ("qwen2", {"num_hidden_layers": 3, "layer_types": None}, "model.layers: got 3; allowed: 4 or more"),
        (
            "qwen2",
            {"layer_types": None, "num_hidden_layers": 10**8},
            "num_hidden_layers: got 100000000; allowed: a whole",
        ),
        ("qwen2", {"rope_parameters": 5}, "config.json: rope_parameters: got 5; allowed: a mapping"),
        ("qwen2", {"rms_norm_eps": "x"}, "config.json: rms_norm_eps: got 'x'; allowed: a number above 0"),
        # rates of a billion dims were 16 GB of memory before a tensor's shape was looked at
        ("qwen2", {"hidden_size": 2 * 10**9}, "hidden_size: got '2000000000 for 4 heads'; allowed: 2 to 16384 dims"),
        (
            "qwen2",
            {"num_attention_heads": 2 * 10**9},
            "hidden_size: got '16 for 2000000000 heads'; allowed: 2 to 16384",
        ),
        ("qwen2", {"head_dim": 2 * 10**9}, "head_dim: got 2000000000; allowed: a whole number above 0, at most 16384"),
        ("qwen2", {"head_dim": 0}, "config.json: head_dim: got 0; allowed: a whole number above 0"),
        ("qwen2", {"num_key_value_heads": 0}, "config.json: num_key_value_heads: got 0; allowed: a whole number"),
        ("qwen2", {"architectures": "Qwen2ForCausalLM"}, "architectures: got 'Qwen2ForCausalLM'; allowed: a list of"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types: got 'full_attention'; allowed: a list of texts"),
        (
            "qwen2",
            {"layer_types": [["full_attention"], 1, 1, 1, 1]},
            "layer_types: got .'full_attention'.; allowed: a li",
        ),
        ("mistral", {"sliding_window": "8"}, "config.json: sliding_window: got '8'; allowed: a whole number above 0"),
        ("qwen2", {"max_window_layers": "x"}, "config.json: max_window_layers: got 'x'; allowed: a whole number"),
        ("smollm3", {"no_rope_layer_interval": -1}, "no_rope_layer_interval: got -1; allowed: a whole number above 0"),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": "500"}},
            "rope_parameters.rope_theta: got '500'; allowed: a number",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": -5}},
            "config.json: rope_theta: got -5; allowed: a number above 0",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            "config.json: rope_parameters.factor: got '2'; allowed: a number",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
            "type yarn: got 'math domain error'; allowed: numbers that give a rate for each pair",
        ),
        (
            "phi3-longrope",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": "x", "long_factor": [1.0, 1.0]}},
            "type longrope: got .*; allowed: numbers that give a rate for each pair",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0}},
            "partial_rotary_factor: got 0; allowed: a number above 0",
        ),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 2.0}},
            "partial_rotary_factor: got 2.0; allowed: two dims",
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "got 'rates that are not finite"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": -4.0, "original_max_position_embeddings": 64}},
            "type yarn: got 'rates that are not finite, or not above 0'",
        ),
        ("phi3", {"partial_rotary_factor": 0.1, "rope_parameters": {"rope_theta": 500.0}}, "two dims of 8, or more"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: got '1 numbers'; allowed: 5"),
        ("llama", {"partial_rotary_factor": 0.5}, "LlamaForCausalLM: partial_rotary_factor: got 0.5; allowed: 1"),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
            "rope_parameters: got 'some for each kind of layer'; allowed: the same for all layers",
        ),
    ],
)
def test_a_configuration_that_contradicts_its_tensors_is_named(
    family: str, changes: Mapping[str, Any], says: str, checkpoint: Make, tmp_path: Path
) -> None:
    source = checkpoint(family)
    edit(source / "config.json", **changes)
    if "num_hidden_layers" in changes:
        edit(source / "config.json", layer_types=None)
    with pytest.raises(CheckpointError, match=says):
        import_model(source, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_files_that_are_wrong_are_named(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(source: Path, out: str = "model") -> str:
        code = main(["import", "--from", str(source), "--out", str(tmp_path / out)])
        line = capsys.readouterr().err
        assert code == 1 and line.count("\n") == 1 and not (tmp_path / "model").exists()
        return line

    source = checkpoint("qwen2")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert f"cannot read {weights}: it was cut short" in says(source)
    weights.rename(source / "pytorch_model.bin")
    assert "pytorch_model.bin, which is a pickle and would run code" in says(source)
    weights.write_bytes(whole)
    (source / "chat_template.jinja").unlink()
    assert "has no chat template" in says(source) and "--chat-template" in says(source)
    assert "no config.json" in says(tmp_path)
    assert "nothing" in says(tmp_path / "gone")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "is not a model directory that may be replaced" in says(source, "mine")
    template = tmp_path / "base.jinja"
    template.write_text("{{ messages[-1].content }}")
    options = ["--chat-template", str(template), "--dtype", "float32", "--context", "64", "--json"]
    assert main(["import", "--from", str(source), "--out", str(tmp_path / "model"), *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["context"] == 64 and told["dtype"] == "float32" and told["family"] == "Qwen2ForCausalLM"
    assert "random numbers" in (tmp_path / "model" / "LICENSE").read_text(), "what must travel with the weights"
    assert main(["import", "--from", str(tmp_path / "model"), "--out", str(tmp_path / "again")]) == 1
    assert "a model directory of ours" in capsys.readouterr().err
    assert main(["export", "--model", str(tmp_path / "model"), "--to", str(tmp_path / "mine")]) == 1
    assert "something that is there" in capsys.readouterr().err


def test_a_tensor_in_two_files_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    """Which of the two is meant, nobody says."""
    source = checkpoint("qwen2")
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    save_file({"model.norm.weight": torch.ones(16)}, str(source / "model-2.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in two files"):
        import_model(source, tmp_path / "model")


@pytest.mark.parametrize("value", ["hot", [1], True, float("nan")])
def test_a_generation_config_that_could_not_be_served_is_refused(value: Any, checkpoint: Make, tmp_path: Path) -> None:
    """The import said that it was done, and the service that it cannot be."""
    source = checkpoint("qwen2")
    edit(source / "generation_config.json", temperature=value)
    with pytest.raises(
        CheckpointError, match=r"qwen2-source: generation_config\.temperature: got .*; allowed: a number"
    ):
        import_model(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1}, "temperature: got -1; allowed: 0 to 100"),
        ({"top_p": 1.5}, "top_p: got 1.5; allowed: 0 to 1"),
        ({"top_k": -2}, "top_k: got -2; allowed: a whole number from -1 to 2147483648"),
        ({"top_k": 50.5}, "top_k: got 50.5; allowed: a whole number from -1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0; allowed: 0.001 to 100"),
    ],
)
def test_a_draw_that_no_request_may_have_is_refused(
    values: dict[str, Any], says: str, checkpoint: Make, tmp_path: Path
) -> None:
    """It was imported, and adapted for an hour, and the service refused it then."""
    source = checkpoint("qwen2")
    edit(source / "generation_config.json", **values)
    with pytest.raises(CheckpointError, match=rf"qwen2-source: generation_config\.{says}"):
        import_model(source, tmp_path / "model")
    edit(source / "generation_config.json", temperature=0, top_p=1, top_k=-1, repetition_penalty=1.0)
    import_model(source, tmp_path / "model")
    assert ServedModel.load(tmp_path / "model").sampling["top_k"] == -1


def test_a_pipe_or_other_letters_are_told(checkpoint: Make, tmp_path: Path) -> None:
    """A pipe in place of the weights was waited for, for ever."""
    source = checkpoint("qwen2")
    (source / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(
        CheckpointError, match=r"cannot read .*chat_template\.jinja: got .*0xe9.*; mend it, or give one"
    ):
        import_model(source, tmp_path / "model")
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: got 'no file'"):
        import_model(source, tmp_path / "model")


@pytest.mark.parametrize("template", [[5], [{"name": "default"}], [{"name": "default", "template": 5}]])
def test_templates_that_are_no_texts_are_told(template: Any, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    (source / "chat_template.jinja").unlink()
    edit(source / "tokenizer_config.json", chat_template=template)
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: chat_template: got .*; allowed: texts with names"
    ):
        import_model(source, tmp_path / "model")
    (source / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer_config\.json: got 'maximum recursion"):
        import_model(source, tmp_path / "model")


@pytest.mark.parametrize("value", ["278", [[278]], 278.5, True, {"id": 278}, [278, None, "x"], float("nan")])
def test_ends_that_are_no_tokens_are_refused(value: Any, checkpoint: Make, tmp_path: Path) -> None:
    """One in a text was taken at its word, and ended the export; 278.5 and true were other tokens."""
    source = checkpoint("qwen2")
    for name in ("generation_config.json", "config.json"):
        edit(source / "generation_config.json", eos_token_id=None)
        edit(source / name, eos_token_id=value)
        with pytest.raises(
            CheckpointError, match=r"eos_token_id: got .*; allowed: the number of a token, or a list of"
        ):
            import_model(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_flags_of_biases_that_are_not_there_are_put_right_in_an_export(checkpoint: Make, tmp_path: Path) -> None:
    """Transformers would have made fresh ones, and vLLM refused the checkpoint."""
    source = checkpoint("llama")
    edit(source / "config.json", attention_bias=True, mlp_bias=True)
    assert not import_model(source, tmp_path / "model").config.qkv_bias
    export_model(tmp_path / "model", tmp_path / "back", check=False)
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert told["attention_bias"] is False and told["mlp_bias"] is False


def test_a_json_without_an_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json: got 'maximum recursion depth"):
        import_model(tmp_path, tmp_path / "model")


def test_a_head_that_is_the_table_is_tied_whatever_the_flag_says(checkpoint: Make, tmp_path: Path) -> None:
    """And one that is not, is its own."""
    source = checkpoint("qwen2")
    tensors = load_file(str(source / "model.safetensors"))
    for factor, tied in ((1.0, True), (2.0, False)):
        save_file(
            tensors | {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]},
            str(source / "model.safetensors"),
        )
        assert import_model(source, tmp_path / "model").config.tied == tied


def test_only_what_was_imported_is_exported(tmp_path: Path) -> None:
    from shoal import Model

    Model.from_preset("test").save(tmp_path / "ours")
    with pytest.raises(ShoalError, match=r"cannot be exported: got 'no source\.json'"):
        export_model(tmp_path / "ours", tmp_path / "out")


def test_numbers_that_the_written_dtype_has_not_are_named_and_not_rounded(checkpoint: Make, tmp_path: Path) -> None:
    """Most of a checkpoint may be bf16, and a norm of it fp32; and what fp32 can hold is infinite in fp16."""
    source = checkpoint("qwen2")
    whole = load_file(str(source / "model.safetensors"))
    name = "model.norm.weight"
    for number, dtype, says in (
        (1.5, "source", None),
        (1.0001, "source", "numbers of float32 beyond it'; allowed: those of bfloat16"),
        (1e6, "float16", "numbers of float32 beyond it'; allowed: those of float16"),
        (1.0001, "float32", None),
    ):
        save_file(whole | {name: torch.full_like(whole[name].float(), number)}, str(source / "model.safetensors"))
        if says is None:
            import_model(source, tmp_path / "model", dtype=dtype)
            shutil.rmtree(tmp_path / "model")
            continue
        with pytest.raises(CheckpointError, match=rf"tensor {name}: got '{says}; import it with --dtype float32"):
            import_model(source, tmp_path / "model", dtype=dtype)
        assert not (tmp_path / "model").exists()


def test_a_template_or_a_pattern_that_would_not_end_is_refused_in_a_line(
    checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request of the service would have hung, and the import before them."""

    def says(source: Path, *more: str) -> str:
        code = main(["import", "--from", str(source), "--out", str(tmp_path / "model"), *more])
        line = capsys.readouterr().err
        assert code == 1 and line.count("\n") == 1 and not (tmp_path / "model").exists()
        return line

    source = checkpoint("qwen2")
    for template, expected in (
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
         "{% endfor %}{{ messages[0].content }}", "does not end"),
        ("{{ 'a' * 10 ** 10 }}", "does not end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ 1 }}" * 2**17, "characters, and at most"),
    ):  # fmt: skip
        (source / "chat_template.jinja").write_text(template)
        line = says(source)
        assert "the chat template: got " in line and expected in line and "--chat-template FILE" in line
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    whole = json.loads((source / "tokenizer.json").read_text())
    cutting = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    edit(source / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [cutting]})
    assert "with repeats of what repeats" in says(source)
    growing = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 10}
    edit(
        source / "tokenizer.json",
        pre_tokenizer=whole["pre_tokenizer"],
        normalizer={"type": "Sequence", "normalizers": [growing] * 9},
    )
    assert "a normalizer that makes a text 1e+09 times as long" in says(source)
    edit(source / "tokenizer.json", normalizer=whole["normalizer"])
    assert main(["import", "--from", str(source), "--out", str(tmp_path / "model")]) == 0, "as it came it is taken"


def test_a_template_that_does_not_end_for_one_message_stops_that_request(checkpoint: Make, tmp_path: Path) -> None:
    from shoal.errors import RequestError
    from shoal.inputs.chat import encode_chat
    from shoal.model import described

    source = checkpoint("qwen2")
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'go' %}{{ 'a' * 10 ** 10 }}{% endif %}{{ m.content }}{% endfor %}"
    )
    import_model(source, tmp_path / "model")
    it = described.read(tmp_path / "model")

    def ids(*texts: str, opened: bool = True) -> list[int]:
        roles = ("user", "assistant")
        chat = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
        return encode_chat(chat, it.tokenizer, it.config, template=it.chat_template, add_generation_prompt=opened).ids

    assert it.tokenizer.decode(ids("Hello")) == "Hello"
    for opened in (True, False):
        with pytest.raises(RequestError, match="chat template stopped"):
            ids("Hello", "x", "go", opened=opened)
    assert it.tokenizer.decode(ids("Hello", "x", opened=False)) == "Hellox"
