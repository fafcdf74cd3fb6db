"""What of the plugin does not need vLLM: routing before admission, and saying that vLLM is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.api.serve_args import ServeArgs
from shoal.errors import ConfigError, RequestError
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.model.router import Calibration, Router
from shoal.vllm_plugin import options
from shoal.vllm_plugin.route import Forerunner, asked
from tests.pretend_gpu import pretended


def test_a_prompt_is_routed_before_admission_as_our_engine_routes_it(tmp_path: Path) -> None:
    """Over prompts with and without an image, and over tolerances that reach every exit."""
    model = Model.from_preset("test", seed=3)
    torch.manual_seed(0)
    model.router = Router(model.config).requires_grad_(False)
    tolerances = [0.01 * step for step in range(1, 40)]
    model.router.calibration = Calibration(thresholds=[(t, 8 * (t - 0.2)) for t in tolerances])
    model.save(tmp_path / "m")
    forerunner = Forerunner.load(tmp_path / "m")
    assert forerunner is not None
    rng = np.random.default_rng(0)
    prompts = [Encoded(rng.integers(9, 265, size).tolist()) for size in (3, 8, 21, 60)]
    image = Patches(rng.integers(0, 256, (6, model.config.patch_values), dtype=np.uint8), 2, 3)
    prompts.append(Encoded([20, *image.tokens(), 21, 22], [image]))
    asked = [
        Request(prompt, Sampling(temperature=0, max_tokens=1), depth="auto", quality_tolerance=tolerance)
        for prompt in prompts
        for tolerance in tolerances[::4]
    ]
    ours = [done.depth for done in Engine(model).generate(asked)]
    assert len(set(ours)) > 1, "the tolerances must reach several exits"
    assert [forerunner(prompt, request) for request in asked for prompt in [request.prompt]] == ours  # type: ignore[arg-type]


def test_a_deployment_of_one_depth_refuses_others_and_what_it_cannot_keep() -> None:
    """At an early exit nobody knows what an answer of depth "auto" loses: a tolerance, be it 0, was taken, and not kept."""
    shape = presets.get("test").model
    shallow, middle, full = shape.exits

    def layers(fixed: int | None, depth: str | int, tolerance: float | None = None) -> int | None:
        return asked(shape, Request([20], depth=depth, quality_tolerance=tolerance), fixed)

    assert [layers(None, depth, 0.1) for depth in ("auto", "middle", full)] == [None, middle, full], "each its own"
    assert layers(middle, "auto") == layers(middle, "middle", 0.0) == layers(middle, middle, 0.1) == middle
    assert layers(full, "auto", 0.0) == layers(full, "auto") == full, "which loses nothing"
    for tolerance in (0.0, 0.1):
        with pytest.raises(RequestError, match="leave it out: this deployment runs 1 of 4 layers") as refused:
            layers(shallow, "auto", tolerance)
        assert refused.value.param == "quality_tolerance"
    with pytest.raises(RequestError, match="depth: got 'full'; allowed: the depth that this deployment fixes"):
        layers(middle, "full")


def test_where_there_is_a_gpu_a_prompt_is_routed_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group and the router alone, in bf16 as vLLM, the router in fp32; pretended (`tests/pretend_gpu.py`)."""
    model = Model.from_preset("test", seed=3)
    torch.manual_seed(0)
    model.router = Router(model.config).requires_grad_(False)
    model.router.quantile.bias.copy_(torch.tensor([5.0, -5.0]))  # nats: so far apart that no rounding decides
    model.router.calibration = Calibration(thresholds=[(0.01, 0.0)])
    model.save(tmp_path / "m")
    image = Patches(np.zeros((6, model.config.patch_values), dtype=np.uint8), 2, 3)
    with pretended() as gpu:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        forerunner = Forerunner.load(tmp_path / "m")
        monkeypatch.undo()
        assert forerunner is not None and len(forerunner.net.groups) == 1
        assert forerunner.net.device == gpu and forerunner.net.dtype == torch.bfloat16
        assert {p.dtype for p in forerunner.router.parameters()} == {torch.float32}
        for prompt in (Encoded([*range(30, 60)]), Encoded([20, *image.tokens(), 21], [image])):
            assert forerunner(prompt, Request(prompt, Sampling(), depth="auto")) == model.config.exits[1]


def test_a_model_without_a_router_has_no_forerunner(tmp_path: Path) -> None:
    Model.from_preset("test").save(tmp_path / "m")
    assert Forerunner.load(tmp_path / "m") is None


def test_a_missing_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"args\.engine: got 'vllm'; allowed: shoal where .* pip install"):
        options.check({})


@pytest.mark.parametrize(("gpu", "given", "dtype"), [
    (True, {}, "bfloat16"), (False, {}, "float32"), (True, {"dtype": "float32"}, "float32"),
])  # fmt: skip
def test_a_shoal_model_is_served_in_bf16_where_there_is_a_gpu(
    gpu: bool, given: dict[str, str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the options that vLLM is given; somebody else's checkpoint says its precision itself."""
    monkeypatch.setattr(options, "check", lambda given: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(AsyncEngineArgs=SimpleNamespace))
    assert options.engine_args("m", given, max_batch=2, threads=1, shoal=True).dtype == dtype
    other = options.engine_args("m", {}, max_batch=2, threads=1, shoal=False)
    assert not hasattr(other, "dtype") and not hasattr(other, "hf_overrides")


def test_options_of_one_engine_are_refused_with_the_other() -> None:
    with pytest.raises(ConfigError, match=r"args\.vllm: set args\.engine to vllm"):
        ServeArgs(model="m", vllm={"dtype": "float32"})
    with pytest.raises(ConfigError, match=r"args\.precision: got 'auto'; allowed: stored"):
        ServeArgs(model="m", engine="vllm", precision="auto")
    with pytest.raises(
        ConfigError, match=r"args\.kv_cache_dtype: got 'int8'; allowed: auto, where args\.engine is vllm"
    ):
        ServeArgs(model="m", engine="vllm", kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match=r"args\.engine: got 'sglang'; allowed: shoal, vllm"):
        from shoal import config

        config.load(ServeArgs, {"engine": "sglang"}, "args")
