import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import Model
from shoal.errors import CheckpointError
from shoal.model import quant

KERNELS = sorted(quant._KERNELS)


def case(seed, rows, inputs, outputs, spread):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=g) * torch.logspace(-spread, spread, rows)[:, None]
    weight, scale = quant.quantize_rows(torch.randn(outputs, inputs, generator=g))
    return x, weight, scale


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([8, 33, 96, 257]), st.sampled_from([1, 16, 65]),
    st.floats(0, 3),
)  # fmt: skip
def test_kernels_equal_the_integer_reference(kernel, seed, rows, inputs, outputs, spread):
    """With unit scales the result is an integer below 2^24, exact in fp32: kernel and reference must agree bitwise."""
    x, weight, scale = case(seed, rows, inputs, outputs, spread)
    ones = torch.ones_like(scale)
    levels = quant.token_levels(x, quant.token_scale(x))
    got = quant._KERNELS[kernel](weight, ones)(levels)  # amax of the levels is 63, so their scale is 1
    assert torch.equal(got, (levels.long() @ weight.long().T).float())
    real = quant._KERNELS[kernel](weight, scale)(x)
    want = quant.int8_linear_reference(x, weight, scale)
    assert torch.allclose(real, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_does_not_depend_on_its_batch_mates(kernel):
    x, weight, scale = case(1, 16, 96, 65, 2)
    run = quant._KERNELS[kernel](weight, scale)
    assert torch.equal(run(x)[3:4], run(x[3:4]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_largest_sums_do_not_saturate(kernel):
    """All-largest weights and inputs overflow the int16 accumulator of the AVX2 kernel with 8-bit activations."""
    x, weight, scale = torch.ones(1, 512), torch.full((16, 512), 127, dtype=torch.int8), torch.ones(16, 1)
    assert quant._KERNELS[kernel](weight, scale)(x)[0, 0].item() == pytest.approx(512 * 127, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([8, 96]), st.floats(0, 3))
def test_fake_quantised_training_is_the_kernels_arithmetic(seed, rows, inputs, spread):
    x, _, _ = case(seed, rows, inputs, 8, spread)
    layer = quant.Linear(inputs, 24)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    layer.fake = True
    weight, scale = quant.quantize_rows(layer.weight.detach())
    # the same integers ...
    assert torch.equal(torch.round(quant.fake_weight(layer.weight) / scale).to(torch.int8), weight)
    # ... and the same product, to the order of fp32 sums
    want = quant.int8_linear_reference(x, weight, scale)
    assert torch.allclose(layer(x), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    layer(x).sum().backward()
    assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.abs().sum() > 0


def test_the_int8_twin_answers_like_the_fake_quantised_model():
    model = Model.from_preset("test", seed=2)
    tokens = torch.randint(9, 265, (1, 40))
    twin = model.quantized()
    exact = model.logits(tokens)
    quant.fake_quantize_(model.net)
    fake = model.logits(tokens)
    assert (fake - twin.logits(tokens)).abs().mean() < 0.02 * exact.std()
    assert (fake - exact).abs().mean() > 1e-4  # fake quantisation is on, and it rounds
    names = {name: t.dtype for name, t in twin.net.state_dict().items()}
    assert names["embed.weight"] == names["groups.0.blocks.0.mlp.up.weight"] == torch.int8
    assert names["patch_in.weight"] == names["exit_norms.4.weight"] == torch.float32


def test_outliers_zeros_and_nan():
    weight = torch.randn(8, 16)
    weight[0] *= 1e4
    weight[1] = 0
    levels, scale = quant.quantize_rows(weight)
    assert torch.allclose(levels[2:] * scale[2:], weight[2:], atol=float(scale[2:].max()) * 0.51)
    assert (levels[1] == 0).all()
    out = quant.pack(levels, scale)(torch.zeros(2, 16))
    assert torch.equal(out, torch.zeros(2, 8))
    weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        quant.quantize_rows(weight)


def test_a_wrong_kernel_is_refused():
    def saturating(weight, scale):
        return lambda x: quant.int8_linear_reference(x, weight, scale).clamp(-32768, 32767)

    assert quant.self_test(saturating) is not None
    assert quant.self_test(quant._KERNELS[quant.kernel_name()]) is None


def test_a_packed_weight_gives_the_same_product_and_is_never_served_stale():
    layer = quant.Linear(512, 512)
    torch.nn.init.normal_(layer.weight, std=0.05)
    x = torch.randn(3, 2, 512)
    want = torch.nn.functional.linear(x, layer.weight)
    quant.prepack_(torch.nn.ModuleList([layer]))
    assert layer._packed is not None
    with torch.inference_mode():
        assert torch.allclose(layer(x), want, atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(2.0)
        assert torch.allclose(layer(x), 2 * want, atol=1e-4)
    layer(x).sum().backward()  # with gradients, the weight itself is used
    assert layer.weight.grad is not None


def test_a_weight_put_in_the_place_of_a_packed_one_is_read():
    """A new parameter starts at version 0, as the packed one may have been."""
    layer = quant.Linear(512, 256)
    layer.weight = torch.nn.Parameter(torch.randn(256, 512))
    layer.prepack()
    other = torch.randn(256, 512)
    layer.load_state_dict({"weight": other}, assign=True)
    x = torch.randn(3, 512)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, other))
