import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shoal import presets
from shoal.config import TrainConfig
from shoal.model.net import Net
from shoal.train.loss import LossModel
from shoal.train.optim import (
    WholeMuon,
    exit_weights,
    learning_rate,
    left_out,
    make_optimizer,
    one_early_exit,
    orthogonal,
    rotates,
    trained_exits,
)

CONFIG = TrainConfig(learning_rate=2e-3, warmup=0.1, decay=0.4, min_lr_ratio=0.05)


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 0.0),
        (0.05, 1e-3),
        (0.1, 2e-3),
        (0.6, 2e-3),
        (0.7, 2e-3 * (0.05 + 0.95 * 0.75)),
        (0.8, 2e-3 * (0.05 + 0.95 / 2)),
        (1.0, 1e-4),
        (1.7, 1e-4),
    ],
)
def test_warm_up_plateau_decay(progress: float, rate: float) -> None:
    assert learning_rate(progress, CONFIG) == pytest.approx(rate)


def test_the_decay_may_be_half_a_cosine() -> None:
    """With no plateau, the schedule of nanoGPT: 1 (1 + cos(pi t)) / 2 after the warm-up."""
    config = replace(CONFIG, decay_shape="cosine", decay=0.9)
    for t in (0.0, 0.25, 0.5, 0.9, 1.0):
        want = 2e-3 * (0.05 + 0.95 * (1 + math.cos(math.pi * t)) / 2)
        assert learning_rate(0.1 + 0.9 * t, config) == pytest.approx(want)


def test_muon_takes_the_layers_matrices_and_adamw_the_rest() -> None:
    model = LossModel(Net(presets.get("test").model).init_(0))
    muon, adamw = make_optimizer(model, replace(CONFIG, optimizer="muon")).parts
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert matrices == {name for name, p in model.named_parameters() if ".blocks." in name and p.dim() == 2}
    assert matrices | rest == {name for name, p in model.named_parameters() if p.requires_grad} and not matrices & rest


def test_muon_is_one_optimizer_whose_state_comes_back() -> None:
    """One state and one list of groups, as checkpoints and the rate expect; its first update is orthogonal."""
    model = LossModel(Net(presets.get("test").model).init_(0))
    optimizer = make_optimizer(model, replace(CONFIG, optimizer="muon", weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    assert all(optimizer.state[p] for p in model.parameters() if p.requires_grad)
    name = "net.groups.0.blocks.0.attention.out.weight"
    moved = dict(model.named_parameters())[name].detach() - before[name]
    singular = torch.linalg.svdvals(moved)
    assert float(singular.max() / singular.median()) < 2.0, "a random matrix has 2 and more"


def test_early_exits_warm_up_and_the_shares_sum_to_one() -> None:
    config = TrainConfig(exit_weights=(0.15, 0.25, 1.0), exit_warmup=0.2)
    assert exit_weights(0.0, config) == (0.0, 0.0, 1.0)
    assert exit_weights(0.1, config) == pytest.approx((0.075 / 1.2, 0.125 / 1.2, 1 / 1.2))
    assert exit_weights(0.2, config) == exit_weights(0.9, config) == pytest.approx((0.15 / 1.4, 0.25 / 1.4, 1 / 1.4))


def test_an_exit_without_weight_is_not_trained() -> None:
    config = TrainConfig(exit_weights=(0.15, 0.0, 1.0), exit_warmup=0.0)
    assert trained_exits((2, 4, 8), config) == (2, 8)
    assert exit_weights(0.5, config) == pytest.approx((0.15 / 1.15, 1 / 1.15))


def test_norms_gates_and_tables_take_no_decay() -> None:
    model = LossModel(Net(presets.get("test").model).init_(0))
    decayed, free = make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    plain = {names[id(p)] for p in free["params"]}
    assert {"net.embed.weight", "net.row_embed", "net.col_embed"} <= plain
    assert all(
        name.endswith(("norm.weight", ".gate", "_embed", "embed.weight")) or "exit_norms" in name for name in plain
    )
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"]} == {
        "qkv",
        "out",
        "up",
        "down",
        "patch_in",
        "patch_head",
    }
    assert len(plain) + len(decayed["params"]) == len(names), "no parameter is left out"


def test_fixed_gates_are_not_trained() -> None:
    config = replace(presets.get("test").model, mix_mode="fixed")
    groups = make_optimizer(LossModel(Net(config).init_(0)), TrainConfig()).param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    net = Net(config)
    gates = [name for name, p in net.named_parameters() if name.endswith("gate") and p.requires_grad]
    assert gates == [] and len(trained) == sum(p.requires_grad for p in net.parameters())


def test_early_exits_take_turns_and_weigh_what_they_did() -> None:
    shares = (0.1, 0.2, 0.7)
    turns = [one_early_exit(shares, step) for step in range(6)]
    assert turns[:2] == [(0.2, 0.0, 0.7), (0.0, 0.4, 0.7)] and turns[2:4] == turns[:2]
    assert [sum(turn[place] for turn in turns) / 6 for place in range(3)] == pytest.approx(shares)
    assert one_early_exit((0.3, 0.7), 5) == (0.3, 0.7), "one early exit has every turn"
    base, tiny = presets.get("base").model, presets.get("tiny").model
    assert rotates(base, TrainConfig()) and not rotates(tiny, TrainConfig())
    assert not rotates(base, TrainConfig(rotate_exits="off")) and rotates(tiny, TrainConfig(rotate_exits="on"))


def test_layers_are_left_out_by_seed_and_step_alone_and_more_often_the_deeper() -> None:
    model, config = presets.get("tiny").model, TrainConfig(layer_dropout=0.5, seed=3)
    draws = [left_out(model, config, step) for step in range(2000)]
    assert draws == [left_out(model, config, step) for step in range(2000)]
    assert draws != [left_out(model, replace(config, seed=4), step) for step in range(2000)]
    shares = [sum(layer in draw for draw in draws) / 2000 for layer in range(8)]
    for layer, share in enumerate(shares):
        assert share == pytest.approx(0.5 * (2 ** (layer / 7) - 1), abs=0.04)
    assert shares[0] == 0
    assert not any(left_out(model, TrainConfig(), step) for step in range(50))


def test_the_head_is_large_from_8193_tokens_on() -> None:
    model = presets.get("base").model
    found = [rotates(replace(model, vocab=vocab), TrainConfig(rotate_exits="auto")) for vocab in (8192, 8193)]
    assert found == [False, True]


COEFFICIENTS, STEPS = (3.4445, -4.775, 2.0315), 5


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_products_do_to_singular_values_what_the_polynomial_does(
    shape: tuple[int, int], dtype: torch.dtype, error: float
) -> None:
    """U p(p(p(p(p(s))))) V', of singular values that are those of the matrix by its Frobenius norm. One in bfloat16 is
    multiplied in fp32: what is left is its own rounding."""
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    s, (a, b, c) = s / update.norm(), COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    found = orthogonal(update.to(dtype), COEFFICIENTS, STEPS)
    assert found.dtype == dtype and found.shape == shape
    torch.testing.assert_close(found.double(), u @ s.diag() @ v, rtol=0, atol=error)


def test_nothing_to_learn_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 2), COEFFICIENTS, STEPS), torch.zeros(3, 2))


