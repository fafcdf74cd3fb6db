"""What a run leaves is written as it is gathered: what is made of the whole state, of which nobody holds more than a file."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shoal import presets
from shoal.errors import CheckpointError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import checkpoint
from shoal.model.digests import digest
from shoal.model.linears import export_int8
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.train import exits, lora, start
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, adapt_plan, finetune_plan, quantize_plan
from shoal.train.start import Start
from tests.corpus import write_chats

ALONE = Ranks(0, 1, torch.device("cpu"))
FILE = 100_000  # bytes of a file of weights, of 0.44 MB
State = dict[str, Tensor]


def as_trained(plan: FitPlan, begun: Start) -> LossModel:
    """The model of a run, as if it had learned: each number that may change is another."""
    model = LossModel(begun.net, trained_only=plan.frozen)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=draw)
    return model


def whole(state: State, plan: FitPlan) -> State:
    """What is written of the state of a net, made of all of it at once."""
    thin = {name: state.pop(name) for name in list(state) if lora.is_thin(name)}
    for name in [name.removesuffix(".lora_a") for name in thin if name.endswith("a")]:
        state[f"{name}.weight"] = state[f"{name}.weight"] + lora.SCALE * thin[f"{name}.lora_b"] @ thin[f"{name}.lora_a"]
    if plan.quantize:
        net = Net(plan.model)
        net.load_state_dict(state)
        return export_int8(net)
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model = presets.get("test").model
    Model(model, Net(model).init_(0), Tokenizer.bytes_only()).save(folder / "model")
    return folder / "model"


PLANS: dict[str, Callable[..., FitPlan]] = {
    "finetune": finetune_plan,
    "lora": functools.partial(finetune_plan, lora_rank=2),
    "int8": quantize_plan,
    "exits": adapt_plan,
    "exits and lora": functools.partial(adapt_plan, tune="lora"),
    "exits and all": functools.partial(adapt_plan, tune="all"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_model_is_written_a_file_at_a_time(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS[name](str(base), str(write_chats(tmp_path / "chats.jsonl")), str(tmp_path / "run"), steps=1)
    Path(plan.run).mkdir()
    begun = Start.of(plan, ALONE)
    model = as_trained(plan, begun)
    state = {key: value.clone() for key, value in begun.net.state_dict().items()}
    wanted, size = whole(dict(state), plan), sum(value.nbytes for value in state.values())
    real, held, most = start.whole_tensors, list[Any](), [0]

    def counted(*given: Any) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in real(*given):
            mine = tensor.clone()
            held.append((weakref.ref(mine), mine.nbytes))
            most[0] = max(most[0], sum(bytes_ for ref, bytes_ in held if ref() is not None))
            yield key, mine
            del mine

    monkeypatch.setattr(start, "whole_tensors", counted)
    monkeypatch.setattr(checkpoint, "save", functools.partial(checkpoint.save, shard_bytes=FILE))
    after = begun.export(plan, model, ALONE)
    files = sorted(Path(plan.model_dir).glob("*.safetensors"))
    found = {key: value for file in files for key, value in load_file(file).items()}
    largest = max(value.nbytes for value in state.values())
    assert len(files) > 1 and most[0] < FILE + 3 * largest < size
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)
    backbone = {key: value for key, value in wanted.items() if not exits.is_exits(key, plan.model)}
    assert after == (digest(backbone) if plan.adapts else "")
    assert Path(plan.run, lora.FILE).exists() == (plan.train.lora_rank > 0)


def test_a_backbone_that_was_changed_is_not_written(base: Path, tmp_path: Path) -> None:
    plan = adapt_plan(str(base), str(write_chats(tmp_path / "chats.jsonl")), str(tmp_path / "run"), steps=1)
    begun = Start.of(plan, ALONE)
    with torch.no_grad():
        begun.net.embed.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="training changed the backbone"):
        begun.export(plan, LossModel(begun.net, trained_only=True), ALONE)
    assert not Path(plan.model_dir).exists()
