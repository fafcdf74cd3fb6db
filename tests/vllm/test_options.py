"""What a deployment cannot be is refused before an engine process starts, by name and in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import AsyncEngineArgs
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

from shoal.errors import ConfigError
from shoal.on_ray.serve_config import load_serve_config
from shoal.vllm_plugin import options, register, settings
from shoal.vllm_plugin.depths import NAME

FOLDER = Path(__file__).parents[2] / "serve_configs"


def configured(directory: Path, **given: Any) -> Any:
    return AsyncEngineArgs(model=str(directory), dtype="float32", enforce_eager=True, **given).create_engine_config()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
        ({"block_size": 18}, r"block_size .*multiple of the model's select block \(4\)"),
        ({"tensor_parallel_size": 4, "distributed_executor_backend": "mp"}, r"tensor_parallel_size .*K/V heads \(2\)"),
        ({"hf_overrides": {"depth": "per-request"}}, "enable_prefix_caching .*cache_salt"),
        ({"hf_overrides": {"depth": "deepest"}}, "depth: got 'deepest'; allowed: shallow, middle, full"),
    ],
)
def test_what_a_shoal_model_cannot_be_served_with_is_named(directory: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says) as caught:
        configured(directory, **given)
    assert "Shoal" in str(caught.value) or "depth" in str(caught.value)


def test_depth_per_request_has_the_runner_that_tells_who_stands_where(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU vLLM takes its second runner where nothing is said: that one refuses `Depths`. One depth has either."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    assert configured(directory).use_v2_model_runner
    with pytest.raises(ValueError, match="Depths is not a subclass"):
        build_custom_logits_processors_params_validator([NAME])
    each = {"depth": "per-request", "salted": True}
    assert not configured(directory, hf_overrides=each).use_v2_model_runner
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(
        Exception, match=r"VLLM_USE_V2_MODEL_RUNNER with a Shoal model: allowed: 0 with depth per-request"
    ):
        configured(directory, hf_overrides=each)


def test_depth_per_request_needs_graphs_to_be_off_where_vllm_has_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(directory, hf_overrides={"depth": "per-request", "salted": True})
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    settings.check(config)
    config.model_config.enforce_eager = False
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    settings.check(config)
    config.compilation_config.cudagraph_mode = None
    with pytest.raises(ConfigError, match=r"cudagraph_mode with a Shoal model: .*--enforce-eager"):
        settings.check(config)


def test_a_model_s_shape_and_defaults_reach_vllm(directory: Path) -> None:
    config = configured(directory)
    assert (config.model_config.max_model_len, config.model_config.get_vocab_size()) == (1024, 300)
    assert config.model_config.hf_config.eos_token_id == 1
    assert configured(directory, hf_overrides={"depth": "middle"}).model_config.hf_config.layers == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_model_length": 100}, r"unknown key args\.vllm\.max_model_length: did you mean 'max_model_len'"),
        ({"max_num_seqs": 4}, r"args\.vllm\.max_num_seqs: .*args\.max_batch"),
    ],
)
def test_a_slip_in_vllm_s_arguments_is_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        options.check(given)


def test_another_minor_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.1")
    monkeypatch.setattr(options, "version", lambda name: "0.33.1")
    for check in (register, options.need_vllm):
        with pytest.raises(ConfigError, match=r"vLLM: got '0\.33\.1'; allowed: 0\.32\.\*; pip install"):
            check()


@pytest.mark.parametrize("name", ["vllm_one_node", "vllm_nodes"])
def test_a_gpu_config_s_arguments_are_vllm_s(llama: Path, name: str) -> None:
    args = load_serve_config(FOLDER / f"{name}.yaml").applications[0].args
    made = options.engine_args(str(llama), args["vllm"], max_batch=args["max_batch"], threads=1, shoal=False)
    assert made.tensor_parallel_size > 1 or made.pipeline_parallel_size > 1
    assert made.max_num_seqs == args["max_batch"]
