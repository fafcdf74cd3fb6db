"""Named complete configurations, smallest first. `shoal show-config NAME` prints one.

More tokens beat more parameters at minutes of CPU, so `tiny` has about 1M parameters on purpose.
"""

from __future__ import annotations

from typing import Any

from shoal.config import ModelConfig, Preset, TrainConfig
from shoal.errors import ConfigError, did_you_mean

# name: (layers, width, heads, kv_heads, head_dim, ffn, train_length, window, block, top_k, page, vocab, parameters said)
_SHAPES: dict[str, tuple[tuple[int, ...], float]] = {
    "test": ((4, 48, 3, 3, 16, 88, 96, 16, 2, 4, 8, 300), 0.1e6),
    "tiny": ((8, 96, 4, 2, 24, 256, 256, 32, 4, 16, 16, 1024), 1e6),
    "mini": ((8, 224, 8, 2, 28, 608, 512, 64, 8, 16, 16, 2048), 5e6),
    "small": ((12, 448, 8, 2, 56, 1216, 1024, 128, 16, 16, 16, 8192), 30e6),
    "base": ((12, 768, 12, 4, 64, 2816, 2048, 256, 16, 16, 16, 32768), 125e6),
    "350m": ((24, 1024, 16, 4, 64, 3328, 4096, 512, 16, 32, 32, 32768), 350e6),
    "1b": ((24, 2048, 32, 2, 64, 6400, 8192, 512, 32, 32, 64, 65536), 1.3e9),
    "7b": ((32, 4096, 32, 2, 128, 14336, 16384, 1024, 64, 16, 64, 65536), 7e9),
    "article": ((8, 96, 4, 4, 24, 256, 256, 64, 1, 16, 16, 1024), 1e6),
}
_FIELDS = (
    "layers", "width", "heads", "kv_heads", "head_dim", "ffn", "train_length", "window", "block", "top_k", "page", "vocab",
)  # fmt: skip

_MODEL: dict[str, dict[str, Any]] = {
    "test": {"patch": 4, "image_size": 12},
    "article": {"sinks": 0, "mix_mode": "fixed"},  # 0.7 local + 0.3 global top-16 tokens, the formula as published
    "base": {"patch": 16, "image_size": 224},
    "350m": {"patch": 16, "image_size": 224},
    "1b": {"patch": 14, "image_size": 336},
    "7b": {"patch": 14, "image_size": 448, "rope_theta": 500_000.0},
}
_DEEP = {"exit_weights": (0.15, 0.25, 0.4, 1.0)}  # four exits from 24 layers on
_TRAIN: dict[str, dict[str, Any]] = {
    "test": {"batch_tokens": 768, "learning_rate": 1e-2},
    "tiny": {"batch_tokens": 4096},
    "mini": {"batch_tokens": 16384, "learning_rate": 2e-3, "accumulate": 4},
    "small": {"batch_tokens": 65536, "learning_rate": 1.2e-3},
    "base": {"batch_tokens": 524288, "learning_rate": 6e-4, "accumulate": 8},
    "350m": {"batch_tokens": 524288, "learning_rate": 4e-4, "accumulate": 8, **_DEEP},
    "1b": {"batch_tokens": 1048576, "learning_rate": 3e-4, "accumulate": 8, **_DEEP},
    "7b": {"batch_tokens": 4194304, "learning_rate": 2e-4, "accumulate": 16, **_DEEP},
}

NAMES = tuple(_SHAPES)


def get(name: str) -> Preset:
    """The preset called `name`. Raises ConfigError with the nearest known name.

    Examples:
        >>> from shoal import presets
        >>> presets.NAMES[:4]
        ('test', 'tiny', 'mini', 'small')
        >>> presets.get("mini").model.layers
        8
    """
    if name not in _SHAPES:
        raise ConfigError("preset", got=name, allowed=NAMES, do=did_you_mean(name, NAMES))
    shape = dict(zip(_FIELDS, _SHAPES[name][0], strict=True))
    model = ModelConfig(**{**shape, **_MODEL.get(name, {})})
    return Preset(name, model, TrainConfig(**_TRAIN.get(name, {})))


def parameters_said(name: str) -> float:
    """The parameter count that the table of presets states; a test holds the built model within 10 % of it."""
    return _SHAPES[name][1]
