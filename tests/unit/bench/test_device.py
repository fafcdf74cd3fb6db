"""`shoal bench decode --device cuda` without a GPU: what a step must read in closed form, and that it says what it lacks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

from shoal import presets
from shoal.bench.commands import bench
from shoal.bench.device import bytes_of_step, model_of, step_seconds
from shoal.config import ModelConfig
from shoal.errors import ResourceError, UsageError
from shoal.model.net import Net

# w 32, S 4, K 3, two KV heads of 16 numbers; summaries are the means of keys
SHAPE = ModelConfig(
    vocab=300, layers=4, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, train_length=4096, window=32, block=4, page=16,
    top_k=3, patch=4, image_size=12,
)  # fmt: skip
PAIR = 2 * 16  # numbers of a key and its value


def attention(config: ModelConfig, length: int, each: int) -> int:
    """Bytes a request, beside the weights."""
    return bytes_of_step(config, 1, length, each) - bytes_of_step(config, 0, length, each)


def test_each_weight_of_layers_and_head_is_read_once() -> None:
    """Of a table that is not tied the head alone; nothing of images, nor of other exits."""
    for tied in (True, False):
        config = dataclasses.replace(SHAPE, tied=tied)
        net = Net(config)
        layers = sum(p.numel() for name, p in net.named_parameters() if name.startswith("groups."))
        assert bytes_of_step(config, 0, 100, 2) == 2 * (layers + 300 * 64 + 64)
        assert bytes_of_step(config, 7, 100, 2) - bytes_of_step(config, 0, 100, 2) == 7 * attention(config, 100, 2)


@pytest.mark.parametrize("each", [2, 4])
def test_attention_reads_what_its_layers_read(each: int) -> None:
    """Four layers of each kind, two KV heads, by hand."""
    heads = 4 * 2
    kind = {name: dataclasses.replace(SHAPE, attn_pattern=name, dense_length=64 * (name == "S")) for name in "LDHS"}
    assert attention(kind["L"], 20, each) == heads * 20 * PAIR * each
    assert attention(kind["L"], 4000, each) == heads * 32 * PAIR * each
    assert attention(kind["D"], 4000, each) == heads * 4000 * PAIR * each
    # 10 tokens: two blocks, no more than are read, so that no summary is; each token counts once
    assert attention(kind["H"], 10, each) == heads * 10 * PAIR * each
    # 4,001 tokens: the window, three blocks, a tail of one; 1,000 means of 16 numbers in fp32
    assert attention(kind["H"], 4001, each) == heads * ((32 + 12 + 1) * PAIR * each + 1000 * 16 * 4)
    variance = dataclasses.replace(kind["H"], summary="mean_var")
    assert attention(variance, 4001, each) == heads * ((32 + 12 + 1) * PAIR * each + 1000 * 32 * 4)
    assert attention(kind["S"], 64, each) == heads * 64 * PAIR * each
    # of 4,000 tokens 3,968 stand before the window, in 992 blocks
    assert attention(kind["S"], 4000, each) == heads * ((32 + 12) * PAIR * each + 992 * 16 * 4)


def test_a_context_of_32k_reads_little_more_than_one_of_1k() -> None:
    """What the aim of 1.3 times rests on: at batch 1, and of the 1b preset."""
    config = presets.get("1b").model
    assert bytes_of_step(config, 1, 32768) < 1.02 * bytes_of_step(config, 1, 1024)


def test_a_step_is_taken_as_an_engine_takes_it() -> None:
    model = model_of(presets.get("test").model, torch.device("cpu"))
    assert step_seconds(model, 2, 40, rounds=1) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    lacking = CliRunner().invoke(bench, ["decode", "--device", "cuda"]).exception
    assert isinstance(lacking, ResourceError)
    said = str(lacking)
    assert "no CUDA device here" in said and said.endswith("run it on a machine with a GPU, or with --device cpu")
    assert said.count("\n") == 0
    wrong = CliRunner().invoke(bench, ["decode", "--device", "tpu"]).exception
    assert isinstance(wrong, UsageError) and "cpu" in str(wrong)
