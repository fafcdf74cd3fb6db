"""A depth of an adapted model as a checkpoint of its family: what it says alone is what the exit says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal import Model
from shoal.cli import main
from shoal.errors import CheckpointError, ConfigError
from shoal.open_weights import proof
from shoal.open_weights.convert import export_model, import_model
from shoal.train import exits
from tests.extra import package
from tests.unit.open_weights.conftest import DATA, FAMILIES, READ

Make = Callable[[str], Path]


def adapted(source: Path, out: Path) -> Model:
    """As `shoal adapt` leaves it, with random exits."""
    import_model(source, out, dtype="float32")
    base = Model.load(out)
    config = exits.with_exits(base.config)
    net = exits.added(base.net, config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if exits.is_exits(name, config):
                p.add_(0.2 * torch.empty(p.shape).normal_(generator=draw))
    model = Model(config, net, base.tokenizer, chat_template=base.chat_template, source=base.source)
    model.save(out)
    return model


@pytest.mark.parametrize(
    "family", [name if name in (*READ, "smollm2") else pytest.param(name, marks=pytest.mark.drill) for name in FAMILIES]
)
def test_each_depth_alone_says_what_the_exit_says(family: str, checkpoint: Make, tmp_path: Path) -> None:
    model = adapted(checkpoint(family), tmp_path / "model")
    tokens = load_file(str(DATA / f"{family}.safetensors"))["tokens"][:100]
    told = {}
    for name, layers in model.config.exit_names.items():
        export_model(tmp_path / "model", tmp_path / name, depth=name)
        import_model(tmp_path / name, tmp_path / f"{name}-again")
        again = Model.load(tmp_path / f"{name}-again")
        assert again.config.layers == (layers if name == "full" else max(layers + 1, 4))
        told[name] = model.logits(tokens, name)
        assert (again.logits(tokens) - told[name]).abs().max() < 1e-5
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["num_hidden_layers"] == again.config.layers
    assert (told["shallow"] - told["full"]).abs().max() > 1e-2, "else the depths could not be told apart"


@pytest.mark.parametrize(
    "family", [name if name in READ else pytest.param(name, marks=pytest.mark.drill) for name in FAMILIES]
)
def test_transformers_reads_a_depth_as_a_model(family: str, checkpoint: Make, tmp_path: Path) -> None:
    transformers = package("transformers")
    model = adapted(checkpoint(family), tmp_path / "model")
    tokens = load_file(str(DATA / f"{family}.safetensors"))["tokens"][:100]
    for name in model.config.exit_names:
        export_model(tmp_path / "model", tmp_path / name, depth=name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            told = theirs(tokens[None]).logits[0]
        scale = max(1.0, float(told.abs().max()))  # as in test_live
        assert (told - model.logits(tokens, name)).abs().max() < 1e-5 * scale


def test_what_says_something_else_is_not_written(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(checkpoint("llama"), tmp_path / "model")
    real = proof.hold

    def spoil(source: proof.Told, exported: Path, beside: Path) -> float:
        weights = load_file(str(exported / "model.safetensors"))
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
        save_file(weights, str(exported / "model.safetensors"), metadata={"format": "pt"})
        return real(source, exported, beside)

    monkeypatch.setattr(proof, "hold", spoil)
    words = ["export", "--model", str(tmp_path / "model"), "--to", str(tmp_path / "out"), "--depth", "middle"]
    assert main(words) == 1
    assert "says something else" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--no-check"]) == 0 and (tmp_path / "out").exists()


def test_other_chats_are_noticed(checkpoint: Make, tmp_path: Path) -> None:
    adapted(checkpoint("llama"), tmp_path / "model")
    source = proof.Told(Model.load(tmp_path / "model"), "full")
    assert len(source.chats) == 20 and all(source.chats)
    export_model(tmp_path / "model", tmp_path / "out")
    assert proof.hold(source, tmp_path / "out", tmp_path) < 1e-5
    template = tmp_path / "out" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You help.", "You hinder."))
    with pytest.raises(CheckpointError, match="a chat in other tokens"):
        proof.hold(source, tmp_path / "out", tmp_path)
    assert not list(tmp_path.glob(".proof-*"))


def test_a_depth_that_is_not_there_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    import_model(checkpoint("llama"), tmp_path / "model")
    with pytest.raises(ConfigError, match="depth"):
        export_model(tmp_path / "model", tmp_path / "out", depth="middle")
    assert not (tmp_path / "out").exists()
