"""The engine on a CUDA device: the same code, and the same answers as on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.model.gpu import launch

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


@pytest.mark.parametrize("limits", [{}, {"units": 60, "max_batch": 6}, {"max_batch": 3, "max_batch_tokens": 11}])
def test_answers_are_those_of_the_cpu(limits: dict[str, int]) -> None:
    """float64, so that they must be equal; the pool on the device, small pools and chunks included."""
    answers = []
    for device in ("cpu", DEVICE):
        model = Model.from_preset("test", seed=3, dtype="float64")
        model.to(device)
        engine = Engine(model, **({"units": 400} | limits), speculative_max_batch=8)  # type: ignore[arg-type]
        assert engine.runner.cache.kv.device.type == device
        answers.append(engine.generate(requests()))
        engine.scheduler.check_integrity()
        graphed = device == "cuda" and launch.able(model.device)
        assert (engine.runner.graphs is not None) == graphed, "a device that refuses to record goes on without a word"
        assert engine.stats()["kv_cache_usage_perc"] == 0
    for on_cpu, on_gpu in zip(*answers, strict=True):
        assert on_gpu.tokens == on_cpu.tokens
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
