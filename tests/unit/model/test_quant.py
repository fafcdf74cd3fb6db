"""The quantiser: what INT8 is, and that training rounds exactly so. Its kernels: test_int8.py."""

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from shoal import Model
from shoal.errors import CheckpointError
from shoal.model import linears, quant
from tests.unit.model.rounding import SHAPES, case


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_training_rounds_to_the_bit_as_the_reference(seed, rows, inputs, outputs, spread):
    """The same integers on both sides, and the same product: whole numbers below 2^24 add up exactly in any order."""
    x, weight, scale, exact = case(seed, rows, inputs, outputs, spread)
    layer = linears.Linear(inputs, outputs)
    layer.weight = torch.nn.Parameter(exact)
    layer.fake = True
    assert torch.equal(quant.fake_weight(layer.weight), weight * scale)
    assert torch.equal(layer(x), quant.int8_linear_reference(x, weight, scale))


def test_compiled_training_divides_as_the_reference_does():
    """torch.compile multiplies with the reciprocals of constants on a GPU, and Triton's division is two bits off: so each
    division must reach it as an operator that it leaves alone. Forward and backward, in one graph."""
    torch._dynamo.reset()
    asked = set()

    def seen(graph, _):
        asked.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    x, weight, scale, exact = case(3, 5, 96, 24, 1.0)
    compiled = torch.compile(quant.fake_linear, backend=aot_autograd(fw_compiler=seen), fullgraph=True)
    found = []
    for product in (quant.fake_linear, compiled):
        leaf, w = x.clone().requires_grad_(), exact.clone().requires_grad_()
        out = product(leaf, w)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), (leaf, w))])
    assert all(map(torch.equal, *found)) and torch.equal(found[0][0], quant.int8_linear_reference(x, weight, scale))
    assert "shoal.quotient.default" in asked and not [name for name in asked if "div" in name or "recip" in name]


def test_gradients_are_those_of_the_rounded_product():
    x, weight, scale, exact = case(3, 5, 96, 24, 1.0)
    for turned in (x[None].clone(), x.clone()):
        leaf, w = turned.requires_grad_(), exact.clone().requires_grad_()
        s = quant.token_scale(turned.detach())
        rounded = (quant.token_levels(turned.detach(), s) * s).requires_grad_()
        held = (weight * scale).requires_grad_()
        direction = torch.randn(*turned.shape[:-1], 24)
        (quant.fake_linear(leaf, w) * direction).sum().backward()
        (torch.nn.functional.linear(rounded, held) * direction).sum().backward()
        assert torch.allclose(leaf.grad, rounded.grad, rtol=1e-5, atol=1e-5)
        assert torch.allclose(w.grad, held.grad, rtol=1e-5, atol=1e-4)


def test_no_value_lies_beyond_the_largest_level():
    """Scales follow the largest value, so the straight-through gradient has nothing to cut off."""
    x = torch.cat([torch.randn(50, 33), torch.full((1, 33), -2.0), torch.full((1, 33), 1e-42), torch.zeros(1, 33)])
    x[0, 0] = 1e4
    assert quant.token_levels(x, quant.token_scale(x)).abs().max() == quant.TOP


def test_the_int8_twin_answers_like_the_fake_quantised_model():
    model = Model.from_preset("test", seed=2)
    tokens = torch.randint(9, 265, (1, 40))
    twin = model.quantized()
    exact = model.logits(tokens)
    linears.fake_quantize_(model.net)
    fake = model.logits(tokens)
    assert (fake - twin.logits(tokens)).abs().mean() < 0.02 * exact.std()
    assert (fake - exact).abs().mean() > 1e-4  # fake quantisation is on, and it rounds
    names = {name: t.dtype for name, t in twin.net.state_dict().items()}
    assert names["embed.weight"] == names["groups.0.blocks.0.mlp.up.weight"] == torch.int8
    assert names["patch_in.weight"] == names["exit_norms.4.weight"] == torch.float32


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = Model.from_preset("test")
    model.net.groups[1].blocks[0].mlp.down.weight[3, 3] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"groups\.1\.blocks\.0\.mlp\.down\.weight is not finite: got '1 rows, the first 3'"
    ):
        model.quantized()


def test_outlier_rows_and_zero_rows_keep_the_others_exact():
    weight = torch.randn(8, 16)
    weight[0] *= 1e4
    weight[1] = 0
    levels, scale = quant.quantize_rows(weight)
    assert torch.allclose(levels[2:] * scale[2:], weight[2:], atol=float(scale[2:].max()) * 0.51)
    assert (levels[1] == 0).all() and levels[0].abs().max() == quant.WEIGHT_TOP


def test_a_packed_weight_gives_the_same_product_and_is_never_served_stale(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # one thread needs no copy
    layer = linears.Linear(512, 512)
    torch.nn.init.normal_(layer.weight, std=0.05)
    x = torch.randn(3, 2, 512)
    want = torch.nn.functional.linear(x, layer.weight)
    linears.prepack_(torch.nn.ModuleList([layer]))
    assert layer._packed is not None
    with torch.inference_mode():
        assert torch.allclose(layer(x), want, atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(2.0)
        assert torch.allclose(layer(x), 2 * want, atol=1e-4)
    layer(x).sum().backward()  # with gradients, the weight itself is used
    assert layer.weight.grad is not None


def test_a_weight_made_in_inference_mode_is_packed_as_well():
    """Such a tensor counts no versions, and torch raises where one is asked for."""
    with torch.inference_mode():
        layer = linears.Linear(512, 256)
        torch.nn.init.normal_(layer.weight)
        layer.prepack()
        x = torch.randn(3, 512)
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight), atol=1e-3)


def test_a_weight_put_in_the_place_of_a_packed_one_is_read():
    """A new parameter starts at version 0, as the packed one may have been."""
    layer = linears.Linear(512, 256)
    layer.weight = torch.nn.Parameter(torch.randn(256, 512))
    layer.prepack()
    other = torch.randn(256, 512)
    layer.load_state_dict({"weight": other}, assign=True)
    x = torch.randn(3, 512)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, other))
