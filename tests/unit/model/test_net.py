import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from shoal import Model, presets
from shoal.config import ModelConfig
from shoal.errors import ConfigError, ContextLengthError, RequestError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID, Tokenizer
from shoal.model.block import Attention
from shoal.model.gpu import launch
from shoal.model.net import Net


@pytest.fixture(scope="module")
def model():
    return Model.from_preset("test", seed=0, dtype="float64")


def picture(model, color=(200, 30, 30), size=(24, 12)):
    return media.to_patches(Image.new("RGB", size, color), model.config)


def test_initial_weights_depend_on_the_seed_alone():
    config = presets.get("test").model
    a, b, other = Net(config).init_(3), Net(config).init_(3), Net(config).init_(4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, other.embed.weight)
    first, unsaid = Net(config).init_(0), Net(config).init_()
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), unsaid.parameters(), strict=True))
    assert all(torch.equal(values, first.get_parameter(name)) for name, values in first.drawn())
    gates = torch.sigmoid(a.groups[0].blocks[0].attention.gate.detach())
    assert torch.allclose(gates, torch.full((3,), 0.7), atol=1e-6)


@pytest.mark.parametrize(("exits", "groups"), [((1,), 1), ((2, 1), 2), ((4,), 4), (None, 4)])
def test_no_group_runs_beyond_the_deepest_exit_that_is_asked_for(model, exits, groups):
    ran = []
    hooks = [group.register_forward_hook(lambda *_, j=j: ran.append(j)) for j, group in enumerate(model.net.groups)]
    try:
        assert model.net(torch.randint(9, 265, (1, 5)), exits=exits).keys() == set(exits or (4,))
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == list(range(groups))


@pytest.mark.parametrize("change", [{}, {"image_size": 0}, {"quantization": "w8a8"}], ids=str)
def test_a_net_says_where_its_weights_are_and_in_what_it_computes(change):
    """Not in what they are stored: int8 weights are computed with in fp32."""
    with torch.device("meta"):
        net = Net(dataclasses.replace(presets.get("test").model, **change))
    assert (net.device.type, net.dtype) == ("meta", torch.float32)
    assert net.double().dtype == torch.float64


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_tokens_come_in_by_a_scale_that_is_the_root_of_the_width_where_none_is_said(scale):
    """A few of them by numpy, as all."""
    config = dataclasses.replace(presets.get("test").model, embed_scale=scale)
    net, ids = Net(config).init_(2).double(), [60, 0, 61, 60]
    with torch.inference_mode():
        want = net.embed.weight[ids] * (scale or math.sqrt(config.width))
        torch.testing.assert_close(net.embed_inputs(torch.tensor([ids]))[0], want, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.from_numpy(net.embed_few(ids)), want, rtol=1e-12, atol=0)


def test_a_forward_whose_kernels_are_given_up_is_run_again_without_them(model, monkeypatch):
    """`launch.give_up` raises where that was not the reason."""
    want, told = model.net(torch.tensor([[60, 61]])), []
    monkeypatch.setattr(launch, "give_up", lambda device, error: told.append((device, str(error))))
    forward = Net._forward

    def once(self, *given):
        if not told:
            raise RuntimeError("no kernel")
        return forward(self, *given)

    monkeypatch.setattr(Net, "_forward", once)
    found = model.net(torch.tensor([[60, 61]]))
    assert torch.equal(found[4], want[4]) and told == [(torch.device("cpu"), "no kernel")]


def test_images_count_and_where_they_stand_counts(model):
    image, other = picture(model), picture(model, (30, 200, 30))
    ids = [50, *image.tokens(), 60, 61]
    assert ids.count(PATCH_ID) == image.rows * image.cols == len(image.values)
    a, b = model.logits(ids, images=[image]), model.logits(ids, images=[other])
    at = ids.index(PATCH_ID)
    assert torch.equal(a[:at], b[:at])  # causal: nothing before the image changes
    assert not torch.allclose(a[-1], b[-1])


