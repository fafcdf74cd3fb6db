"""Property 26 on a model trained here: training's rounding is the kernel's, and INT8 costs little."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal import Model, presets
from shoal.data.batches import heldout_batches
from shoal.data.shards import TOKENIZER
from shoal.errors import CheckpointError, ResourceError
from shoal.evaluate.int8_cost import AGREEMENT, int8_cost, said, too_far
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import files, int8
from shoal.model.checkpoint import read
from shoal.model.linears import fake_quantize_
from shoal.model.net import Net
from shoal.train import log
from shoal.train.loop import FitResult, fit
from shoal.train.plan import FitPlan, pretrain_plan, quantize_plan
from tests.corpus import write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"))


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    plan = pretrain_plan("test", str(data), str(data.parent / "pretrain"), steps=60, eval_every=0, accumulate=1)
    return Path(fit(plan).out)


@pytest.fixture(scope="module")
def drawn(data: Path) -> dict[str, Path]:
    """A model as it was drawn, and the same in INT8: enough where nothing is said of what rounding costs."""
    config = presets.get("test").model
    model = Model(config, Net(config).init_(3), Tokenizer.load(data / TOKENIZER))
    made = {"fp32": model, "int8": model.quantized()}
    for name, each in made.items():
        each.save(data.parent / "drawn" / name)
    return {name: data.parent / "drawn" / name for name in made}


@pytest.fixture(scope="module")
def quantized(data: Path, trained: Path) -> FitResult:
    return fit(quantize_plan(str(trained), str(data), str(data.parent / "int8"), steps=20, batch_tokens=768))


@pytest.mark.drill
def test_int8_costs_little_and_training_with_it_no_more_than_rounding_alone(
    data: Path, trained: Path, quantized: FitResult
) -> None:
    rows = int8_cost(Model.load(trained), Model.load(quantized.out), data, rows=16)
    assert [row["modality"] for row in rows] == ["text", "code"]
    for row in rows:
        assert row["int8_rise"] < 0.005 and row["rounded_rise"] < 0.02
        assert row["int8"] <= row["rounded"] * 1.002
        assert row["int8_agreement"] >= AGREEMENT <= row["rounded_agreement"]
        assert f"{row['int8_rise']:+.2%}" in said(row) and f"same token {row['int8_agreement']:.1%}" in said(row)
    assert too_far(rows) == []
    assert too_far([{**rows[0], "int8_agreement": 0.86}]) == [
        "INT8 says another token than fp32 in 14.0% of the places in text."
    ]
    for name, by_modality in quantized.rounded.items():
        assert name in ("fp32", "post-training") and by_modality.keys() == quantized.bpb.keys()
    assert quantized.rounded["fp32"]["text"]["full"] != quantized.rounded["post-training"]["text"]["full"]


@pytest.mark.drill
def test_without_a_teacher_the_same_training_leads_away_from_the_model(
    data: Path, trained: Path, quantized: FitResult
) -> None:
    """At a rate at which it shows: what the corpus says changes more tokens than rounding does."""

    def agreement(**more: float) -> float:
        out = str(data.parent / f"far-{more['distill']:g}")
        plan = quantize_plan(str(trained), str(data), out, steps=20, batch_tokens=768, learning_rate=1e-3, **more)
        rows = int8_cost(Model.load(trained), Model.load(fit(plan).out), data, rows=16)
        return sum(row["int8_agreement"] for row in rows) / len(rows)

    assert agreement(distill=0.0) < agreement(distill=quantize_plan(str(trained), str(data), "").train.distill)


def test_a_run_that_learnt_from_another_model_is_not_gone_on_with(
    data: Path, drawn: dict[str, Path], tmp_path: Path
) -> None:
    model = Model.load(drawn["fp32"])
    model.save(tmp_path / "model")

    def plan(steps: int) -> FitPlan:
        return quantize_plan(str(tmp_path / "model"), str(data), str(tmp_path / "int8"), steps=steps, batch_tokens=768)

    fit(plan(1))
    model.net.groups[0].blocks[0].attention_norm.weight.data.mul_(1.01)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"is of another configuration: got .base\.weights_sha256: "):
        fit(plan(2))


def test_what_training_rounds_is_what_is_served_to_the_bit(drawn: dict[str, Path], data: Path) -> None:
    """The whole network, not one product: norms and attention are the same operators in both."""
    exact = Model.load(drawn["fp32"])
    served = exact.quantized()
    fake_quantize_(exact.net)
    (batch,) = heldout_batches(data, "text", batch_rows=4, limit=4)
    with torch.no_grad():  # not in inference mode, whose compiled norms round otherwise
        last = exact.config.layers
        for net in (exact.net, served.net):
            assert not net.training
        want, got = (net.head(net(batch.tokens, docs=batch.docs)[last], last) for net in (exact.net, served.net))
    assert torch.equal(want, got)


@pytest.mark.drill
def test_a_resumed_quantising_run_ends_as_if_nothing_had_happened(data: Path, trained: Path, tmp_path: Path) -> None:
    """From a checkpoint in which the teacher is not; what it started from is told again."""

    class Interrupted(Exception):
        pass

    def interrupt(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 2:
            raise Interrupted

    def plan(name: str) -> FitPlan:
        more = {"steps": 8, "batch_tokens": 768, "checkpoint_minutes": 0.0, "warmup": 0.3, "decay": 0.5}
        return quantize_plan(str(trained), str(data), str(tmp_path / name), **more)

    calm = fit(plan("calm"))
    with pytest.raises(Interrupted):
        fit(plan("hit"), interrupt)
    resumed = fit(plan("hit"))
    assert (resumed.bpb, resumed.rounded) == (calm.bpb, calm.rounded)
    a, b = (Path(result.out, "model.safetensors").read_bytes() for result in (calm, resumed))
    assert a == b


def test_another_scheme_is_refused_by_name(drawn: dict[str, Path], tmp_path: Path) -> None:
    model = Model.load(drawn["int8"])
    model.save(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    values = json.loads(path.read_text())
    assert values["int8_scheme"] == 1 and values["quantization_config"]["quant_method"] == "compressed-tensors"
    path.write_text(json.dumps(values | {"int8_scheme": 2}))
    with pytest.raises(CheckpointError, match=r"int8_scheme: got 2; allowed: 1; quantise the fp32 model"):
        read(tmp_path / "other")


def test_a_machine_that_fails_the_self_test_refuses_int8_or_falls_back(
    drawn: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "KERNELS", {"float": lambda weight, scale: lambda x: x.new_zeros(len(x), len(weight))})
    monkeypatch.setattr(int8, "trusted", int8.trusted.__wrapped__)
    with pytest.raises(ResourceError, match=r"no INT8 kernel passes.*float: relative error.*--precision auto"):
        Model.load(drawn["int8"])
    told: list[str] = []
    model = Model.load(drawn["int8"], on_fallback=told.append)
    assert len(told) == 1 and "relative error" in told[0] and model.config.quantization == "none"
    ids = model.tokenizer.encode("The shoal turns. The")
    exact = Model.load(drawn["fp32"]).logits(ids)
    assert (model.logits(ids) - exact).abs().mean() < 0.1 * exact.std()


@pytest.mark.drill
def test_a_wide_model_takes_a_quarter_of_the_file_and_never_its_fp32_weights_in_memory(tmp_path: Path) -> None:
    """A third of `base`, with smaller patches, so that what stays fp32 is as small a share as in the whole."""
    config = dataclasses.replace(presets.get("base").model, layers=4, ffn=1536, vocab=8192, patch=8)
    model = Model(config, Net(config).init_(0), Model.from_preset("test").tokenizer)
    model.save(tmp_path / "fp32")
    model.quantized().save(tmp_path / "int8")
    fp32, small = (files.weight_bytes(tmp_path / name) for name in ("fp32", "int8"))
    assert fp32 > 3.6 * small
    exact, peak = (peak_memory(tmp_path / name) for name in ("fp32", "int8"))
    assert 100e6 < peak < 4e9, "torch itself takes 200 MB"
    assert exact - peak > 0.8 * (fp32 - small), "as much as the fp32 weights take"


def peak_memory(directory: Path) -> int:
    """Most bytes that a process had in memory from its start to its first answer from the model in `directory`."""
    args = [sys.executable, "-c", SERVING, str(directory)]
    return int(subprocess.run(args, capture_output=True, text=True, timeout=300, check=True).stdout)


# Run in a process of its own: what it needed at most, in bytes, from its start to its first answer.
SERVING = """
import sys
import torch
torch.set_num_threads(1)
from shoal import Engine, Model, Request, Sampling
engine = Engine(Model.load(sys.argv[1]), units=512)
engine.generate([Request(list(range(20, 36)), Sampling(temperature=0, max_tokens=8, ignore_eos=True))])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # getrusage also counts what the parent had
print(1024 * int(status["VmHWM"].split()[0]))
"""
