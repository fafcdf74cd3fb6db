"""A vLLM engine for a replica, from what its serve config says."""

from __future__ import annotations

from typing import Any

from shoal import machine
from shoal.api.served import ServedModel
from shoal.api.stock import StockModel
from shoal.vllm_plugin import PER_REQUEST
from shoal.vllm_plugin.options import engine_args
from shoal.vllm_plugin.serving import VllmEngine


def start(directory: str, served: ServedModel, args: Any) -> VllmEngine:
    """The engine for `served`, whose checkpoint lies in `directory`; `args`: a serve config's. Raises ConfigError for options
    that vLLM does not have, and for an engine that does not start."""
    ours = not isinstance(served, StockModel)
    threads = machine.threads(args.threads)
    options = engine_args(directory, args.vllm, max_batch=args.max_batch, threads=threads, shoal=ours)
    route = None
    if ours and options.hf_overrides["depth"] == PER_REQUEST:
        from shoal.vllm_plugin.route import Forerunner

        route = Forerunner.load(directory)
    return VllmEngine(served, options, max_queue=args.max_batch, route=route)
