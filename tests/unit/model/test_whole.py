"""Every path of the model against `tests.reference`, which shares no code with it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Engine, Model, ModelConfig, Request, Sampling, presets
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.linears import Int8Linear
from shoal.model.net import Net
from shoal.model.router import Router, features, page_sums
from tests import reference

SHAPES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "grouped heads, mean and variance": {"heads": 4, "kv_heads": 2, "head_dim": 12, "summary": "mean_var"},
    "window in every other layer": {"attn_pattern": "HL", "rope_theta": 500.0},
    "a fixed gate, no sinks, blocks of one": {
        "mix_mode": "fixed",
        "local_weight": 0.3,
        "sinks": 0,
        "block": 1,
        "top_k": 7,
    },
    "sparse and dense layers in turn": {
        "attn_pattern": "SD",
        "dense_length": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 12,
    },
    "sparse beside hybrid, mean and variance": {"attn_pattern": "SSH", "summary": "mean_var"},
    "one KV head, two sinks": {"heads": 4, "kv_heads": 1, "head_dim": 8, "sinks": 2, "norm_eps": 1e-3},
}
EXITS = (1, 2, 4)


def made(shape: str, seed: int = 5) -> Model:
    """A float64 model whose norms and gates are no ones and no equals: what is left out of the equations must show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = dataclasses.replace(presets.get("test").model, **{"window": 6, "top_k": 3, **SHAPES[shape]})
    net = Net(config).init_(seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() < 2:
                p.add_(0.3 * torch.empty(p.shape, dtype=p.dtype).normal_(generator=generator))
            elif "_embed" in name:
                p.mul_(20)  # a patch's place must matter as much as its pixels
    return Model(config, net, Tokenizer.bytes_only())


def arrays(model: Model) -> dict[str, np.ndarray]:
    found = {name: tensor.numpy() for name, tensor in model.net.state_dict().items()}
    if model.router is not None:
        found |= {f"router.{name}": tensor.numpy() for name, tensor in model.router.state_dict().items()}
    return found


def prompt(model: Model, seed: int = 0, image: tuple[int, int] | None = (3, 2)) -> Encoded:
    """Text, an image of `image` rows and columns, and text."""
    draw = np.random.default_rng(seed)
    text = draw.integers(9, len(model.tokenizer), size=17).tolist()
    if image is None:
        return Encoded(text + draw.integers(9, len(model.tokenizer), size=14).tolist())
    rows, cols = image
    values = draw.integers(0, 256, size=(rows * cols, model.config.patch_values), dtype=np.uint8)
    patches = media.Patches(values, rows, cols)
    return Encoded([*text, *patches.tokens(), *text[::-1]], [patches])


def plain(model: Model) -> dict[str, Any]:
    return dataclasses.asdict(model.config)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_text_and_images_at_every_exit(shape: str) -> None:
    model = made(shape)
    asked = prompt(model)
    for depth in EXITS:
        ours = model.logits(asked.ids, depth, asked.images).numpy()
        np.testing.assert_allclose(
            ours, reference.logits(asked.ids, arrays(model), plain(model), depth, asked.patches), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_documents_of_one_row_are_each_as_if_alone(shape: str) -> None:
    model = made(shape)
    one, two = prompt(model, 1, (2, 3)), prompt(model, 2, None)
    tokens = torch.tensor([[*one.ids, *two.ids]])
    docs = torch.tensor([[0] * len(one.ids) + [1] * len(two.ids)])
    assert one.patches is not None
    grid = torch.tensor(reference.places(one.ids))
    states = model.net(tokens, torch.from_numpy(one.patches), grid, docs, exits=EXITS)
    for depth in EXITS:
        ours = model.net.head(states[depth], depth)[0].numpy()
        alone = [reference.logits(doc.ids, arrays(model), plain(model), depth, doc.patches) for doc in (one, two)]
        np.testing.assert_allclose(ours, np.concatenate(alone), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_says_what_greedy_decoding_by_the_equations_says(shape: str) -> None:
    """Paged, batched, in chunks, through the prefix cache; the prompts share their beginning. A row of logits follows from what
    is before it: where the tokens so far are right the next row is what greedy decoding looks at, so one look says all."""
    model = made(shape)
    ids = prompt(model, 3, None).ids
    engine = Engine(model, units=80, max_batch_tokens=12, max_batch=4)
    sampling = Sampling(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={1: -100.0})
    asked = [(ids[:end], depth) for end in (len(ids), 20) for depth in EXITS]
    answers = engine.generate([Request(some, sampling, depth=depth) for some, depth in asked])
    for (some, depth), answer in zip(asked, answers, strict=True):
        rows = reference.logits([*some, *answer.tokens[:-1]], arrays(model), plain(model), depth)[len(some) - 1 :]
        assert answer.tokens == (9 + rows[:, 9 : len(model.tokenizer)].argmax(-1)).tolist() and len(answer.tokens) == 5


def test_logprobs_of_a_prompt_are_those_of_the_equations() -> None:
    model = made("as it comes")
    asked = prompt(model, 4, None)
    (answer,) = Engine(model, units=80).generate(
        [Request(asked, Sampling(max_tokens=1, prompt_logprobs=0), depth="middle")]
    )
    assert answer.finished is not None
    allowed = np.array([i == 1 or 9 <= i < len(model.tokenizer) for i in range(model.config.vocab)])
    scores = reference.logits(asked.ids, arrays(model), plain(model), 2)
    expected = np.log(reference.softmax(np.where(allowed, scores, -math.inf))[range(len(asked.ids) - 1), asked.ids[1:]])
    told = [entry.logprob for entry in answer.finished.prompt_logprobs if entry is not None]
    np.testing.assert_allclose(told, expected, rtol=0, atol=1e-9)


class TestRouter:
    @pytest.mark.parametrize("image", [None, (3, 2)])
    def test_features(self, image: tuple[int, int] | None) -> None:
        model = made("grouped heads, mean and variance")
        asked = prompt(model, 6, image)
        patches = None if asked.patches is None else torch.from_numpy(asked.patches)
        grid = torch.tensor(reference.places(asked.ids)) if image else None
        tokens = torch.tensor(asked.ids)
        state = model.net(tokens[None], patches, grid, exits=(1,))[1][0]
        ours = features(page_sums(model.net, state, tokens), state[-1], len(tokens)).numpy()
        np.testing.assert_allclose(
            ours, reference.router_features(asked.ids, arrays(model), plain(model), asked.patches), rtol=0, atol=1e-9
        )

    def test_the_engine_runs_the_depth_that_the_equations_choose(self) -> None:
        """For prompts and tolerances that between them choose every exit."""
        model = made("as it comes")
        model.router = _router(model.config)
        thresholds = model.router.calibration.thresholds
        seen = set()
        for seed in range(6):
            asked = prompt(model, seed, (2, 2) if seed % 2 else None)
            x = reference.router_features(asked.ids, arrays(model), plain(model), asked.patches)
            for tolerance in (0.0, 0.005, 0.01, 0.05, 0.3, 5.0):
                request = Request(asked, Sampling(max_tokens=1), quality_tolerance=tolerance)
                (answer,) = Engine(model, units=80, max_batch_tokens=42).generate([request])
                expected = reference.router_choice(x, arrays(model), EXITS, thresholds, tolerance)
                assert answer.depth == expected
                seen.add(expected)
        assert seen == set(EXITS)


def _router(config: ModelConfig) -> Router:
    """Random weights, and bounds that single prompts out."""
    torch.manual_seed(0)
    router = Router(config)
    router.center.normal_()
    router.spread.uniform_(0.5, 2)
    router.calibration.thresholds = [(0.01, -0.4), (0.05, -0.1), (0.2, 0.1), (1.0, 9.0)]
    return router.requires_grad_(False)


class TestInt8:
    def test_a_product_to_the_bit(self) -> None:
        draw = np.random.default_rng(0)
        for outputs, inputs, rows in ((13, 48, 1), (64, 88, 5), (30, 130, 9)):
            linear = Int8Linear(inputs, outputs)
            linear.weight.copy_(torch.from_numpy(draw.integers(-127, 128, size=(outputs, inputs), dtype=np.int8)))
            linear.weight_scale.copy_(torch.from_numpy(draw.uniform(0.001, 0.1, (outputs, 1)).astype(np.float32)))
            x = draw.normal(size=(rows, inputs)).astype(np.float32)
            x[0, :4] = x[0].max() * np.array([1, -1, 0.5, 0.0], dtype=np.float32)
            ours = linear(torch.from_numpy(x)).numpy()
            np.testing.assert_array_equal(
                ours, reference.int8_product(x, linear.weight.numpy(), linear.weight_scale.numpy())
            )

    def test_weights_are_rounded_by_rows(self) -> None:
        model = made("as it comes")
        model.net.float()
        rounded = arrays(model.quantized())
        for name, w in arrays(model).items():
            if f"{name}_scale" in rounded:
                scale = np.abs(w).max(-1, keepdims=True) / 127
                np.testing.assert_allclose(rounded[f"{name}_scale"], scale, rtol=1e-6)
                assert np.abs(rounded[name] * rounded[f"{name}_scale"] - w).max() <= 0.501 * scale.max()
                assert np.abs(rounded[name].astype(int)).max() == 127

    def test_the_whole_network(self) -> None:
        """fp32 turns a level that lies between two, in which float64 is the other way, now and then; most logits are equal to
        rounding, and none is far."""
        model = made("as it comes")
        model.net.float()
        int8 = model.quantized()
        asked = prompt(int8, 7)
        for depth in EXITS:
            ours = int8.logits(asked.ids, depth, asked.images).double().numpy()
            expected = reference.logits(asked.ids, arrays(int8), plain(int8), depth, asked.patches)
            away = np.abs(ours - expected).max(-1) / np.abs(expected).max()
            assert np.median(away) < 2e-3 and away.max() < 0.1, away


def test_weights_begin_at_the_documented_scale() -> None:
    """What goes back into the residual stream is smaller by sqrt(2L); five standard errors of an estimate from n numbers."""
    config = dataclasses.replace(presets.get("test").model, layers=8)
    for name, p in Net(config).init_(1).named_parameters():
        if p.dim() < 2:
            continue
        fan_in = p.shape[1]
        expected = 0.8 / math.sqrt(fan_in)
        if name == "embed.weight" or name.endswith("_embed"):
            expected = 0.02
        elif name == "patch_in.weight":
            expected = 1 / math.sqrt(fan_in)
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            expected /= math.sqrt(16)
        assert abs(float(p.detach().std()) / expected - 1) < 5 / math.sqrt(2 * p.numel()), name
        assert abs(float(p.detach().mean())) < 5 * expected / math.sqrt(p.numel()), name
