"""Thin matrices beside frozen ones: what is written in the end is what was trained."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from shoal import presets
from shoal.model.cost import parameters
from shoal.model.linears import Linear
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.train.lora import LoraLinear, adapt_, count, is_thin, merged, save
from shoal.train.needs import disk_needed, memory_needed
from shoal.train.plan import finetune_plan


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is written of the `state` of a net of `adapt_`."""
    return {name: merged(name, tensor, state) for name, tensor in state.items() if not is_thin(name)}


def test_the_merged_model_is_the_trained_one_at_every_exit() -> None:
    config = presets.get("test").model
    base = Net(config).init_(0).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = Net(config).double()
    adapted.load_state_dict(before)
    adapt_(adapted, rank=3, seed=1)
    adapted.double()
    draw = torch.Generator().manual_seed(2)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3, generator=draw)
    assert trained and all(name.endswith(("lora_a", "lora_b")) for name in trained)
    written = Net(config).double()
    written.load_state_dict(whole(adapted.state_dict()))
    tokens = torch.randint(9, 260, (2, 20), generator=draw)
    with torch.no_grad():
        ours, theirs, old = (net(tokens, exits=config.exits) for net in (written, adapted, base))
        for e in config.exits:
            got, wanted = written.head(ours[e], e), adapted.head(theirs[e], e)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
            assert (wanted - base.head(old[e], e)).abs().max() > 0.01, "the thin matrices say something"


def test_memory_and_disk_are_those_of_thin_matrices_beside_frozen_weights(tmp_path: Path) -> None:
    """Weights once, and for what is trained a gradient and two moments; the estimate had them for every weight."""
    model = Model.from_preset("test")
    model.save(tmp_path / "base")
    adapt_(model.net, rank=3, seed=0)
    thin = sum(p.numel() for p in model.net.parameters() if p.requires_grad)
    assert count(model.config, 3) == thin
    total = parameters(model.config).total
    whole, lora = (
        finetune_plan(str(tmp_path / "base"), "c.jsonl", str(tmp_path / "run"), **more)
        for more in ({}, {"lora_rank": 3})
    )
    assert memory_needed(whole, 1) - memory_needed(lora, 1) == 12 * (total - thin) - 4 * thin
    assert disk_needed(whole) - disk_needed(lora) == 4 * (whole.keep + 1) * (2 * total - 3 * thin)


def test_what_is_added_is_twice_the_product_of_the_thin_matrices() -> None:
    """alpha / r = 2, whatever the rank; A begins with the scale of a matrix of that input width."""
    draw = torch.Generator().manual_seed(3)
    base = Linear(400, 7)
    with torch.no_grad():
        base.weight.normal_(generator=draw)
    for rank in (1, 50):
        thin = LoraLinear(base, rank, draw)
        assert abs(float(thin.lora_a.detach().std()) * math.sqrt(400) - 1) < 5 / math.sqrt(2 * thin.lora_a.numel())
        with torch.no_grad():
            thin.lora_b.normal_(generator=draw)
            x = torch.randn(3, 400, generator=draw)
            weight = base.weight.double() + 2.0 * thin.lora_b.double() @ thin.lora_a.double()
            torch.testing.assert_close(thin.product(x).double(), x.double() @ weight.T, rtol=0, atol=1e-3)
            state = whole({"x.weight": base.weight, "x.lora_a": thin.lora_a, "x.lora_b": thin.lora_b})
            torch.testing.assert_close(state["x.weight"].double(), weight, rtol=0, atol=1e-4)
        assert state.keys() == {"x.weight"}


def test_an_adapted_net_begins_as_its_base_and_is_drawn_from_its_seed() -> None:
    config = presets.get("test").model
    base, *nets = (Net(config).init_(0) for _ in range(4))
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        adapt_(net, rank=3, seed=seed)
    first, same, other = (
        torch.cat([p.detach().flatten() for name, p in net.named_parameters() if name.endswith("lora_a")])
        for net in nets
    )
    assert torch.equal(first, same) and not torch.isin(first, other).any()
    tokens = torch.randint(9, 260, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(base(tokens)[4], nets[0](tokens)[4])


def test_what_was_trained_is_written_without_its_base_and_without_its_scale(tmp_path: Path) -> None:
    """As others read it: no tensor but the thin ones, which need not lie in memory as they stand."""
    draw = torch.Generator().manual_seed(0)
    state = {"a.weight": torch.randn(5, 4, generator=draw), "a.lora_a": torch.randn(2, 4, generator=draw),
             "a.lora_b": torch.randn(2, 5, generator=draw).T, "norm": torch.ones(4)}  # fmt: skip
    save(tmp_path, state)
    with safe_open(str(tmp_path / "lora.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"} and sorted(file.keys()) == ["a.lora_a", "a.lora_b"]
        for name in ("a.lora_a", "a.lora_b"):
            assert torch.equal(file.get_tensor(name), state[name])
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_tensor_beside_which_nothing_was_put_is_what_it_was() -> None:
    thin = {"a.lora_a": torch.ones(2, 3), "a.lora_b": torch.ones(4, 2)}
    tensor = torch.zeros(4, 3)
    assert merged("b.weight", tensor, thin) is tensor and merged("a.bias", tensor, thin) is tensor
    assert torch.equal(merged("a.weight", tensor, thin), torch.full((4, 3), 4.0))


def test_only_the_layers_have_thin_matrices_and_they_are_no_matrix_of_their_own() -> None:
    """The embedding and the head stay as they are, and nothing of the base is trained."""
    net = Net(presets.get("test").model).init_(0)
    adapt_(net, rank=3, seed=1)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net.named_parameters() if is_thin(name)}
    assert all(name.startswith("groups.") for name in trained)
    linears = [module for module in net.modules() if isinstance(module, Linear)]
    beside = [module for module in linears if isinstance(module, LoraLinear)]
    assert len(trained) == 2 * len(beside) and {module.matrix(1, torch.float32) for module in beside} == {None}
    assert all(type(module) is not Linear for group in net.groups for module in group.modules())
