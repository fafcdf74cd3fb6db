"""Layers that backward computes again, whole or selectively: the same gradients to the last bit, in the memory that is said."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from shoal import presets, scale
from shoal.config import ModelConfig
from shoal.errors import ConfigError, ResourceError
from shoal.model.linears import fake_quantize_
from shoal.model.net import Net
from shoal.train import lora
from shoal.train.loss import LossModel
from shoal.train.needs import memory_needed, memory_parts
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import pretrain_plan
from shoal.train.recompute import ATTENTION, Recompute, flops_again, policy
from shoal.train.refusal import DOUBT, need_memory_of_gpu
from shoal.train.settings import settings
from tests.trees import tree_leaves

ALONE = Ranks(0, 1, torch.device("cpu"))
WAYS: tuple[Recompute, ...] = (False, True, "selective")
TEST = presets.get("test").model


def model_of(config: ModelConfig, how: Recompute, dtype: torch.dtype = torch.float32) -> LossModel:
    model = LossModel(Net(config).init_(0).to(dtype))
    shard_(model, ALONE, recompute=how)
    return model


def tokens_of(config: ModelConfig, rows: int) -> Tensor:
    return torch.randint(10, config.vocab, (rows, config.train_length), generator=torch.Generator().manual_seed(0))


def documents(tokens: Tensor) -> Tensor:
    """Two of a row."""
    return (torch.arange(tokens.shape[1]) > tokens.shape[1] // 3).long().expand_as(tokens)


def gradients(model: LossModel) -> dict[str, Tensor]:
    c = model.net.config
    tokens = tokens_of(c, 2)
    targets = tokens.roll(-1, 1)
    patches, grid = torch.zeros(0, c.patch_values, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.int64)
    model(tokens, targets, documents(tokens), patches, grid, skip=(1,)).ce.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def changed(**fields: Any) -> ModelConfig:
    values = {name: getattr(TEST, name) for name in TEST.__dataclass_fields__} | fields
    return ModelConfig(**values)


KINDS: dict[str, Callable[[], ModelConfig]] = {
    "hybrid": lambda: TEST,
    "grouped": lambda: presets.get("tiny").model,
    "after": lambda: changed(norm_place="after", qk_norm="all"),
    "scored by variance": lambda: changed(summary="mean_var"),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.drill)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_layer_that_keeps_all_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    want, *others = (gradients(model_of(KINDS[kind](), how, dtype)) for how in WAYS)
    for found in others:
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("what", ["int8", "lora"])
def test_so_they_are_rounded_to_int8_and_of_thin_matrices(what: str) -> None:
    def made(how: Recompute) -> LossModel:
        model = LossModel(Net(TEST).init_(0))
        if what == "int8":
            fake_quantize_(model.net)
        else:
            lora.adapt_(model.net, 4, 0)
        shard_(model, ALONE, recompute=how)
        return model

    want, *others = (gradients(made(how)) for how in WAYS)
    assert len(want) > 8
    for found in others:
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


# ---- how much memory


class Held(TorchDispatchMode):
    """Bytes of all that operators have made and that is still there, whoever holds it; `model`'s weights left out."""

    def __init__(self, model: LossModel) -> None:
        super().__init__()
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.now = self.most = 0
        self.ran: Counter[Any] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        made = operator(*given, **(named or {}))
        self.ran[operator] += 1
        for tensor in tree_leaves(made):
            self._hold(tensor.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if storage.data_ptr() in self._own or (key in self._known and self._known[key]() is storage):
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def measured(config: ModelConfig, how: Recompute, rows: int) -> tuple[int, int, Counter[Any]]:
    """Bytes that are held after the layers' forward pass, and most in backward, gradients of weights left out; and what
    operators ran in backward."""
    gc.collect()
    model = model_of(config, how)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(_forget)
    tokens = tokens_of(config, rows)
    with Held(model) as held:
        states = model.net(tokens)[config.layers]
        after, held.most = held.now, held.now
        held.ran.clear()
        states.sum().backward()
    return after, held.most, held.ran


def _forget(p: Tensor) -> None:
    p.grad = None


@pytest.mark.parametrize("how", [True, *(pytest.param(how, marks=pytest.mark.drill) for how in (False, "selective"))])
@pytest.mark.parametrize(
    ("preset", "rows"),
    [("tiny", 2), *(pytest.param(*rest, marks=pytest.mark.drill) for rest in (("test", 8), ("mini", 1)))],
)
def test_layers_hold_what_is_said(preset: str, rows: int, how: Recompute) -> None:
    base = presets.get(preset)
    plan = pretrain_plan(
        preset, "data", "run", steps=1, accumulate=1, recompute=how, batch_tokens=rows * base.model.train_length
    )
    said = memory_parts(plan, 1)["activations"]
    after, most, _ = measured(base.model, how, rows)
    assert after <= most
    assert most == pytest.approx(said, rel=0.2)


@pytest.mark.drill
def test_selectively_no_wide_product_and_no_attention_runs_again() -> None:
    """Of four products a layer only the one that brings attention back to the width; the last is not asked for."""
    mm, c = torch.ops.aten.mm.default, TEST
    ran = {how: measured(c, how, 2)[2] for how in WAYS}
    assert ran[True][mm] - ran[False][mm] == 3 * c.layers and ran["selective"][mm] - ran[False][mm] == c.layers
    assert any(ran[True][operator] for operator in ATTENTION)
    assert not any(ran["selective"][operator] for operator in ATTENTION)


def test_what_is_kept_is_told_by_what_it_reads_and_gives() -> None:
    """Of LoRA the thin products; of what a GPU runs its three operators."""
    mm, save = torch.ops.aten.mm.default, CheckpointPolicy.MUST_SAVE

    def kept(operator: Any, *shape: int) -> bool:
        return policy(48, None, operator, torch.empty(1), torch.empty(shape)) is save

    assert kept(mm, 48, 144) and kept(mm, 48, 176) and kept(mm, 48, 4), "what reads the residual stream"
    assert not kept(mm, 48, 48) and not kept(mm, 88, 48) and not kept(mm, 4, 144), "what comes back to it, or is thin"
    assert all(kept(getattr(torch.ops.shoal, name).default, 1) for name in ("near", "choose", "chosen"))
    assert not kept(torch.ops.aten.mul.Tensor, 48, 144)


def test_operations_that_are_computed_again() -> None:
    """By hand: of each layer the product of attention's output, where norms come first; with norms after, the FFN's too."""
    c = TEST
    assert flops_again(c, False) == 0
    assert flops_again(c, "selective") == 4 * 2 * 48 * 48
    assert flops_again(changed(norm_place="after"), "selective") == 4 * 2 * 48 * (48 + 88)
    assert flops_again(c, True) > 5 * flops_again(c, "selective")


def test_it_is_set_by_name_and_what_else_is_one_line() -> None:
    assert settings(["recompute=selective"]) == {"recompute": "selective"}
    assert settings(["recompute=true"]) == {"recompute": True} and settings(["recompute=false"]) == {"recompute": False}
    for wrong in ("some", "1", "0", "none"):
        with pytest.raises(ConfigError, match=r"^--set recompute: got .*; allowed: .*selective"):
            settings([f"recompute={wrong}"])
    with pytest.raises(ConfigError, match="recompute: got 'all'"):
        pretrain_plan("test", "data", "run", steps=1, recompute="all")


def test_who_lacks_memory_is_told_the_way_that_costs_least() -> None:
    plain, selective = (scale.plan_at("7b", 64, how) for how in (False, "selective"))  # type: ignore[arg-type]
    memory = int(memory_needed(selective, 64, low=2) * DOUBT) + 1
    with pytest.raises(ResourceError, match="use --set recompute=selective"):
        need_memory_of_gpu(plain, 64, memory)
    need_memory_of_gpu(selective, 64, memory)
    with pytest.raises(ResourceError, match="use --set recompute=true"):
        need_memory_of_gpu(plain, 64, memory - 2**20)
