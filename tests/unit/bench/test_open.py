"""`shoal bench open`: every part once, on few updates, where what must hold of any model holds of these."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shoal import presets
from shoal.bench import open_forms, open_parts
from shoal.bench.open import PARTS, open_bench
from shoal.bench.open_parts import bits
from shoal.errors import DataError
from shoal.model.net import Net
from shoal.train import exits
from tests.corpus import write_corpus


def measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, parts: str
) -> dict[str, Any]:
    """What `parts` of the benchmark find, of each by its name."""
    patch.setattr(open_parts, "MEASURED", 4)
    patch.setattr(open_parts, "BATCH_TOKENS", 512)  # a row of the longest
    for name, small in {"PROMPTS": 40, "BIASES": 2, "BATCH_TOKENS": 512, "BATCH": 2, "TOKENS": 8}.items():
        patch.setattr(f"shoal.bench.open.{name}", small)
    data = write_corpus(tmp_path / "data", presets.get("test"))
    how: dict[str, Any] = {"seeds": 1, "steps": 4, "python": "false", "keep": tmp_path / "keep"}
    open_bench(Console(file=sys.stderr), data=data, parts=parts, **how)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (found,) = told["found"]
    assert told["bench"] == "open" and list(found) == list(parts)
    return found


@pytest.mark.drill
def test_a_model_goes_out_and_comes_in_again_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that need no exits."""
    found = measured(tmp_path, capsys, monkeypatch, "AB")
    assert found["A"]["bits"]["full"] > 0
    assert found["B"] == {"logits apart": pytest.approx(0, abs=1e-5), "tensors the same": 1, "engine is naive": 1}


@pytest.mark.drill
@pytest.mark.timeout(1200)  # nine parts, on what may be a busy machine
def test_every_part_runs_and_what_is_exact_is_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(tmp_path, capsys, monkeypatch, PARTS)
    assert found["G"] == {}, "without transformers there is nothing to compare with"
    assert found["B"] == {"logits apart": pytest.approx(0, abs=1e-5), "tensors the same": 1, "engine is naive": 1}
    assert found["C"]["full depth the same"] == found["C"]["sha256 the same"] == 1
    assert found["C"]["bits"]["full"] == pytest.approx(found["A"]["bits"]["full"], rel=1e-6)
    same = [each[f"batch {batch}: same tokens"] for each in found["F"].values() for batch in (1, 2)]
    assert same == [1] * 6
    assert found["H"]["up to the dense length: largest difference"] == 0
    assert found["H"]["layers within the tolerance"] >= 1
    assert set(found["C"]["bits by form"]) == set(open_forms.FORMS)
    assert {"adapted", "joint"} == set(found["E"]) and found["I"]["same token"] > 0.5


@pytest.mark.drill
def test_forms_of_an_exit_begin_as_what_they_are_called_and_learn(tmp_path: Path) -> None:
    texts = open_parts.Texts(write_corpus(tmp_path / "data", presets.get("test")))
    config = open_parts.shape(len(texts.tokenizer))
    net = Net(config).init_(1).requires_grad_(False)
    for name, weight in net.named_parameters():  # else a random net adds nearly nothing to what it reads
        weight.mul_(4.0 if name.endswith(("out.weight", "down.weight")) else 1.0)
    begun = {form: open_forms.Exits(net, form) for form in open_forms.FORMS}
    found = open_forms.bits_of(net, begun, texts)
    assert found["norm"] == {e: pytest.approx(v) for e, v in bits(open_parts.lens(net), texts).items() if e != "full"}
    assert found["last"] == {
        e: pytest.approx(v) for e, v in bits(exits.added(net, exits.with_exits(config)), texts).items() if e != "full"
    }
    tokens = texts.rows(most=2)[:, :-1]
    states, full = open_forms._states(net, tokens), config.layers
    for e, said in begun["layer"](net, states).items():
        last = net(tokens, skip=range(e, full - 1))[full]  # these layers, and the last one
        torch.testing.assert_close(said, net.head(last, full), rtol=0, atol=1e-4)
    for e, said in begun["before"](net, states).items():
        block = open_forms.block_of(net, e - 1)
        states_ = states[e] + block.mlp(block.mlp_norm(states[e]))
        torch.testing.assert_close(said, net.head(states_, full), rtol=0, atol=1e-4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    after = open_forms.learned(net, texts, seed=0, steps=6)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    for form, each in after.items():
        theirs = net.head(states[full], full).log_softmax(-1)
        with torch.no_grad():
            apart = [
                sum(
                    float((theirs.exp() * (theirs - said.log_softmax(-1))).sum())
                    for said in forms(net, states).values()
                )
                for forms in (begun[form], each)
            ]
        assert apart[1] < apart[0], form


def test_texts_are_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards"):
        open_parts.Texts(tmp_path)
    texts = open_parts.Texts(write_corpus(tmp_path / "data", presets.get("test")))
    batch = texts.batch(0, 0, 256)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1]) and batch.tokens.shape == (8, 256)
    assert not torch.equal(texts.batch(0, 1, 256).tokens, batch.tokens)
    assert torch.equal(texts.batch(0, 0, 256).tokens, batch.tokens)
    for held in texts.prompts(0, 4):
        assert held.row.answer.index(True) >= 8 and sum(held.row.answer) == 64
