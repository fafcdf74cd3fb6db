import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from shoal import Model, presets
from shoal.config import ModelConfig
from shoal.errors import CheckpointError, ConfigError, ContextLengthError, RequestError
from shoal.inputs import media
from shoal.inputs.tokenizer import PATCH_ID
from shoal.model import cost
from shoal.model.depth import Router
from shoal.model.net import Net


@pytest.fixture(scope="module")
def model():
    return Model.from_preset("test", seed=0, dtype="float64")


def picture(model, color=(200, 30, 30), size=(24, 12)):
    return media.to_patches(Image.new("RGB", size, color), model.config)


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_have_the_parameters_that_the_table_says(name):
    config = presets.get(name).model
    with torch.device("meta"):
        net = Net(config)
    cost.check(net, config)
    assert cost.parameters(config).total == pytest.approx(presets.parameters_said(name), rel=0.1)
    assert len(presets.get(name).train.exit_weights) == len(config.exits)


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


def test_bad_input_is_named(model):
    with pytest.raises(RequestError, match="prompt token id: got 300"):
        model.logits([300])
    with pytest.raises(RequestError, match="prompt images: got '0 patches'"):
        model.logits([PATCH_ID])
    with pytest.raises(ContextLengthError, match="at most 384"):
        model.logits([10] * 385)
    with pytest.raises(ConfigError, match="depth: got 'deepest'; allowed: shallow, middle, full, 1, 2, 4"):
        model.logits([10], depth="deepest")
    wide = media.Patches(np.zeros((16, model.config.patch_values), np.uint8), 4, 4)
    with pytest.raises(RequestError, match="image: got '4x4 patches"):
        model.logits(wide.tokens(), images=[wide])
    with pytest.raises(RequestError, match="prompt is empty"):
        model.encode("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page": 7}, "model.page: got 7; allowed: a multiple of block"),
        ({"sinks": 9}, "model.sinks"),
        ({"kv_heads": 2}, "model.heads"),
        ({"layers": 6}, "model.layers: got 6; allowed: a multiple of 4"),
        ({"vocab": 0}, "model.vocab"),
        ({"attn_pattern": "HX"}, "model.attn_pattern"),
    ],
)
def test_bad_configs_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(presets.get("test").model, **change)


def test_a_config_that_is_never_sparse_warns():
    with pytest.warns(UserWarning, match="never sparse"):
        ModelConfig(
            vocab=300, layers=4, width=48, heads=3, kv_heads=3, head_dim=16, ffn=88, train_length=16,
            window=8, block=4, page=8, top_k=4,
        )  # fmt: skip


def test_model_directory_round_trip(model, tmp_path):
    single = Model.from_preset("test", seed=1)
    single.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    again = Model.load(tmp_path / "m")
    tokens = torch.randint(9, 265, (1, 20))
    assert torch.equal(again.logits(tokens), single.logits(tokens))
    assert again.tokenizer.sha256 == single.tokenizer.sha256 and again.config == single.config
    single.save(tmp_path / "m")  # replaces
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # nothing half-written stays


def test_damaged_model_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a model directory"):
        Model.load(tmp_path)
    Model.from_preset("test").save(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        Model.load(tmp_path / "m")
    Model.from_preset("tiny").save(tmp_path / "n")
    (tmp_path / "n" / "config.json").write_text((tmp_path / "m" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="tensor"):
        Model.load(tmp_path / "n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not a model directory"):
        Model.from_preset("test").save(tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "config.json is not valid json"),
        ("config.json", '{"format": "other"}', "allowed: shoal-model version 1"),
        ("config.json", '{"format": "shoal-model", "version": 1}', "lacks a name or a model"),
        (
            "config.json",
            '{"format": "shoal-model", "version": 1, "name": "x", "model": {"vocb": 1}}',
            "unknown key vocb",
        ),
        ("tokenizer.json", None, "tokenizer"),
        ("chat_template.jinja", None, "cannot read .*chat_template.jinja"),
        ("router.json", None, "router.json"),
        ("router.json", '{"thresholds": 1}', "router.json: thresholds"),
    ],
)
def test_a_damaged_file_of_a_model_directory_is_named(tmp_path, file, text, says):
    """As a CheckpointError: the directory is at fault and not the command line."""
    model = Model.from_preset("test")
    model.router = Router(model.config)
    model.save(tmp_path / "m")
    assert Model.load(tmp_path / "m").router is not None
    (tmp_path / "m" / file).unlink() if text is None else (tmp_path / "m" / file).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        Model.load(tmp_path / "m")


def test_a_model_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    model = Model.from_preset("test", seed=1)
    model.save(tmp_path / "m")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("shoal.model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        Model.from_preset("test", seed=2).save(tmp_path / "m")
    with pytest.raises(OSError, match="no space"):
        Model.from_preset("test", seed=2).save(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(Model.load(tmp_path / "m").net.embed.weight, model.net.embed.weight)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a model directory"):
        model.save(tmp_path / "file")


def test_kv_memory_is_proportional_to_depth():
    c = presets.get("base").model
    full = cost.kv_bytes_stored(c, 1000)
    assert cost.kv_bytes_stored(c, 1000, c.exits[0]) * 4 == full
    assert cost.vectors_read(c, 32_768) < 2 * 32_768 / 8  # dense reads every key and value
    assert cost.flops_per_token(c, 1000, c.exits[0]) < cost.flops_per_token(c, 1000) / 2
