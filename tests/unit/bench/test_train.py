"""`shoal bench train` at tiny sizes: that what they print was measured, and adds up."""

import io
import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks.plain import PlainGPT
from benchmarks.train import train


def test_rate_and_checkpoints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.train.ROWS", 40)
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
