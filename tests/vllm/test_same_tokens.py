"""A Shoal model gives the same tokens in vLLM as in our own engine, wherever the two likeliest are not a rounding apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Completion
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.inputs.tokenizer import ASSISTANT_ID, SPECIAL, USER_ID
from shoal.vllm_plugin.images import as_image, collapsed

ANSWER = 16  # tokens
MARGIN = 1e-3  # nats between the two likeliest tokens: below it, either is right
Prompt = Encoded
Vllm = Callable[..., Any]


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[Prompt]:
    """Shorter and longer than window + K S = 32 tokens, many with a beginning in common; three with images."""
    draw = random.Random(0)

    def text(tokens: int) -> list[int]:
        return [draw.randrange(len(SPECIAL), len(model.tokenizer)) for _ in range(tokens)]

    shared = text(300)
    found = [Encoded(shared[:n]) for n in (5, 17, 33, 64, 100, 129, 200, 300)]
    found += [Encoded(text(n)) for n in (7, 48, 111, 250)] + [Encoded(shared[:160] + text(60))]
    pixels = np.random.default_rng(0)
    for rows, cols in ((3, 3), (2, 3), (3, 1)):
        values = pixels.integers(0, 256, (rows * cols, model.config.patch_values), dtype=np.uint8)
        image = Patches(values, rows, cols)
        found.append(Encoded([USER_ID, *shared[:40], *image.tokens(), *shared[:20], ASSISTANT_ID], [image]))
    return found


def ours(model: Model, prompts: Sequence[Prompt], depths: Sequence[str]) -> list[Completion]:
    sampling = Sampling(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=2)
    return Engine(model).generate([Request(p, sampling, depth=d) for p, d in zip(prompts, depths, strict=True)])


def theirs(
    model: Model, engine: Any, prompts: Sequence[Prompt], depths: Sequence[str] | None = None, logprobs: int = 2
) -> list[Any]:
    asked, params = [], []
    for index, prompt in enumerate(prompts):
        given: dict[str, Any] = {"prompt_token_ids": collapsed(prompt.ids) if prompt.images else prompt.ids}
        if prompt.images:
            given["multi_modal_data"] = {"image": [as_image(image, model.config) for image in prompt.images]}
        depth = None
        if depths is not None:
            depth = {"depth": depths[index]}
            given["cache_salt"] = depths[index]
        asked.append(given)
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=ANSWER,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
                extra_args=depth,
            )
        )
    return list(engine.generate(asked, params, use_tqdm=False))


def assert_same(expected: Sequence[Completion], got: Sequence[Any], *, within: float = 1e-4) -> None:
    """Token for token, up to the first place where the two likeliest are within `MARGIN`; logprobs agree `within` nats."""
    compared = 0
    for number, (one, other) in enumerate(zip(expected, got, strict=True)):
        answer = other.outputs[0]
        assert len(answer.token_ids) == len(one.tokens) == ANSWER
        for at, entry in enumerate(one.logprobs):
            if entry.top[0][1] - entry.top[1][1] < MARGIN:
                break
            assert answer.token_ids[at] == entry.token, f"prompt {number}, token {at}"
            assert abs(answer.logprobs[at][entry.token].logprob - entry.logprob) < within, (
                f"prompt {number}, token {at}"
            )
            compared += 1
    assert compared > 0.75 * ANSWER * len(expected), "the check must not be empty"


def test_chunked_batched_cached_and_with_images(
    model: Model, directory: Path, prompts: list[Prompt], vllm: Vllm
) -> None:
    """Chunks of at most 64 tokens beside requests that decode; the second round reads its prompts out of the prefix cache. Then
    the same tokens with other pixels, one after the other: the second is not answered from the first one's pages."""
    expected = ours(model, prompts, ["full"] * len(prompts))
    engine = vllm(directory, max_num_batched_tokens=64)
    for again in range(2):
        got = theirs(model, engine, prompts)
        assert [list(other.prompt_token_ids) for other in got] == [prompt.ids for prompt in prompts]
        assert_same(expected, got)
        cached = sum(other.num_cached_tokens for other in got)
        assert cached > (0.8 if again else 0.1) * sum(len(prompt.ids) for prompt in prompts)
    rng = np.random.default_rng(1)
    images = [Patches(rng.integers(0, 256, (9, model.config.patch_values), dtype=np.uint8), 3, 3) for _ in range(2)]
    for image in images:
        prompt = Encoded([USER_ID, *image.tokens(), *range(20, 60), ASSISTANT_ID], [image])
        assert_same(ours(model, [prompt], ["full"]), theirs(model, engine, [prompt]))