def test_rows_of_a_batch_have_their_own_images(model):
    """As each of them alone has; one that begins in a row and goes on in the next is refused, wherever it is cut."""
    image, other = picture(model), picture(model, (30, 200, 30))
    span = image.tokens()
    rows = [[50, *span, 60], [40, 41, *span], [*span, 44, 45], [70] * (len(span) + 2)]
    together = model.logits(torch.tensor(rows), images=[image, other, image])
    for logits, row, own in zip(together, rows, ([image], [other], [image], None), strict=True):
        torch.testing.assert_close(logits, model.logits(row, images=own))
    for cut in range(1, len(span)):
        width = max(cut, len(span) - cut)
        torn = [[40] * (width - cut) + span[:cut], span[cut:] + [40] * (width - len(span) + cut)]
        with pytest.raises(RequestError, match="got 'an image that goes on in the next row'; put Patches"):
            model.logits(torch.tensor(torn), images=[image])


def test_a_vector_of_a_text_with_an_image_is_of_both(model):
    image, other = picture(model), picture(model, (30, 200, 30))
    ids = [50, *image.tokens(), 60]
    vectors = [model.embed(Encoded(ids, [each])) for each in (image, other)]
    assert (vectors[0] - vectors[1]).abs().max() > 1e-4
    with torch.inference_mode():
        seen = torch.from_numpy(image.values.copy()), torch.from_numpy(media.grid(ids))
        read = model.net.exit_norms["4"](model.net(torch.tensor([ids]), *seen, exits=(4,))[4][0]).float().mean(0)
    torch.testing.assert_close(vectors[0], read / read.norm())


@pytest.mark.parametrize("depth", ["shallow", "full"])
def test_a_vector_is_the_mean_of_what_the_head_would_read_and_of_length_one(model, depth):
    ids, layers = list(range(40, 75)), model.config.depth(depth)
    with torch.inference_mode():
        read = model.net.exit_norms[str(layers)](model.net(torch.tensor([ids]), exits=(layers,))[layers][0])
        mean = sum(row.float() for row in read) / len(ids)
        torch.testing.assert_close(model.embed(ids, depth), mean / mean.square().sum().sqrt())


@pytest.mark.parametrize(
    ("int8", "asked", "got"),
    [
        (False, "auto", torch.bfloat16),
        (False, "bfloat16", torch.bfloat16),
        (False, "float32", torch.float32),
        (True, "auto", torch.float32),
        (True, "float32", torch.float32),
    ],
)
def test_on_a_gpu_a_model_computes_in_what_it_is_told(int8, asked, got, monkeypatch):
    monkeypatch.setattr(Model, "to", lambda self, device: self)
    told = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    one = Model.from_preset("test")
    assert (one.quantized() if int8 else one).on_gpu(asked).net.dtype == got
    assert told == ["high"], "what is fp32 is multiplied in TF32"
    if int8:
        with pytest.raises(
            ConfigError, match="dtype: got 'bfloat16'; allowed: auto or float32, where weights are INT8"
        ):
            one.quantized().on_gpu("bfloat16")


@pytest.mark.parametrize("int8", [False, True], ids=["fp", "int8"])
def test_bad_input_is_named(model, int8):
    """One typed error that names the field and what is allowed, whatever the precision."""
    model = model.quantized() if int8 else model
    for tokens, message in (
        ([300], "prompt token id: got 300; allowed: 0 to 299"),
        ([-1], "prompt token id: got -1"),
        ([0, 299, 300], "prompt token id: got 300"),
        ([], r"tokens: got 'float32 \[0\]'; allowed: whole numbers"),
        ([1.5], "tokens: got 'float32"),
        ([True], "tokens: got 'bool"),
        (torch.zeros(1, 1, 1, dtype=torch.long), r"tokens: got 'int64 \[1, 1, 1\]'"),
        ([[1, 2], [3]], "tokens: got"),
        ([PATCH_ID], "prompt images: got '0 patches'; allowed: '?1 as in the ids"),
    ):
        with pytest.raises(RequestError, match=message):
            model.logits(tokens)
    with pytest.raises(ContextLengthError, match="at most 384"):
        model.logits([10] * 385)
    for depth in ("deepest", 3, True, 0):
        with pytest.raises(ConfigError, match=f"depth: got {depth!r}; allowed: shallow, middle, full, 1, 2, 4"):
            model.logits([10], depth=depth)
    with pytest.raises(RequestError, match="prompt is empty"):
        model.encode("")
    with pytest.raises(RequestError, match=r"prompt token id: got 1\.5; allowed: whole numbers"):
        model.encode([1.5])


