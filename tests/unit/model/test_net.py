import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from shoal import Model, presets
from shoal.config import ModelConfig
from shoal.errors import ConfigError, ContextLengthError, RequestError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID
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
    gates = torch.sigmoid(a.groups[0].blocks[0].attention.gate.detach())
    assert torch.allclose(gates, torch.full((3,), 0.7), atol=1e-6)


@pytest.mark.parametrize("depth", ["shallow", "middle", "full", 1, 2, 4])
def test_a_depth_is_a_truncated_model_bit_for_bit(model, depth):
    tokens = torch.randint(9, 265, (2, 30))
    layers = model.config.depth(depth)
    kept = Model(model.config, Net(model.config).double(), model.tokenizer)
    kept.net.load_state_dict(model.net.state_dict())
    for group in list(kept.net.groups)[layers // model.config.group_layers :]:
        for p in group.parameters():
            p.fill_(float("nan"))  # a deeper layer that ran would show
    assert torch.equal(kept.logits(tokens, depth), model.logits(tokens, depth))


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


def test_documents_of_one_row_never_meet(model):
    a, b = torch.randint(9, 265, (1, 33)), torch.randint(9, 265, (1, 21))
    docs = torch.tensor([[0] * 33 + [1] * 21])
    together = model.net(torch.cat([a, b], 1), docs=docs, exits=(1, 4))
    for e in (1, 4):
        assert (together[e][:, :33] - model.net(a, exits=(e,))[e]).abs().max() < 1e-12
        assert (together[e][:, 33:] - model.net(b, exits=(e,))[e]).abs().max() < 1e-12


def test_gate_can_be_set_at_run_time(model):
    tokens = torch.randint(9, 265, (1, 60))
    local = dataclasses.replace(model.config, attn_pattern="L")
    only_local = Net(local).double()
    only_local.load_state_dict(model.net.state_dict())
    for group in model.net.groups:
        for block in group.blocks:
            block.attention.mix_local = 1.0
    try:
        assert (model.net(tokens)[4] - only_local(tokens)[4]).abs().max() < 1e-12
    finally:
        for group in model.net.groups:
            for block in group.blocks:
                block.attention.mix_local = None


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


@pytest.mark.parametrize("int8", [False, True], ids=["fp", "int8"])
def test_bad_input_is_named(model, int8):
    """One typed error that names the field and what is allowed, whatever the precision."""
    model = model.quantized() if int8 else model
    for tokens, message in (
        ([300], "prompt token id: got 300; allowed: 0 to 299"),
        ([-1], "prompt token id: got -1"),
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
