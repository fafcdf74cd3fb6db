"""Everything of a model and of an engine lies on one device: held with a GPU that is pretended (`tests/pretend_gpu.py`)."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Guide
from shoal.errors import ConfigError
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.model import int8
from shoal.model.gpu import launch
from shoal.model.router import Router
from tests.pretend_gpu import OnGpu, pretended

PLATFORM = Path(__file__).parents[2] / "platform" / "shoal"


def model_of(precision: str) -> Model:
    model = Model.from_preset("test", seed=3)
    model = model.quantized() if precision == "int8" else model
    torch.manual_seed(0)
    model.router = Router(model.config).requires_grad_(False)
    return model


def requests(model: Model) -> list[Request]:
    """One of each kind that takes a path of its own through runner and sampler."""
    rng = random.Random(0)

    def asked(count: int, depth: str, tolerance: float | None = None, **more: Any) -> Request:
        sampling = Sampling(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, "seed": 1, **more})
        ids = [rng.randrange(20, 260) for _ in range(count)]
        return Request(ids, sampling, depth=depth, quality_tolerance=tolerance)

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image = to_patches(picture, model.config)
    seen = Encoded([*image.tokens(), *model.tokenizer.encode("which?")], [image])
    return [
        asked(40, "auto"),
        asked(70, "auto", 0.2),
        asked(30, "full", speculative=3),
        asked(12, "middle", temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, logprobs=3),
        asked(12, "shallow", temperature=0.7, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.2),
        asked(12, "full", logit_bias={30: 4.0}, prompt_logprobs=2),
        asked(12, "full", guided=Guide("choice", ["yes", "no"]), ignore_eos=False, temperature=0.5),
        Request(seen, Sampling(temperature=0, max_tokens=4, ignore_eos=True), depth="full"),
    ]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_whatever_is_asked_of_an_engine_on_a_gpu_stays_there(precision: str) -> None:
    model = model_of(precision)
    want = [done.tokens for done in Engine(model, units=200, max_batch_tokens=48).generate(requests(model))]
    with pretended() as gpu:
        model = model_of(precision).to(gpu)
        engine = Engine(model, units=200, max_batch_tokens=48)
        got = [done.tokens for done in engine.generate(requests(model))]
    assert got == want


def test_int8_passes_its_self_test_where_torch_multiplies_with_reciprocals() -> None:
    """As it does on a GPU, where every kernel was refused for it: a 63rd of three numbers in four is then off by a bit."""
    with pretended() as gpu:
        x = torch.rand(1000)
        assert (x.to(gpu) / 63).held.ne(x / 63).float().mean() > 0.5  # type: ignore[attr-defined]
        assert int8.self_test(int8.KERNELS["float"], gpu) is None


def test_a_model_moves_with_all_that_it_holds() -> None:
    with pretended() as gpu:
        model = model_of("fp32").to(gpu)
        assert model.router is not None
        held = {**model.net.state_dict(), **model.router.state_dict()}
        assert {tensor.device for tensor in held.values()} == {gpu} == {model.device, model.forbidden().device}


def test_nothing_moves_a_part_of_a_model() -> None:
    """The engine's replicas moved the network alone, and the default request ended the engine."""
    parts = re.compile(r"\b(?:net|router)\.(?:to|cuda)\(")
    found = [path.name for path in PLATFORM.rglob("*.py") for _ in parts.findall(path.read_text(encoding="utf-8"))]
    assert found == ["model.py"] * 3


def test_on_a_gpu_a_model_is_bf16_and_what_decides_is_fp32() -> None:
    """Weights, activations, keys and values in bf16; the router, scores of blocks and logits in fp32; INT8 stays as it is."""
    with pretended():
        model = model_of("fp32").on_gpu()
        engine = Engine(model, units=200, max_batch_tokens=48)
        logits = list[torch.dtype]()
        draw = engine.runner.sampler.sample
        engine.runner.sampler.sample = lambda z, *rest: (logits.append(z.dtype), draw(z, *rest))[1]  # type: ignore[method-assign]
        answers = engine.generate(requests(model))
        assert model.router is not None and {p.dtype for p in model.router.parameters()} == {torch.float32}
        assert {p.dtype for p in model.net.parameters()} == {engine.runner.cache.kv.dtype} == {torch.bfloat16}
        assert engine.runner.cache.summaries.dtype == torch.float32 and set(logits) == {torch.float32}
        assert all(answer.tokens for answer in answers)
        rounded = model_of("int8").on_gpu()
        assert torch.bfloat16 not in {t.dtype for t in rounded.net.state_dict().values()}
        with pytest.raises(ConfigError, match="dtype: got 'bfloat16'; allowed: auto or float32"):
            rounded.on_gpu("bfloat16")


@pytest.mark.parametrize(
    ("capability", "fault", "said"),
    [
        ((9, 0), RuntimeError("Failed to find C compiler.\nPlease specify via CC"), "Failed to find C compiler"),
        ((9, 0), type("OutOfResources", (Exception,), {})("out of resource: shared memory"), "out of resource"),
        ((7, 5), None, "NVIDIA's devices from sm_80 on"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_goes_on_without(
    capability: tuple[int, int],
    fault: Exception | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """torch for CUDA brings Triton, and a slim container no C compiler: each request would end in its error."""

    def norm(x: Tensor, *_: Any) -> Tensor:
        if fault is not None:
            raise fault
        return x

    caplog.set_level(logging.WARNING)  # a command in this process may have set it higher
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.setattr(launch, "rms_norm", norm)
    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch.able.cache_clear()
    try:
        with pretended() as gpu:
            engine = Engine(model_of("fp32").to(gpu), units=200, max_batch_tokens=48)
            asked = [Request([40 + i] * 20, Sampling(temperature=0, max_tokens=2)) for i in range(2)]
            assert all(answer.tokens for answer in engine.generate(asked))
    finally:
        launch.able.cache_clear()
    assert [record.getMessage().count(said) for record in caplog.records] == [1], "told once"


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretended() as gpu:
        there = torch.arange(4, device=gpu)
        assert isinstance(there, OnGpu) and there.device == gpu and (there + 1).tolist() == [1, 2, 3, 4]
        assert (
            not isinstance(there.cpu(), OnGpu) and there[torch.tensor([1])].tolist() == [1] and there.sum().item() == 6
        )
        there[1:2] = 7
        assert there.tolist() == [0, 7, 2, 3]
        for mixed in (lambda: there + torch.ones(4), lambda: torch.cat([there, torch.ones(1)])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
