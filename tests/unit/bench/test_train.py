"""`shoal bench train` and `shoal bench learn` at tiny sizes: that what they print was measured, and adds up."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from shoal.bench.learn import LENGTH, Text, learn
from shoal.bench.plain import PlainGPT
from shoal.bench.train import train
from shoal.errors import DataError


def test_rate_and_checkpoints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.bench.train.ROWS", 40)
    train(Console(file=io.StringIO()), preset="test", tokens=768, steps=1, rounds=1, parts=("rate", "checkpoint"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rate = told["rate"]
    assert rate["ratio"] == rate["ours_tokens_per_s"] / rate["plain_tokens_per_s"]
    assert 0 < rate["ours_utilisation"] < 1 and 0 < rate["plain_utilisation"] < 1
    # fp32 weights and two moments of 0.11 M parameters
    assert 1.2e6 < told["checkpoint"]["bytes"] < 1.6e6
    assert told["checkpoint"]["share"] == told["checkpoint"]["seconds"] / 60


@pytest.mark.drill
def test_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """Three processes, which each import torch."""
    said = io.StringIO()
    train(Console(file=said, width=160), preset="test", tokens=768, steps=1, rounds=1, parts=("workers",))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("1 worker x 2 threads", "2 workers x 1 thread"):
        row = told["workers"][name]
        assert sum(row[key] for key in ("compute", "waiting", "data")) == pytest.approx(1, abs=0.01)
        assert name in said.getvalue()


@pytest.mark.drill
def test_characters_are_learned_by_all_three_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.bench.learn.ROWS", 4)  # of an update
    (tmp_path / "text").write_text("the shoal turns and the tide waits. " * 400)
    learn(Console(file=io.StringIO()), text=tmp_path / "text", steps=30, seeds=1, models=("plain", "dense", "hybrid"))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["characters"] == 15 and told["trained_on"] == 9 * told["measured_on"]
    plain, dense, hybrid = told["rows"]
    assert all(row["mean"] < math.log(15) - 0.5 for row in told["rows"])
    assert dense["shallow"] is None and hybrid["shallow"] > 0
    assert plain["parameters"] == 15 * 128 + 64 * 128 + 4 * (12 * 128**2 + 2 * 128) + 128


def test_the_rest_of_the_text_is_measured_whole_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("".join(chr(97 + i % 26) for i in range(10_000)))
    text = Text(tmp_path / "text")
    rows = [tokens for tokens, _ in text.measured()]
    assert sum(map(torch.numel, rows)) == (1000 - 1) // LENGTH * LENGTH
    tokens, targets = text.batch(seed=0, step=3)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and torch.equal(tokens, text.batch(0, 3)[0])
    assert not torch.equal(tokens, text.batch(1, 3)[0])
    (tmp_path / "short").write_text("abc")
    with pytest.raises(DataError, match="too short"):
        Text(tmp_path / "short")


def test_the_plain_model_is_causal_and_its_loss_is_the_cross_entropy() -> None:
    net = PlainGPT(vocab=11, layers=2, width=16, heads=2, length=8)
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    want = -F.log_softmax(before, -1).gather(-1, tokens[..., None]).mean()
    torch.testing.assert_close(net.loss(tokens, tokens), want)