def test_bad_images_are_named(model):
    values = model.config.patch_values
    good = picture(model)
    for image, message in (
        (media.Patches(np.zeros((16, values), np.uint8), 4, 4), r"image: got '4x4 patches.*allowed: 1x1 to 3x3"),
        (media.Patches(np.zeros((4, 16), np.uint8), 2, 2), r"\[4, 16\].*of 48 uint8 values each \(RGB, 4x4\)"),
        (media.Patches(np.zeros((4, values)), 2, 2), "values float64"),
        (media.Patches(np.zeros((3, values), np.uint8), 2, 2), r"2x2 patches, values uint8 \[3, 48\]"),
        (media.Patches(np.zeros((0, values), np.uint8), 0, 2), "image: got '0x2"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            model.logits(image.tokens(), images=[image])
        assert caught.value.param == "images"
    turned = media.Patches(good.values, good.cols, good.rows)  # as many patches, laid out otherwise
    assert good.rows != good.cols
    with pytest.raises(RequestError, match="another shape than the images'"):
        model.logits(turned.tokens(), images=[good])
    with pytest.raises(RequestError, match="prompt images: got '6 patches'"):
        model.logits([10], images=[good])
    span = good.tokens()
    for at in range(1, len(span)):
        with pytest.raises(RequestError, match="in one piece"):
            model.logits([*span[:at], 60, *span[at:]], images=[good])


def test_an_image_has_one_patch_to_a_whole_side_of_them_each_way(model):
    for rows, cols in itertools.product(range(5), repeat=2):
        image = media.Patches(np.zeros((rows * cols, model.config.patch_values), np.uint8), rows, cols)
        given = Encoded(image.tokens(), [image])
        if 1 <= rows <= 3 and 1 <= cols <= 3:
            assert model.encode(given).images == [image]
            continue
        with pytest.raises(RequestError, match=f"image: got '{rows}x{cols} patches"):
            model.encode(given)


def test_a_model_of_text_alone_has_no_places_for_patches():
    config = dataclasses.replace(presets.get("test").model, image_size=0)
    with torch.device("meta"):
        one = Model(config, Net(config), Tokenizer.bytes_only())
    assert one.encode([PATCH_ID, 50]).ids == [PATCH_ID, 50]
    with pytest.raises(RequestError, match="leave it out: this model reads text alone"):
        one.encode(Encoded([50], [media.Patches(np.zeros((1, 48), np.uint8), 1, 1)]))


def test_the_whole_context_is_read_and_no_more_and_ids_may_be_of_32_bits(model):
    ids = [10 + n % 200 for n in range(384)]
    assert model.logits(torch.tensor(ids, dtype=torch.int32)).shape == (384, 300)
    assert model.embed(ids, "shallow").shape == (48,)
    with pytest.raises(ContextLengthError, match="input: got 385; allowed: at most 384 tokens"):
        model.embed([*ids, 10])


def test_greedy_tokens_are_sixteen_where_nobody_says_how_many(model):
    found = model.generate_naive([40, 41], ignore_eos=True)
    first = model.logits([40, 41])[-1].masked_fill(model.forbidden(), -torch.inf)
    assert len(found) == 16 and found[0] == int(first.argmax())
    sayable = set(model.tokenizer.sayable)
    assert model.forbidden().tolist() == [token not in sayable for token in range(300)]


def test_greedy_tokens_end_where_the_model_ends_unless_that_is_ignored(model, monkeypatch):
    end = model.tokenizer.ends[0]
    after = {1: 60, 2: end, 3: 61}

    def logits(self, ids, *_):
        scores = torch.zeros(len(ids), 300)
        scores[-1, after[len(ids)]] = 1.0
        return scores

    monkeypatch.setattr(Model, "logits", logits)
    assert model.generate_naive([50], 3) == [60]
    assert model.generate_naive([50], 3, ignore_eos=True) == [60, end, 61]


def test_a_twin_that_is_smoothed_has_other_levels_and_a_head_of_its_own():
    """What is moved between channels of the head must not be moved in the table as well."""
    one = Model.from_preset("test", seed=1)
    plain, smoothed = one.quantized(), one.quantized([[60, 61, 62], [70]])
    assert plain.config.tied and not smoothed.config.tied and smoothed.net.output is not None
    name = "groups.0.blocks.0.mlp.up.weight"
    assert not torch.equal(plain.net.state_dict()[name], smoothed.net.state_dict()[name])


# ---- layers


def test_how_far_a_layer_looks_is_what_its_kind_says():
    """One softmax, with what is added to the window's; all; the window alone; both branches, by a share of each head."""
    config = dataclasses.replace(
        presets.get("test").model, attn_pattern="SDLH", dense_length=32, window=8, top_k=2, local_weight=0.25
    )
    one, dense, local, hybrid = (Attention(config, kind) for kind in "SDLH")
    for layer, gamma, bias, most in ((one, None, one.gate, 32), (dense, None, None, 1 << 40), (local, None, None, 0)):
        reach = layer.reach()
        assert (reach.window, reach.top_k, reach.sinks, reach.dense) == (8, 2, config.sinks, most)
        assert reach.gamma is gamma and reach.bias is bias
    assert (one.gate == 0).all() and not hasattr(dense, "gate") and hybrid.gate.requires_grad
    with torch.no_grad():
        hybrid.gate += torch.tensor([0.0, 1.0, -2.0])
    odds = torch.tensor([1.0, math.e, math.exp(-2)]) / 3  # of a quarter, and moved
    torch.testing.assert_close(hybrid.gamma(), odds / (1 + odds))
    assert (
        hybrid.reach().bias is None and torch.equal(hybrid.reach().gamma, hybrid.gamma()) and hybrid.reach().dense == 0
    )
    hybrid.mix_local = 0.5
    assert hybrid.gamma().tolist() == [0.5] * 3
    fixed = Attention(dataclasses.replace(config, mix_mode="fixed"), "H")
    assert fixed.gamma().tolist() == [0.25] * 3 and not fixed.gate.requires_grad
    for share, odds in ((0.0, 1e-6 / (1 - 1e-6)), (1.0, (1 - 1e-6) / 1e-6)):
        gate = Attention(dataclasses.replace(config, local_weight=share), "H").gate
        assert gate.tolist() == pytest.approx([math.log(odds)] * 3, rel=1e-6), "so that it can be learned from there"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page": 7}, "model.page: got 7; allowed: a multiple of block"),
        ({"sinks": 9}, "model.sinks"),
        ({"kv_heads": 2}, "model.heads"),
        ({"layers": 3}, "model.layers: got 3; allowed: 4 or more"),
        ({"vocab": 0}, "model.vocab"),
        ({"attn_pattern": "HX"}, "model.attn_pattern: got 'HX'; allowed: letters H"),
        ({"attn_pattern": ""}, "model.attn_pattern"),
        ({"top_k": 0}, "model.top_k: got 0; allowed: a positive integer"),
        ({"head_dim": 18}, "model.head_dim: got 18; allowed: a multiple of 4"),
        ({"local_weight": 1.2}, "model.local_weight"),
        ({"image_size": 10}, "model.image_size: got 10; allowed: a multiple of patch"),
        ({"image_size": 40}, "model.image_size: got 40; allowed: an image of at most train_length .96. tokens"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(presets.get("test").model, **change)


@pytest.mark.parametrize("weights", [(0.2, 1.0), (0.1, 0.2, 0.3, 1.0), (0.2, 0.3, 0.0)], ids=str)
def test_exit_weights_are_those_of_the_exits(weights):
    preset = presets.get("test")
    with pytest.raises(ConfigError, match=r"train.exit_weights: got \("):
        dataclasses.replace(preset, train=dataclasses.replace(preset.train, exit_weights=weights))


def test_a_config_that_is_never_sparse_warns():
    with pytest.warns(UserWarning, match="never sparse"):
        ModelConfig(
            vocab=300, layers=4, width=48, heads=3, kv_heads=3, head_dim=16, ffn=88, train_length=16,
            window=8, block=4, page=8, top_k=4, image_size=8,
        )  # fmt: skip
