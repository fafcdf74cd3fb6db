"""Configurations drawn at random, of every family: an import says what transformers says of the same files, or is refused in a
line. Forms that no published checkpoint has are drawn too: they were imported, and said something else."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model
from shoal.errors import CheckpointError
from shoal.open_weights import families
from shoal.open_weights.convert import import_model
from tests.extra import package
from tests.unit.open_weights.conftest import DATA

LENGTH, VOCAB, DRAWN = 40, 288, 24
QWEN = ("Qwen2", "Qwen3", "SmolLM3")
NAMES = sorted(name.removesuffix("ForCausalLM") for name in families.FAMILIES)


def drawn(kind: str, seed: int) -> dict[str, Any]:
    """A config.json. `...` draws nothing, so that the family's default counts."""
    draw = random.Random(f"{kind} {seed}")

    def one(*values: Any) -> Any:
        return draw.choice(values)

    heads, layers, length = one(2, 4), one(4, 5, 6), one(64, 96)
    width = heads * one(8, 12)
    dims = ... if kind == "Phi3" else one(8, 16) if kind in ("Qwen3", "Mistral") else one(..., 8, 16)
    told: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": one(1, 2, heads),
        "head_dim": dims,
        "max_position_embeddings": length,
        "rms_norm_eps": one(..., 1e-5, 0.1),
        "hidden_act": one(..., *["silu"] * 20, "gelu"),
        "tie_word_embeddings": one(..., True, False),
        "attention_bias": one(*[...] * 8, False, kind in ("Llama", "SmolLM3")),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    told |= rope(draw, kind, width // heads if dims is ... else dims, length)
    told |= {"sliding_window": one(..., None, 5, 12, 12, 12, 200)}
    if kind in QWEN:
        told |= {"use_sliding_window": one(..., True, True, True, False), "max_window_layers": one(..., 0, 2, layers)}
    if one(*[False] * (4 if kind in (*QWEN, "Mistral") else 16), True):
        told["layer_types"] = [one("full_attention", "sliding_attention") for _ in range(layers)]
    if kind == "SmolLM3" or not draw.randrange(20):
        told |= {"no_rope_layer_interval": one(..., 1, 2, 3)}
        told |= {"no_rope_layers": one(..., ..., [draw.randrange(2) for _ in range(layers + one(0, 0, 1))])}
    return {key: value for key, value in told.items() if value is not ...}


def rope(draw: random.Random, kind: str, head_dim: int, length: int) -> dict[str, Any]:
    """What a config.json says of positions, in the older or the newer form."""
    theta, original = draw.choice((300.0, 7000.0, ...)[: 2 + (kind != "Mistral")]), draw.choice((16, 48))
    share = draw.choice((..., 0.5)) if kind == "Phi3" else draw.choice([...] * 30 + [0.5])
    pairs = int(head_dim * (1.0 if share is ... else share)) // 2
    turns = {
        "default": {},
        "linear": {"factor": 3.0},
        "dynamic": {"factor": 2.0},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": draw.choice(
            ({}, {"attention_factor": 0.8}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"truncate": False})
        ),
        "longrope": {
            "short_factor": [1.0 + n / 4 for n in range(pairs)],
            "long_factor": [2.0 + n for n in range(pairs)],
        },
    }
    name = draw.choice((*turns, "default", "longrope") if kind != "Phi3" else ("default", "longrope", "longrope", "su"))
    inner = dict(turns.get(name, turns["longrope"]))
    if name in ("yarn", "llama3", "longrope", "su"):
        inner |= {"original_max_position_embeddings": original}
    if name == "yarn":
        inner |= {"factor": 4.0, "beta_fast": draw.choice((2, 32))}
    told: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": share}
    if kind == "Phi3":
        told["original_max_position_embeddings"] = draw.choice((..., 48))
    if draw.randrange(2):
        named = {} if name == "default" else {draw.choice(("type", "rope_type")): name, **inner}
        told["rope_scaling"] = named or None
    else:
        own = {"rope_type": name, **inner}
        told = {
            **told,
            "rope_theta": ...,
            "rope_parameters": {**own, **({} if theta is ... else {"rope_theta": theta})},
        }
        if kind != "Phi3" and not draw.randrange(6):  # both forms: one counts
            told["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    return told


def written(folder: Path, told: dict[str, Any], seed: int) -> Any:
    """A checkpoint of random weights with the configuration `told`, and transformers' model of it."""
    transformers = package("transformers")
    shutil.copytree(DATA / "tokenizer", folder)
    (folder / "config.json").write_text(json.dumps(told))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():  # wide, so that each setting shows
        noise = torch.empty(p.shape).normal_(generator=generator)
        p.data.copy_(1 + 0.2 * noise if p.dim() < 2 else 1.2 * noise / p.shape[1] ** 0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(told))  # as it was, not as transformers has it
    return model.double()


@pytest.mark.parametrize("kind", NAMES)
def test_a_drawn_configuration_says_what_transformers_says_or_is_refused(kind: str, tmp_path: Path) -> None:
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    refused, odd = list[str](), list[str]()
    for seed in range(DRAWN):
        told, source = drawn(kind, seed), tmp_path / f"{seed}"
        theirs = written(source, told, seed)
        try:
            import_model(source, tmp_path / "model", dtype="float32")
        except CheckpointError as error:
            refused.append(f"{seed}: {error}")
            continue
        ours = Model.load(tmp_path / "model")
        shutil.rmtree(tmp_path / "model")
        ours.net.double()
        cut = tokens[: ours.config.context]
        try:
            with torch.no_grad():
                wanted = theirs(cut[None]).logits[0]
            off = float((ours.logits(cut) - wanted).abs().max() / wanted.abs().max())
        except TypeError:  # windows of no size, which theirs cannot run
            off = math.inf
        if not off < 2e-5:
            odd.append(f"{seed}: off by {off:.1e}: {told}")
    assert not odd, "\n".join(odd)
    assert len(refused) <= DRAWN // 2, refused
