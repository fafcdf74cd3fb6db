"""A vLLM engine for a replica, from what its serve config says.

Three kinds of directory: a model of our own runs in our layers (`network`), somebody's checkpoint in vLLM's, and one that was
imported in vLLM's as well, as the checkpoint of its family that it came from, or that one of its exits is.
"""

from __future__ import annotations

from typing import Any

from shoal import machine
from shoal.api.served import ServedModel
from shoal.api.stock import StockModel
from shoal.config import FULL
from shoal.vllm_plugin import PER_REQUEST
from shoal.vllm_plugin.exported import depth_of, exported, is_imported, need_context
from shoal.vllm_plugin.options import check, engine_args
from shoal.vllm_plugin.serving import VllmEngine


def start(directory: str, served: ServedModel, args: Any) -> VllmEngine:
    """The engine for `served`, whose checkpoint lies in `directory`; `args`: a serve config's. Raises ConfigError for options
    that vLLM does not have, and for an engine that does not start; as `exported` for an imported model."""
    ours = not isinstance(served, StockModel)
    check(args.vllm)
    if ours and is_imported(directory):
        return _of_its_family(directory, served, args)
    options = _options(directory, args, args.vllm, ours=ours)
    route, layers = None, served.config.layers
    if ours:
        depth = options.hf_overrides["depth"]
        layers = served.config.depth(FULL if depth == PER_REQUEST else depth)
        if depth == PER_REQUEST:
            from shoal.vllm_plugin.route import Forerunner

            route = Forerunner.load(directory)
    return VllmEngine(served, options, layers=layers, max_queue=args.max_batch, route=route)


def _of_its_family(directory: str, served: ServedModel, args: Any) -> VllmEngine:
    """vLLM's own layers of an imported model, at the depth that its options say: written as `shoal export` does, until vLLM has
    read it."""
    depth = depth_of(directory, served.config, args.vllm)
    given = {**args.vllm, "max_model_len": need_context(directory, served.config, args.vllm)}
    given["hf_overrides"] = {key: value for key, value in given.get("hf_overrides", {}).items() if key != "depth"}
    layers = served.config.depth(depth)
    with exported(directory, depth) as place:
        options = _options(str(place), args, given, ours=False)
        return VllmEngine(served, options, layers=layers, max_queue=args.max_batch)


def _options(place: str, args: Any, given: dict[str, Any], *, ours: bool) -> Any:
    return engine_args(place, given, max_batch=args.max_batch, threads=machine.threads(args.threads), shoal=ours)
