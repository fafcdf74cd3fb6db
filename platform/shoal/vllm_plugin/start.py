"""A vLLM engine for a replica, from what its serve config says.

Three kinds of directory: a model of our own runs in our layers (`network`), somebody's checkpoint in vLLM's, and one that was
imported in vLLM's as well, as the checkpoint of its family that it came from, or that one of its exits is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shoal import machine
from shoal.api.served import ServedModel
from shoal.api.stock import StockModel
from shoal.config import FULL
from shoal.errors import ConfigError
from shoal.model.described import SOURCE
from shoal.open_weights.convert import export_model
from shoal.vllm_plugin import PER_REQUEST
from shoal.vllm_plugin.options import engine_args
from shoal.vllm_plugin.serving import VllmEngine


def start(directory: str, served: ServedModel, args: Any) -> VllmEngine:
    """The engine for `served`, whose checkpoint lies in `directory`; `args`: a serve config's. Raises ConfigError for options
    that vLLM does not have, and for an engine that does not start; CheckpointError for an imported model that is rounded."""
    ours = not isinstance(served, StockModel)
    if ours and (Path(directory) / SOURCE).exists():
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
    """vLLM's own layers of an imported model, at the depth that its options say: it is written as `shoal export` does, in a
    temporary folder, until vLLM has read it."""
    given = dict(args.vllm)
    named = dict(given.pop("hf_overrides", {}))
    depth = named.pop("depth", FULL)
    if depth == PER_REQUEST:
        known = ", ".join(served.config.exit_names)
        raise ConfigError("args.vllm.hf_overrides.depth", got=depth, allowed=f"{known}, of a model that was imported")
    if named:
        given["hf_overrides"] = named
    layers = served.config.depth(depth)
    with tempfile.TemporaryDirectory(prefix="shoal-vllm-") as folder:
        place = Path(folder) / served.name
        export_model(directory, place, depth=depth, check=False)
        options = _options(str(place), args, given, ours=False)
        return VllmEngine(served, options, layers=layers, max_queue=args.max_batch)


def _options(place: str, args: Any, given: dict[str, Any], *, ours: bool) -> Any:
    return engine_args(place, given, max_batch=args.max_batch, threads=machine.threads(args.threads), shoal=ours)