def test_whole_prompts_in_one_chunk_and_preemption(
    model: Model, directory: Path, prompts: list[Prompt], vllm: Vllm
) -> None:
    """So few pages that requests are preempted, and computed again; texts and images."""
    engine = vllm(
        directory, max_num_batched_tokens=2048, num_gpu_blocks_override=40, max_model_len=512, disable_log_stats=False
    )
    assert_same(ours(model, prompts, ["full"] * len(prompts)), theirs(model, engine, prompts))
    preempted = [m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
    assert sum(preempted) > 0


def test_each_request_runs_to_its_own_depth(model: Model, directory: Path, prompts: list[Prompt], vllm: Vllm) -> None:
    """Depths mixed in every step, twice: a shallow request's pages are not a deep one's."""
    engine = vllm(directory, max_num_batched_tokens=64, hf_overrides={"depth": "per-request", "salted": True})
    names = [*model.config.exit_names]
    for shift in range(2):
        depths = [names[(index + shift) % len(names)] for index in range(len(prompts))]
        assert_same(ours(model, prompts, depths), theirs(model, engine, prompts, depths))
    with pytest.raises(VLLMValidationError, match=r"depth: got 'deepest'; allowed: shallow"):
        theirs(model, engine, prompts[:1], ["deepest"])


def test_a_deployment_of_fixed_depth_holds_no_deeper_layer(
    model: Model, directory: Path, prompts: list[Prompt], vllm: Vllm
) -> None:
    """And without a prefix cache, which the other deployments here have."""
    engine = vllm(directory, max_num_batched_tokens=256, hf_overrides={"depth": "shallow"}, enable_prefix_caching=False)
    for _ in range(2):
        got = theirs(model, engine, prompts)
        assert not any(other.num_cached_tokens for other in got)
        assert_same(ours(model, prompts, ["shallow"] * len(prompts)), got)
    cached = engine.llm_engine.vllm_config.compilation_config.static_forward_context
    assert len(cached) == model.config.exits[0]


def test_int8_weights_run_in_vllm_s_own_kernels(
    model: Model, prompts: list[Prompt], vllm: Vllm, tmp_path: Path
) -> None:
    """Close, and not equal: vLLM rounds activations to 8 bits, and the head's not at all; our kernels round to 7 (decision
    0003). By how likely each finds a token, and not by its rank: of random weights many are nearly as likely as the first."""
    int8 = model.quantized()
    int8.save(tmp_path / "int8")
    engine = vllm(tmp_path / "int8", max_num_batched_tokens=256)
    layer = engine.llm_engine.model_executor.driver_worker.worker.get_model().groups[0].blocks[0].attention.qkv
    assert type(layer.quant_method).__name__ == "CompressedTensorsLinearMethod"
    text = [prompt for prompt in prompts if not prompt.images]
    expected, got = ours(int8, text, ["full"] * len(text)), theirs(model, engine, text, logprobs=20)
    pairs = [(one.logprobs[0], other.outputs[0].logprobs[0]) for one, other in zip(expected, got, strict=True)]
    first = [abs(found[entry.token].logprob - entry.logprob) for entry, found in pairs if entry.token in found]
    assert len(first) == len(text), "the likeliest token is among vLLM's twenty likeliest"
    assert float(np.mean(first)) < 0.1, "nats"
