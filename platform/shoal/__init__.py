"""Shoal: language models that choose their own depth, from raw corpus to chat.

    from shoal import Model, ModelConfig, Engine, Request, Sampling, presets

The names are loaded when first used, so ``import shoal`` costs nothing and needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal import presets as presets
    from shoal.config import ModelConfig as ModelConfig
    from shoal.engine.engine import Engine as Engine
    from shoal.engine.events import Request as Request
    from shoal.engine.events import Sampling as Sampling
    from shoal.model.model import Model as Model

__version__ = "0.2.0"
__all__ = ["Engine", "Model", "ModelConfig", "Request", "Sampling", "presets"]

_HOME = {
    "Engine": "shoal.engine.engine",
    "Model": "shoal.model.model",
    "ModelConfig": "shoal.config",
    "Request": "shoal.engine.events",
    "Sampling": "shoal.engine.events",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("shoal.presets")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
