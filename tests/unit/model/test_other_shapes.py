"""What open models have and ours have not, each by itself and together: the paged engine gives what the whole forward gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import ModelConfig
from shoal.errors import ConfigError, RequestError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import cost
from shoal.model.attention import Layout
from shoal.model.block import rope_tables
from shoal.model.net import Net
from tests import oracle

OPEN: dict[str, Any] = {"attn_pattern": "D", "early_exits": False, "image_size": 0, "embed_scale": 1.0, "rope_dims": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"attn_pattern": "D"},
    "dense beside the others": {"attn_pattern": "DLH"},
    "sparse beside the others": {"attn_pattern": "SDLH", "dense_length": 32, "window": 8, "top_k": 2},
    "six layers": {"layers": 6},
    "full depth alone": {"early_exits": False},
    "no images": {"image_size": 0},
    "whole heads turned": {"rope_dims": 16, "rope_rates": (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)},
    "no positions in every second layer": {"rope_pattern": "RN"},
    "no norm of queries and keys": {"qk_norm": "none"},
    "one norm of all heads": {"qk_norm": "all"},
    "biases": {"qkv_bias": True},
    "norms after": {"norm_place": "after"},
    "a head of its own": {"tied": False},
    "exits with a SwiGLU": {"exit_ffn": 40},
    "Llama": {**OPEN, "qk_norm": "none", "tied": False},
    "Qwen2": {**OPEN, "qk_norm": "none", "qkv_bias": True},
    "OLMo2": {**OPEN, "qk_norm": "all", "norm_place": "after", "layers": 5},
    "SmolLM3": {**OPEN, "qk_norm": "none", "rope_pattern": "RRRN", "layers": 7},
    "Llama, adapted": {**OPEN, "qk_norm": "none", "layers": 6, "early_exits": True, "exit_ffn": 40},
    "Llama, sparse": {
        **OPEN,
        "qk_norm": "none",
        "attn_pattern": "DSSD",
        "dense_length": 32,
        "window": 8,
        "summary": "mean_var",
    },
    "OLMo2, adapted": {
        **OPEN,
        "qk_norm": "all",
        "norm_place": "after",
        "layers": 25,
        "early_exits": True,
        "exit_ffn": 24,
    },
}
TOKENS = 12  # of an answer: each of three begins one page more


def model_of(shape: dict[str, Any], dtype: torch.dtype = torch.float64) -> Model:
    """Random weights, biases and norms that are no ones among them."""
    base = presets.get("test").model
    config = dataclasses.replace(base, kv_heads=1, train_length=256, **shape)
    net, draw = Net(config).init_(5).to(dtype), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() < 2:
                p.add_(0.3 * torch.empty(p.shape).normal_(generator=draw))
            else:
                p.mul_(3)
    return Model(config, net, Tokenizer.bytes_only())


@pytest.mark.parametrize("name", SHAPES)
def test_the_paged_engine_gives_what_the_whole_forward_gives(name: str) -> None:
    model = model_of(SHAPES[name])
    prompts = ["The depth of a fish", "The depth of a fish is its own, and so is that of a whale.", "x"]
    sampling = Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True, speculative=2)
    engine = Engine(model, units=400, max_batch_tokens=48)
    for _ in range(2):  # once more out of the prefix cache
        answers = engine.generate([Request(prompt, sampling, depth="full") for prompt in prompts])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.tokens == oracle.greedy(model, prompt, TOKENS, answer.tokens)
    assert answers[1].finished is not None and answers[1].finished.cached_tokens > 0
    cost.check(model.net, model.config)


@pytest.mark.parametrize("name", ["exits with a SwiGLU", "Llama, adapted", "OLMo2, adapted"])
def test_every_exit_that_was_adapted_is_one_of_the_engine(name: str) -> None:
    """Logits of the paged engine to 1e-9 at every depth, and drafts of such an exit leave full depth as it is."""
    model = model_of(SHAPES[name])
    prompt = model.tokenizer.encode("The depth of a fish is its own, and so is that of a whale.")
    engine = Engine(model, units=600, max_batch_tokens=48, speculative=3)
    allowed = ~model.forbidden()
    seen = set()
    for depth, layers in model.config.exit_names.items():
        asked = Sampling(max_tokens=12, temperature=0, ignore_eos=True, prompt_logprobs=0, speculative=3)
        (answer,) = engine.generate([Request(prompt, asked, depth=depth)])
        wanted = oracle.greedy(model, prompt, 12, answer.tokens, depth)
        assert answer.tokens == wanted and answer.depth == layers and answer.finished is not None
        scores = model.logits(prompt, depth).masked_fill(~allowed, -torch.inf).log_softmax(-1)
        told = torch.tensor([entry.logprob for entry in answer.finished.prompt_logprobs if entry], dtype=torch.float64)
        own = scores[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(told, own, rtol=0, atol=1e-9)
        seen.add(tuple(wanted))
        pooled = model.net.exit(model.net(torch.tensor([prompt]), exits=(layers,))[layers][0], layers)
        mean = torch.nn.functional.normalize(pooled.float().mean(0), dim=0)
        torch.testing.assert_close(model.embed(prompt, depth), mean)
    assert len(seen) > 1, "exits that say the same could not be told apart"
    assert engine.stats().get("spec_decode_num_draft_tokens_total", 0) > 0


def test_an_exits_swiglu_is_a_layer_whose_attention_gives_nothing() -> None:
    """By hand, for norms before and after."""
    for place in ("before", "after"):
        model = model_of({"exit_ffn": 40, "norm_place": place})
        draw = torch.Generator().manual_seed(1)
        h = torch.randn(5, model.config.width, generator=draw, dtype=torch.float64)
        w = {name: t.numpy() for name, t in model.net.exit_mlps["2"].state_dict().items()}

        def rms(x: Any, weight: Any, eps: float = model.config.norm_eps) -> Any:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

        def swiglu(x: Any, w: dict[str, Any] = w) -> Any:
            gate, up = np.split(x @ w["mlp.up.weight"].T, 2, axis=-1)
            return (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down.weight"].T

        x = h.numpy()
        x = x + (swiglu(rms(x, w["norm.weight"])) if place == "before" else rms(swiglu(x), w["norm.weight"]))
        wanted = rms(x, model.net.exit_norms["2"].weight.numpy())  # type: ignore[operator, union-attr]
        np.testing.assert_allclose(model.net.exit(h, 2).numpy(), wanted, rtol=0, atol=1e-12)
        full = model.net.exit_norms["4"](h)
        assert torch.equal(model.net.exit(h, 4), full), "full depth has none"


def test_an_adapted_model_is_saved_rounded_and_priced(tmp_path: Path) -> None:
    model = model_of(SHAPES["Llama, adapted"], torch.float32)
    model.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", verify=True)
    assert again.config == model.config
    ids = model.tokenizer.encode("The depth of a fish is its own.")
    for depth in model.config.exits:
        assert torch.equal(again.logits(ids, depth), model.logits(ids, depth))
    rounded = again.quantized()
    assert rounded.net.state_dict()["exit_mlps.2.mlp.up.weight"].dtype == torch.int8
    near = torch.nn.functional.cosine_similarity(rounded.logits(ids, "shallow"), model.logits(ids, "shallow"), dim=-1)
    assert near.mean() > 0.98
    cost.check(rounded.net, rounded.config)
    (answer,) = Engine(rounded, units=200, speculative=2).generate(
        [Request(ids, Sampling(max_tokens=4), depth="middle")]
    )
    assert answer.depth == 4
    c, plain = model.config, dataclasses.replace(model.config, exit_ffn=0)
    more = [cost.flops_per_token(c, 40, e) - cost.flops_per_token(plain, 40, e) for e in c.exits]
    assert more == [6 * c.width * 40, 6 * c.width * 40, 0]


@pytest.mark.parametrize(
    ("shape", "why"), [({"exit_ffn": -1}, "0 or more"), ({"early_exits": False, "exit_ffn": 8}, "early")]
)
def test_a_width_that_no_exit_can_have_is_refused(shape: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        dataclasses.replace(presets.get("test").model, **shape)


@pytest.mark.parametrize("name", ["dense", "Qwen2", "OLMo2"])
def test_a_setting_changes_what_the_model_says(name: str) -> None:
    """Else the tests above could not tell whether it is followed."""
    model = model_of(SHAPES[name], torch.float32)
    ids = model.tokenizer.encode("The depth of a fish is its own, and so is that of a whale.")
    logits = model.logits(ids)
    for change in ({"attn_pattern": "L"}, {"rope_theta": 7.0}, {"embed_scale": 3.0}, {"norm_eps": 0.1}):
        other = Net(dataclasses.replace(model.config, **change))
        other.load_state_dict(model.net.state_dict(), strict=False)
        assert not torch.allclose(Model(other.config, other, model.tokenizer).logits(ids), logits, atol=1e-3), change


def test_dense_attention_is_a_window_that_holds_all() -> None:
    dense = model_of({"attn_pattern": "D", "qk_norm": "none"})
    windowed = Net(dataclasses.replace(dense.config, attn_pattern="L", window=256)).double()
    windowed.load_state_dict(dense.net.state_dict(), strict=False)
    ids = list(b"The depth of a fish is its own." * 4)
    torch.testing.assert_close(
        Model(windowed.config, windowed, dense.tokenizer).logits(ids), dense.logits(ids), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_norm_is_of_what_goes_into_a_branch_or_of_what_comes_out_of_it(place: str) -> None:
    """Written out: the paged and the whole forward share the block, so that they agree wherever it stands."""
    block = model_of({"norm_place": place}).net.groups[0].blocks[0]  # type: ignore[union-attr, index]
    layout = Layout.packed(torch.zeros(1, 9, dtype=torch.long), window=4, block=2, sinks=1)
    x = torch.randn(1, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(layout.positions, block.attention.config, x.dtype)

    def normed(y: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        return y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    wanted = x
    for branch, norm in (
        (lambda y: block.attention(y, layout, rope), block.attention_norm),
        (block.mlp, block.mlp_norm),
    ):
        before = place == "before"
        wanted = wanted + (branch(normed(wanted, norm)) if before else normed(branch(wanted), norm))
    torch.testing.assert_close(block(x, layout, rope), wanted, rtol=0, atol=1e-10)


def test_group_ends_of_any_number_of_layers() -> None:
    def ends(layers: int) -> tuple[int, ...]:
        return dataclasses.replace(presets.get("test").model, layers=layers).ends

    assert (
        ends(30) == (8, 16, 23, 30)
        and ends(22) == (6, 12, 17, 22)
        and ends(8) == (2, 4, 6, 8)
        and ends(4) == (1, 2, 3, 4)
    )


@pytest.mark.parametrize("kv", ["auto", pytest.param("int8", marks=pytest.mark.drill)])
def test_int8_keeps_a_bias_and_a_head_of_its_own(kv: str) -> None:
    """With keys and values in int8 a second set of loops is compiled for it."""
    model = model_of(SHAPES["Qwen2"] | {"tied": False}, torch.bfloat16)
    rounded = model.quantized()
    ids = model.tokenizer.encode("The depth of a fish is its own.")
    assert rounded.net.dtype == torch.float32, "what is not rounded is exact"
    exact = model_of(SHAPES["Qwen2"] | {"tied": False}, torch.float32)
    near = torch.nn.functional.cosine_similarity(rounded.logits(ids), exact.logits(ids), dim=-1)
    assert near.mean() > 0.98
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    answer = Engine(rounded, units=200, kv_cache_dtype=kv).generate([Request(ids, sampling)])[0]
    assert len(answer.tokens) == 4


def test_a_text_model_refuses_images_and_takes_any_id() -> None:
    from shoal.inputs.chat import Encoded

    model = model_of(SHAPES["no images"], torch.float32)
    assert model.logits([8, 9, 8]).shape[0] == 3, "id 8 is no patch here"
    other = Model.from_preset("test")
    image = golden_image(other.config)
    with pytest.raises(RequestError, match="this model reads text alone"):
        model.encode(Encoded([9, *image.tokens()], [image]))


def golden_image(config: ModelConfig) -> Any:
    from shoal.inputs import media

    return media.Patches(np.zeros((1, config.patch_values), dtype=np.uint8), 1, 1)