def test_muon_is_torchs_but_for_its_rounding() -> None:
    """Over three updates, with decay; theirs multiplies in bfloat16, which has three digits."""
    draws = torch.Generator().manual_seed(0)
    first, *gradients = (torch.randn(8, 5, generator=draws) for _ in range(4))
    found = []
    for muon in (WholeMuon, lambda some, **more: torch.optim.Muon(some, adjust_lr_fn="match_rms_adamw", **more)):
        weight = torch.nn.Parameter(first.clone())
        optimizer = muon([weight], lr=0.1, weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        found.append((weight.detach(), optimizer.state[weight]["momentum_buffer"]))
    (ours, moments), (theirs, their_moments) = found
    assert torch.equal(moments, their_moments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    assert float((ours - first).abs().max()) > 0.05


def test_muon_of_sharded_matrices_is_muon() -> None:
    """On one rank: the same update, and the same moments after it. One that has no gradient takes no decay either, and has no
    moments."""
    draws = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4, 6), (5, 5), (3, 3))
    # weights, and three gradients
    values = [[torch.randn(shape, generator=draws) for shape in shapes] for _ in range(4)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        found = []
        for of in (lambda one: one.clone(), lambda one: distribute_tensor(one.clone(), mesh, [Shard(0)])):
            weights = [torch.nn.Parameter(of(one)) for one in values[0]]
            muon = WholeMuon(weights, lr=0.1, weight_decay=0.1)
            for gradients in values[1:]:
                for weight, gradient in zip(weights[:3], gradients[:3], strict=True):
                    weight.grad = of(gradient)
                muon.step()
            assert not muon.state.get(weights[3])
            moments = [muon.state[w]["momentum_buffer"] for w in weights[:3]]
            found.append([one.detach() for one in (*weights, *moments)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other.full_tensor(), rtol=1e-6, atol=1e-7)
        assert torch.equal(found[0][3], values[0][3])
        assert not torch.equal(found[0][0], values[0][0])
    finally:
        dist.destroy_process_group()
