"""What a model directory's files say of themselves: shares of weights, licences, what is listed, and settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shoal import Model
from shoal.errors import CheckpointError, ResourceError
from shoal.model import described, files


def tensors(*sizes: int) -> list[tuple[str, torch.Tensor]]:
    """Of so many bytes each."""
    return [(f"t{number}", torch.zeros(size, dtype=torch.int8)) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ((16, 16, 1), [["t0", "t1"], ["t2"]]),  # full to the byte
        ((16, 17), [["t0"], ["t1"]]),
        ((8, 8, 8, 8, 8), [["t0", "t1", "t2", "t3"], ["t4"]]),
        ((33, 31, 1, 1), [["t0"], ["t1", "t2"], ["t3"]]),
        ((16, 16), None),
    ],
)
def test_a_file_of_weights_is_filled_to_its_bytes(
    tmp_path: Path, sizes: tuple[int, ...], held: list[list[str]] | None
) -> None:
    files.save_weights(tmp_path, tensors(*sizes), 32)
    found = files.weight_files(tmp_path)
    assert [None if names is None else sorted(names) for names in found.values()] == ([None] if held is None else held)
    for path in found:
        with safe_open(str(path), "pt") as file:
            assert file.metadata() == {"format": "pt"}, "without it transformers reads none"
    assert files.weight_bytes(tmp_path) == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert {name: len(tensor) for name, tensor in files.load_weights(tmp_path).items()} == {
        name: len(tensor) for name, tensor in tensors(*sizes)
    }


def test_weights_that_the_memory_just_holds_are_read_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save_weights(tmp_path, tensors(1000), 10**6)
    for more in (0, -1):
        memory = SimpleNamespace(available=files.weight_bytes(tmp_path) + more)
        monkeypatch.setattr(files.psutil, "virtual_memory", lambda memory=memory: memory)
        if not more:
            assert files.load_weights(tmp_path).keys() == {"t0"}
            continue
        with pytest.raises(
            ResourceError, match=r"do not fit the memory: got '0\.0 GB'; allowed: 0\.0 GB that are free"
        ):
            files.load_weights(tmp_path)


def test_licences_of_all_directories_are_found_by_their_beginning(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other, one / "licenses"):
        path.mkdir()
    for name in ("licence.txt", "LICENSE", "NOTICE.md", "my-license", "README.md"):
        (one / name).touch()
    for name in ("Copying", "USE_POLICY.md", "POLICY"):
        (other / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in files.licences(one, other)]
    assert found == ["one/LICENSE", "one/NOTICE.md", "one/licence.txt", "other/Copying", "other/USE_POLICY.md"]


def test_what_is_not_listed_is_told_by_its_first_and_its_number(tmp_path: Path) -> None:
    assert files.unlisted(tmp_path) == "no manifest.json, which says what is the model's"
    (tmp_path / "a").touch()
    files.write_manifest(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "files": {"a": {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}}
    }
    assert files.unlisted(tmp_path) == ""
    (tmp_path / "c").touch()
    assert files.unlisted(tmp_path) == "c, which manifest.json does not list"
    (tmp_path / "b").touch()
    assert files.unlisted(tmp_path) == "b and 1 more, which manifest.json does not list"
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()  # which would go with all that lies there
    assert files.unlisted(tmp_path) == "b and 2 more, which manifest.json does not list"


@pytest.mark.parametrize(("more", "noticed"), [(0, True), (-1, False)])
def test_weights_are_hashed_up_to_so_many_bytes_and_everything_else_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, noticed: bool
) -> None:
    """Bytes over all files of weights, and of weights alone."""
    files.save_weights(tmp_path, tensors(20, 20), 32)
    (tmp_path / "config.json").write_text("{}" + 10_000 * " ")
    files.write_manifest(tmp_path)
    monkeypatch.setattr(files, "HASHED", files.weight_bytes(tmp_path) + more)
    files.check(tmp_path)
    (path, *_) = files.weight_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    if noticed:
        with pytest.raises(CheckpointError, match="another sha256"):
            files.check(tmp_path)
    else:
        files.check(tmp_path)
    (tmp_path / "config.json").write_text("[]" + 10_000 * " ")
    with pytest.raises(CheckpointError, match="another sha256"):
        files.check(tmp_path)


def told(directory: Path, source: dict[str, Any]) -> Path:
    (directory / "source.json").write_text(json.dumps(source))
    return directory


@pytest.mark.parametrize(
    ("says", "drawn"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2}, {"temperature": 0.6, "top_k": 20}),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0}),
        ({"repetition_penalty": 1.1, "do_sample": True}, {"repetition_penalty": 1.1}),
        ({"min_p": 0}, {"min_p": 0}),
    ],
)
def test_a_source_says_how_an_answer_is_drawn(tmp_path: Path, says: dict[str, Any], drawn: dict[str, float]) -> None:
    assert described.sampling(tmp_path) == {}, "of a model of our own"
    assert described.sampling(told(tmp_path, {"generation_config": None})) == {}
    assert described.sampling(told(tmp_path, {"generation_config": says})) == drawn


BOUNDS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_source_may_say_what_a_request_may_have_and_no_more(name: str) -> None:
    low, high = BOUNDS[name]
    step = 1 if name == "top_k" else 1e-4
    for value in BOUNDS[name]:
        assert described.drawn({name: value, "other": -7}, "x") == {name: value}
    whole = "a whole number from " if name == "top_k" else ""
    for value in (low - step, high + step):
        with pytest.raises(CheckpointError, match=rf"x: generation_config\.{name}: got .*; allowed: {whole}{low} to "):
            described.drawn({name: value}, "x")
    for value in (math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(CheckpointError, match="allowed: a number"):
            described.drawn({name: value}, "x")
    for value in (sys.float_info.max, 0.5):
        if value < 1 and name != "top_k":
            assert described.drawn({name: value}, "x") == {name: value}
            continue
        with pytest.raises(CheckpointError, match=f"allowed: {whole}{low} to "):
            described.drawn({name: value}, "x")


def test_weights_have_one_sha256_in_whatever_order_their_files_are_named(tmp_path: Path) -> None:
    files.save_weights(tmp_path, tensors(20, 20), 32)
    files.write_manifest(tmp_path)
    found = files.weights_sha256(tmp_path)
    for name, key in (("model.safetensors.index.json", "weight_map"), ("manifest.json", "files")):
        told = json.loads((tmp_path / name).read_text())
        told[key] = dict(reversed(told[key].items()))
        (tmp_path / name).write_text(json.dumps(told))
        assert (files.weights_sha256(tmp_path), described.known_weights(tmp_path)) == (found, found[:16])
    assert [int(path.name[10]) for path in files.weight_files(tmp_path)] == [2, 1], "as the index has them"


def test_known_weights_are_the_beginning_of_the_sha256_of_all(tmp_path: Path) -> None:
    assert described.known_weights(tmp_path) == ""
    files.save_weights(tmp_path, tensors(20, 20), 32)
    (tmp_path / "README.md").touch()
    files.write_manifest(tmp_path)
    assert described.known_weights(tmp_path) == files.weights_sha256(tmp_path)[:16] != ""
    listed = {"files": {"README.md": {"bytes": 0, "sha256": "x"}}}
    for other in (listed, {}, {"files": []}, {"files": {"a.safetensors": 1}}):
        (tmp_path / "manifest.json").write_text(json.dumps(other))
        assert described.known_weights(tmp_path) == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "m"
    Model.from_preset("test", seed=1).quantized().save(path)
    return path


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, None),
        ({"version": 2}, "got 'shoal-model version 2'; allowed: shoal-model version 1"),
        ({"format": "other"}, "got 'other version 1'"),
        ({"name": 3}, "lacks a name or a model"),
        ({"model": []}, "lacks a name or a model"),
        ({"int8_scheme": 2}, "int8_scheme: got 2; allowed: 1"),
    ],
)
def test_a_configuration_is_of_our_format_and_rounding(
    saved: Path, tmp_path: Path, more: dict[str, Any], says: str | None
) -> None:
    meta = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**meta, **more}))
    if says is None:
        assert described.read_config(tmp_path) == (meta["name"], Model.load(saved).config)
        return
    with pytest.raises(CheckpointError, match=says):
        described.read_config(tmp_path)


def test_a_scheme_that_is_not_named_is_the_first_and_no_matter_of_fp32(saved: Path, tmp_path: Path) -> None:
    meta = json.loads((saved / "config.json").read_text())
    assert meta.pop("int8_scheme") == 1
    (tmp_path / "config.json").write_text(json.dumps(meta))
    assert described.read_config(tmp_path)[1].quantization == "w8a8"
    meta["model"]["quantization"] = "none"
    (tmp_path / "config.json").write_text(json.dumps({**meta, "int8_scheme": 2}))
    assert described.read_config(tmp_path)[1].quantization == "none"


@pytest.mark.parametrize("more", [0, -1])
def test_a_tokenizer_has_at_most_as_many_tokens_as_the_vocabulary(
    saved: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    model = Model.load(saved)
    read = described.read_config(saved)
    config = dataclasses.replace(read[1], vocab=len(model.tokenizer) + more)
    monkeypatch.setattr(described, "read_config", lambda _: (read[0], config))
    if not more:
        found = described.read(saved)
        assert (found.name, found.config, found.tokenizer.sha256) == (read[0], config, model.tokenizer.sha256)
        assert found.chat_template == (saved / "chat_template.jinja").read_text()
        return
    with pytest.raises(
        CheckpointError, match=rf"tokenizer: got '{config.vocab + 1} tokens'; allowed: at most {config.vocab}"
    ):
        described.read(saved)


@pytest.mark.parametrize(("card", "told"), [("", "# a\n\nA Shoal model.\n"), ("Größe", "Größe")])
def test_a_model_has_a_card_of_its_own_or_one_with_its_name(tmp_path: Path, card: str, told: str) -> None:
    model = Model.from_preset("test", seed=1)
    model.name = "a"
    model.save(tmp_path / "m", card=card)
    assert (tmp_path / "m" / "README.md").read_text("utf-8") == told


def test_int8_weights_are_told_to_other_tools_in_the_form_of_compressed_tensors(saved: Path, tmp_path: Path) -> None:
    """Eight bits of a symmetric whole number, of weights by output row and of activations by token, as they come; the patches'
    products stay as they are. Of weights in fp32 nothing is told."""
    told = json.loads((saved / "config.json").read_text())
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    assert told["quantization_config"] == {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["patch_in", "patch_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear", "Embedding"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
            }
        },
    }  # fmt: skip
    assert (told["model_type"], told["architectures"]) == ("shoal", ["ShoalForCausalLM"])
    Model.from_preset("test").save(tmp_path / "m")
    plain = json.loads((tmp_path / "m" / "config.json").read_text())
    assert told.keys() - plain.keys() == {"quantization_config", "int8_scheme"}
