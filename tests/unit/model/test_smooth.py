"""Smoothing before INT8: the same network, and nearer to itself once it is rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.errors import ResourceError
from shoal.evaluate.rounding import rounded, said
from shoal.model import int8, smooth
from shoal.model.net import Net
from tests.unit.model.test_other_shapes import SHAPES, model_of

ROWS = [list(range(20, 60)), list(range(90, 50, -1))]


def tensors() -> list[torch.Tensor]:
    return [torch.tensor(row) for row in ROWS]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_smoothed_network_computes_the_same_at_every_exit(shape: dict[str, object]) -> None:
    model = model_of(shape)
    by = smooth.factors(model.net, smooth.largest(model.net, tensors()))
    config = dataclasses.replace(model.config, tied=False)
    other = Net(config).double()
    other.load_state_dict(smooth.smoothed(model.net.state_dict(), by))
    ids = torch.tensor([[9, 70, 33, 21, 44, 81, 30, 12]])
    for layers, hidden in model.net(ids, exits=config.exits).items():
        again = other.head(other(ids, exits=config.exits)[layers], layers)
        torch.testing.assert_close(again, model.net.head(hidden, layers), rtol=1e-9, atol=1e-9)
    moved = {name.split(".")[-2] for name, factor in by.items() if (factor - 1).abs().max() > 0.01}
    before = {"attention_norm", "mlp_norm"} if config.norm_place == "before" else set()
    assert moved >= {"qkv", "out", "up", "down", "output", *before}, "each of them had something to even out"


def test_each_channel_is_scaled_by_its_own_activations_and_by_the_weights_that_read_it() -> None:
    """What is multiplied by s is divided by it where it comes from; query heads share the s of the head of v that they read."""
    model = model_of(SHAPES["Llama"])
    net, c = model.net, model.config
    assert c.heads * c.head_dim == c.width, "so that a wrong axis would fit, too"
    seen, name = smooth.largest(net, tensors()), "groups.1.blocks.0"
    by, state = smooth.factors(net, seen), net.state_dict()

    def of(product: str) -> torch.Tensor:
        """[I], by the largest of each column of a weight."""
        return smooth._scale(seen[f"{name}.{product}"], state[f"{name}.{product}.weight"].abs().max(0).values)

    def shared(x: torch.Tensor) -> torch.Tensor:
        """[Hk d] of [H d]: the largest over the query heads that read a K/V head."""
        return torch.stack(x.split(c.heads // c.kv_heads * c.head_dim)).unflatten(1, (-1, c.head_dim)).amax(1).flatten()

    heads, out = c.heads // c.kv_heads, state[f"{name}.attention.out.weight"].abs().max(0).values
    v = smooth._scale(shared(seen[f"{name}.attention.out"]), shared(out))
    want = {
        "attention_norm": 1 / of("attention.qkv"),
        "mlp_norm": 1 / of("mlp.up"),
        "attention.qkv": torch.cat([v.new_ones(c.width + len(v)), 1 / v])[:, None] * of("attention.qkv"),
        "attention.out": v.unflatten(0, (c.kv_heads, 1, -1)).expand(-1, heads, -1).flatten(),
        "mlp.up": torch.cat([v.new_ones(c.ffn), 1 / of("mlp.down")])[:, None] * of("mlp.up"),
        "mlp.down": of("mlp.down"),
    }
    for part, factor in want.items():
        torch.testing.assert_close(by[f"{name}.{part}.weight"], factor, msg=part)


def outlying() -> Model:
    """With channels of the norms, of v and of `up` that are many times the others, as in open models."""
    model = model_of(SHAPES["Llama"], torch.float32)
    with torch.no_grad():
        for block in (block for group in model.net.groups for block in group.blocks):
            for norm in (block.attention_norm, block.mlp_norm):
                norm.weight[3] *= 40
            for product in (block.attention.qkv, block.mlp.up):
                product.weight[:, 3] /= 40
            block.mlp.up.weight[-5] *= 40
            block.mlp.down.weight[:, -5] /= 40
    return model


def test_int8_of_weights_with_outliers_is_much_nearer_to_them_when_smoothed(tmp_path: Path) -> None:
    model = outlying()
    ids = [70, 33, 21, 44, 81, 30, 12, 99, 50, 51, 52]
    exact = model.logits(ids)
    plain, even = (made.logits(ids) for made in (model.quantized(), model.quantized(ROWS)))
    assert (even - exact).square().mean() < 0.2 * (plain - exact).square().mean()
    model.quantized(ROWS).save(tmp_path / "int8")
    again = Model.load(tmp_path / "int8")
    assert torch.equal(again.logits(ids), even) and not again.config.tied
    request = Request(ids, Sampling(max_tokens=8, temperature=0, ignore_eos=True))
    assert Engine(again).generate([request])[0].tokens == again.generate_naive(ids, 8, ignore_eos=True)


def test_only_an_imported_model_is_smoothed_and_by_the_same_words_each_time() -> None:
    own = Model.from_preset("test")
    assert rounded(own).config.tied, "ours learn to live with the rounding"
    foreign = Model.from_preset("test")
    foreign.source = {"family": "llama"}
    assert said(foreign, 2, 12) == said(foreign, 2, 12)
    assert [len(row) for row in said(foreign, 2, 12)] == [12, 12]
    assert not rounded(foreign).config.tied


@pytest.mark.parametrize("source", [None, {"family": "llama"}], ids=["own", "imported"])
def test_a_loaded_model_says_whether_channels_were_moved_in_whatever_it_is_computed(
    source: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of the weights as they were fits one that was not smoothed alone."""
    model = Model.from_preset("test")
    model.source = source
    model.quantized().save(tmp_path / "int8")
    moved = source is not None
    assert Model.load(tmp_path / "int8").smoothed == moved

    def refused(device: torch.device) -> list[str]:
        raise ResourceError("no INT8 here")

    monkeypatch.setattr(int8, "trusted", refused)
    why = list[str]()
    again = Model.load(tmp_path / "int8", on_fallback=why.append)
    assert (again.config.quantization, again.smoothed, why) == ("none", moved, ["no INT8 here"])
