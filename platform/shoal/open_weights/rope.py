"""How fast a family turns its queries and keys: every fixed scheme of Hugging Face as one rate a pair of dims.

The rates are computed in fp32, as transformers does, and kept as they come out: a rate computed better would turn otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError

KINDS = ("default", "linear", "llama3", "dynamic")
_RATES = "rates"  # a GGUF holds llama3's as they come out


def rates(config: Mapping[str, Any], dims: int, theta: float) -> tuple[tuple[float, ...], int]:
    """Radians a token of each pair of the `dims` that are turned, and up to which position they hold (0: any), by a
    ``config.json``, whose own theta is taken where it has one. Raises CheckpointError for another scheme than `KINDS`."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = told.get("rope_type", told.get("type", "default"))
    base = float(told.get("rope_theta") or config.get("rope_theta") or theta)
    plain = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    made, most = plain, 0
    try:
        if kind == "linear":
            made = plain / float(told["factor"])
        elif kind == "llama3":
            made = _llama3(plain, told)
        elif kind == _RATES:
            made = torch.tensor(told["rates"])
        elif kind == "dynamic":  # it turns faster beyond this length, so that one request would have two tables
            most = int(told.get("original_max_position_embeddings") or config["max_position_embeddings"])
        elif kind != "default":
            raise CheckpointError("config.json: rope_type", got=kind, allowed=KINDS)
    except KeyError as error:
        raise CheckpointError(f"config.json: rope scaling of type {kind}", got=f"no {error.args[0]}") from error
    if not torch.isfinite(made).all():
        raise CheckpointError(f"config.json: rope scaling of type {kind}", got="rates that are not finite")
    return tuple(made.tolist()), most


def _llama3(plain: Tensor, told: Mapping[str, Any]) -> Tensor:
    """Slow turns are `factor` times slower, fast ones as they were, and those between go over from one to the other."""
    factor, low, high = (float(told[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(told["original_max_position_embeddings"])
    turn = 2 * math.pi / plain  # tokens that a whole turn takes
    made = torch.where(turn > length / low, plain / factor, plain)
    share = (length / turn - low) / (high - low)
    between = (turn <= length / low) & (turn >= length / high)
    return torch.where(between, (1 - share) * made / factor + share * made, made)
