"""The engine on a CUDA device: the same code, and the same answers as on the CPU. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Guide
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.model.adapters import Adapter, Pair, kept
from shoal.model.gpu import launch
from shoal.model.router import Router
from tests.adapters import linears

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),  # kernels of each shape are compiled first
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def requests() -> list[Request]:
    sampling = [
        Sampling(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3),
        Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=5, max_tokens=24, ignore_eos=True, frequency_penalty=0.5),
        Sampling(temperature=0, max_tokens=24, ignore_eos=True, speculative=3, prompt_logprobs=0),
    ]
    return [
        Request(
            [50 + i, *range(60, 60 + 7 * i)], sampling[i % 3], depth=("shallow", "middle", "full")[i % 3], id=str(i)
        )
        for i in range(9)
    ]


def model_of(dtype: str) -> Model:
    """With a router whose predictions differ much between prompts."""
    model = Model.from_preset("test", seed=3, dtype="float32" if dtype == "int8" else dtype)
    model = model.quantized() if dtype == "int8" else model
    torch.manual_seed(0)
    model.router = Router(model.config).requires_grad_(False)
    model.router.quantile.weight.mul_(30)
    model.router.calibration.thresholds = [(0.05, 0.0)]
    return model


def others(engine: Engine) -> list[Request]:
    """What takes a way of its own: the router, an image, a guided answer, and two adapters, which are loaded."""
    asked, greedy = list[Request](), Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    for seed in (1, 2):
        draw, pairs = torch.Generator().manual_seed(seed), dict[str, Pair]()
        for name, linear in linears(engine.model).items():
            sizes: list[int] = [*linear.weight.shape]  # type: ignore[union-attr,list-item]
            a, b = (torch.randn(3, size, generator=draw) / sizes[1] ** 0.5 for size in reversed(sizes))
            pairs[name] = kept(linear, a.to(engine.model.device), b.to(engine.model.device))
        named = engine.load_adapter(Adapter(f"adapter {seed}", pairs))
        asked += [Request([80 + i, 70, 60], greedy, depth="full", adapter=named) for i in range(2)]
    asked += [Request([90 + 5 * i, *range(60, 60 + 9 * i)], greedy, depth="auto") for i in range(5)]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image = to_patches(picture, engine.config)
    asked.append(Request(Encoded([*image.tokens(), 70, 71], [image]), greedy, depth="full"))
    return [*asked, Request([70, 71], Sampling(temperature=0, guided=Guide("choice", ["yes", "no"])), depth="full")]


@pytest.mark.parametrize("limits", [{}, {"units": 60, "max_batch": 6}, {"max_batch": 3, "max_batch_tokens": 11}])
def test_answers_are_those_of_the_cpu(limits: dict[str, int]) -> None:
    """float64, so that they must be equal; the pool on the device, small pools and chunks included."""
    answers = []
    for device in ("cpu", DEVICE):
        model = model_of("float64")
        model.to(device)
        engine = Engine(model, **({"units": 400} | limits), speculative_max_batch=8)  # type: ignore[arg-type]
        assert engine.runner.cache.kv.device.type == device
        answers.append(engine.generate([*requests(), *others(engine)]))
        engine.scheduler.check_integrity()
        graphed = device == "cuda" and launch.able(model.device)
        assert (engine.runner.graphs is not None) == graphed, "a device that refuses to record goes on without a word"
        assert engine.stats()["kv_cache_usage_perc"] == 0
    assert len({answer.depth for answer in answers[0][-7:-2]}) > 1, "all that the router decides go the same way"
    for on_cpu, on_gpu in zip(*answers, strict=True):
        assert (on_gpu.tokens, on_gpu.depth) == (on_cpu.tokens, on_cpu.depth)
        for a, b in zip(on_cpu.logprobs, on_gpu.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-9)


def test_bfloat16_stays_near_float32() -> None:
    """Statistical, as it must be: most greedy first tokens agree on a model that is not flat."""
    said = []
    for dtype in ("float32", "bfloat16"):
        model = Model.from_preset("test", seed=3, dtype=dtype)
        model.to(DEVICE)
        asked = [Request([40 + i, 50, 60], Sampling(temperature=0, max_tokens=1, ignore_eos=True)) for i in range(64)]
        said.append([answer.tokens[0] for answer in Engine(model, units=400).generate(asked)])
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 0.9 * len(said[0])


@pytest.mark.parametrize("dtype", ["auto", "float32", "int8"])
def test_what_is_served_stays_near_what_a_cpu_says(dtype: str) -> None:
    """A whole engine as a replica makes it, by `on_gpu`: in bf16, in fp32 by the kernels of TF32, and in INT8. Most first
    tokens agree."""
    said = []
    for served in (False, True):
        model = model_of("int8" if dtype == "int8" else "float32")
        if served:
            model.on_gpu("auto" if dtype == "int8" else dtype)  # type: ignore[arg-type]
            wide = launch._precision(torch.zeros(1, device=DEVICE))
            assert wide == ("tf32" if DEVICE == "cuda" else "wide")
        engine = Engine(model, units=400)
        asked = [Request([40 + i, 50, 60], Sampling(temperature=0, max_tokens=2, ignore_eos=True)) for i in range(32)]
        answers = engine.generate([*asked, *others(engine)])
        assert not [answer.finished for answer in answers if answer.finish_reason == "error"]
        assert answers[-1].text in ("yes", "no")
        said.append([answer.tokens[0] for answer in answers])
    assert sum(a == b for a, b in zip(*said, strict=True)) >= 0.85 * len(said[0])
