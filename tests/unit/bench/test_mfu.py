"""`shoal bench train --parts mfu`: its operations are those that torch counts, and a tiny one runs on this CPU."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import mfu
from benchmarks.plain import PlainGPT
from benchmarks.train import train
from shoal import presets
from shoal.errors import UsageError
from shoal.model.gpu import launch
from shoal.model.net import Net
from shoal.train import recompute
from shoal.train.meter import training_flops


def test_operations_of_the_plain_model_are_those_that_torch_counts() -> None:
    """Which counts all pairs of tokens."""
    model = PlainGPT(vocab=50, layers=2, width=16, heads=2, length=24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(torch.randint(50, (1, 24)), torch.randint(50, (1, 24))).backward()
    assert counter.get_total_flops() == 24 * mfu.plain_flops(2, 16, 50, 24, causal=False)
    half = mfu.plain_flops(2, 16, 50, 24, causal=False) - mfu.plain_flops(2, 16, 50, 24)
    assert half == 3 * 2 * 2 * 24 * 16, "of scores and sums, forward and twice backward"


@pytest.mark.parametrize("pattern", ["H", "HL", "D"])
def test_operations_of_ours_are_those_that_torch_counts(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the way that a GPU takes, on fake tensors; of our operators by what each query reads."""
    base = dataclasses.replace(presets.get("test").model, train_length=64, image_size=0, attn_pattern=pattern)
    c, length = base, 64
    monkeypatch.setattr(launch, "ON", {"cpu"})
    monkeypatch.setattr(launch, "able", lambda device: True)

    def near(q: Any, k: Any, v: Any, starts: Any, window: int, **_: Any) -> int:
        return 4 * math.prod(q) * window

    def chosen(q: Any, k: Any, v: Any, numbers: Any, *_: Any, **__: Any) -> int:
        return 4 * math.prod(q) * (numbers[-1] + 1) * c.block

    def scored(q: Any, summaries: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(q) * summaries[1]

    ours = torch.ops.shoal
    counts = {
        ours.near: near, ours.chosen: chosen, ours.choose: scored,
        ours.near_back: lambda q, k, v, starts, out, lse, gradient, to_lse, window, **_: 2 * near(q, k, v, starts, window),
        ours.chosen_back: lambda *given, **_: 2 * chosen(*given),
    }  # fmt: skip
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=counts) as counter:
        net = Net(c)
        hidden = net(torch.zeros(1, length, dtype=torch.long), exits=(c.layers,))[c.layers]
        net.head(hidden, c.layers).sum().backward()
    assert counter.get_total_flops() == length * training_flops(c, heads=1)


@pytest.mark.drill
def test_a_tiny_one_runs_on_this_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = io.StringIO()
    how: dict[str, Any] = {"tokens": 0, "steps": 1, "rounds": 1, "parts": ("mfu",), "lengths": (64,)}
    train(Console(file=said, width=200), preset="test", **how)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["mfu"]
    assert [(row["model"], row["preset"], row["length"], row["mfu"]) for row in rows] == [
        ("ours", "test", 64, None), ("plain", "test", 64, None),
    ]  # fmt: skip
    assert all(row["hfu"] is None and row["computed"] == row["flops"] for row in rows), "nothing was computed again"
    c, _ = mfu.at("test", 64)
    work = training_flops(c), mfu.plain_flops(c.layers, c.width, c.vocab, 64)
    for row, each in zip(rows, work, strict=True):
        assert row["flops"] == pytest.approx(row["tokens_per_s"] * each) and 0 < row["of_rate"] < 1
        assert f"{row['tokens_per_s']:,.0f}" in said.getvalue() and not row["recomputed"]


@pytest.mark.drill
@pytest.mark.parametrize("fits", recompute.WAYS)
def test_what_does_not_fit_is_computed_again_in_backward(fits: recompute.Recompute) -> None:
    """First what is cheap of it, and whole layers where that does not fit either."""
    asked = []

    def prepare(how: recompute.Recompute) -> Any:
        asked.append(how)
        if how != fits:
            raise torch.OutOfMemoryError
        return mfu.Made(lambda: None, tokens=10, flops=20, again=5, parameters=3)

    found = mfu.measured(prepare, 1, torch.device("cpu"))
    assert found["recomputed"] == fits and asked == list(recompute.WAYS[: recompute.WAYS.index(fits) + 1])
    assert found["computed"] == pytest.approx(1.25 * found["flops"])


@pytest.mark.parametrize("how", recompute.WAYS)
def test_operations_computed_again_are_those_of_the_way_that_is_measured(how: recompute.Recompute) -> None:
    """Of a tiny update of either model; `flops_again` is held against torch's counter in its own tests."""
    ours, plain = (make("test", 64, torch.device("cpu"), how) for make in (mfu.ours, mfu.plain))
    c, _ = mfu.at("test", 64)
    assert ours.again == recompute.flops_again(c, how)
    assert plain.again == (how and (plain.flops - 6 * c.vocab * c.width) // 3)
    for made in (ours, plain):
        made.run()


@pytest.mark.drill
def test_what_does_not_fit_is_gone_before_it_is_made_again() -> None:
    """A compiled layer holds itself, and would lie beside the second try until Python looks for such."""
    held = list[Any]()

    def prepare(how: recompute.Recompute) -> Any:
        assert [each() for each in held] == [None] * recompute.WAYS.index(how)
        layer = torch.nn.Linear(2, 2)
        layer.forward = partial(layer.forward)  # type: ignore[method-assign]
        held.append(weakref.ref(layer))

        def run() -> None:
            layer(torch.ones(2))
            raise torch.OutOfMemoryError

        return mfu.Made(run, 10, 2, 0, 3)

    gc.disable()
    try:
        found = mfu.measured(prepare, 1, torch.device("cpu"))
    finally:
        gc.enable()
    assert found == {"parameters": None, "tokens_per_s": None, "flops": None, "computed": None, "recomputed": True}


@pytest.mark.drill
def test_a_model_that_does_not_fit_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(mfu, "ours", prepare)
    _, rows = mfu.mfu(("test",), (24,), torch.device("cpu"), 1)
    assert [(row["model"], row["mfu"], row["of_rate"] is None) for row in rows] == [
        ("ours", None, True), ("plain", None, False),
    ]  # fmt: skip


def test_a_device_has_the_rate_that_is_stated_of_it() -> None:
    """Names as the driver tells them; of a name that is a part of another one, the whole word counts."""
    said = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA GH200 480GB": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA L4": 121e12, "NVIDIA A10": 0.0,
    }  # fmt: skip
    assert {name: mfu.stated(name) for name in said} == said


def test_a_device_that_is_not_there_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: got 'no CUDA device'; run it on a machine with a GPU"):
        mfu.device_of("cuda")
    with pytest.raises(UsageError, match="--device: got 'tpu'; allowed"):
        mfu.device_of("tpu")
