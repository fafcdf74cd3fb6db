"""Everything of a model and of an engine lies on one device: held with a GPU that is pretended (`tests/pretend_gpu.py`)."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shoal import Engine, Model, Request, Sampling
from shoal.engine import engine
from shoal.engine.events import Guide
from shoal.errors import ConfigError
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.model import int8
from shoal.model.adapters import product
from shoal.model.block import Attention
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.paged import paged_attention, write_kv
from shoal.model.router import Router
from tests.pretend_gpu import OnGpu, pretended


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


@pytest.mark.drill
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


def test_fp32_is_multiplied_in_tf32_there_but_the_router_s() -> None:
    """What it predicts is held against bounds of predictions that a CPU has made."""
    x = torch.randn(4, 2 * model_of("fp32").config.width + 3, generator=torch.Generator().manual_seed(0))
    router = model_of("fp32").router
    assert router is not None
    want = router(x)
    with pretended() as gpu:
        router = model_of("fp32").on_gpu("float32").router
        moved = x.to(gpu)
        assert router is not None
        product, got = moved @ moved.T, router(moved)
    assert (product.held - x @ x.T).abs().max() > 1e-3, "what is fp32 is"
    for mine, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(mine.held, wanted, rtol=0, atol=1e-6)


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
    launch._tried.cache_clear()
    try:
        with pretended() as gpu:
            engine = Engine(model_of("fp32").to(gpu), units=200, max_batch_tokens=48)
            asked = [Request([40 + i] * 20, Sampling(temperature=0, max_tokens=2)) for i in range(2)]
            assert all(answer.tokens for answer in engine.generate(asked))
    finally:
        launch._tried.cache_clear()
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


def refusal(said: str = "out of resource: shared memory, Required: 131072, Hardware limit: 101376") -> Exception:
    """As of Triton where a kernel asks for more than a device has."""
    return type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})(said)


@pytest.fixture
def some_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """Norms and activations of a pretended GPU are kernels, which raise the last of what is in the list, if anything is."""
    faults = list[Exception]()

    def paged(self: Attention, x: Tensor, step: Any, rope: Any, kv: Tensor, summaries: Tensor) -> Tensor:
        q, k, v = self.project(x, rope, step.beside)
        write_kv(k, v, kv, summaries, step)
        return product(self.out, paged_attention(q, kv, summaries, step, self.reach()).flatten(-2), step.beside)

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if faults and x.shape != (1, 16):  # that is what `able` tries
            raise faults[-1]
        return F.rms_norm(x, weight.shape, weight, eps)

    monkeypatch.setattr(fused, "usable", lambda x: False)  # what a CPU compiles is no part of it
    monkeypatch.setattr(fused, "few", lambda rows: False)
    monkeypatch.setattr(Attention, "paged", paged)
    monkeypatch.setattr(launch, "attends", lambda *_: False)
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def thin(x: Tensor, a: Tensor, b: Tensor, bounds: Tensor, room: int, of: Tensor, out: Tensor) -> None:
        for row, k in enumerate(of.tolist()):
            own = slice(*bounds[:, k].tolist()) if k >= 0 else slice(0)
            out[row : row + 1] += x[row : row + 1] @ a[own].T @ b[own]

    monkeypatch.setattr(launch, "rms_norm", norm)
    monkeypatch.setattr(launch, "add_thin", thin)
    monkeypatch.setattr(launch, "add_norm", lambda x, more, weight, eps: (x + more, norm(x + more, weight, eps)))
    monkeypatch.setattr(launch, "swiglu", lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1])
    launch._tried.cache_clear()
    yield faults
    launch.GIVEN_UP.clear()
    launch._tried.cache_clear()


@pytest.mark.parametrize("when", ["loading", "serving", "never"])
def test_a_kernel_that_does_not_fit_the_device_ends_nothing(
    when: str, some_kernels: list[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a model is loaded, before sizes follow from the kernels, or in a step: all is answered by torch's operators, and
    told in one line."""
    asked = [Request([40 + i] * 20, Sampling(temperature=0, max_tokens=3), depth="full") for i in range(2)]
    want = [done.tokens for done in Engine(model_of("fp32"), units=200).generate(asked)]
    caplog.set_level(logging.WARNING)
    sized = list[bool]()

    def rows(_: Any, device: torch.device, *__: Any) -> int:
        sized.append(launch.able(device))
        return 48 if sized[-1] else 43

    monkeypatch.setattr(engine, "default_rows", rows)
    with pretended() as gpu:
        some_kernels += [refusal()] * (when == "loading")
        made = Engine(model_of("fp32").to(gpu), units=200)
        some_kernels += [refusal()] * (when == "serving")
        assert [done.tokens for done in made.generate(asked)] == want
        assert sized == {"loading": [False], "serving": [True, False], "never": [True]}[when]
        assert made.scheduler.max_batch_tokens == (48 if when == "never" else 43)
        assert launch.able(gpu) == (when == "never")
    said = "decoding and training on cuda:0 go on without Triton's kernels: out of resource: shared memory"
    assert [record.getMessage().startswith(said) for record in caplog.records] == [True] * (when != "never")
