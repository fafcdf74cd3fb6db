"""How fast a family turns its queries and keys: every fixed scheme of Hugging Face as one rate a pair of dims.

The rates are computed in fp32, as transformers does, and kept as they come out: a rate computed better would turn otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError, first_line
from shoal.open_weights.told import is_number

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "original_max_position_embeddings",
)  # fmt: skip
RATES = "rates"  # of a GGUF, as they come out, where no scheme is known to give them


def rates(config: Mapping[str, Any], dims: int, theta: float, context: int = 0) -> tuple[tuple[float, ...], int, float]:
    """Radians a token of each pair of the `dims` that are turned, up to which position they hold (0: any), and what is turned
    is multiplied by, by a ``config.json``, whose own theta is taken where it has one. `context`: a length in tokens that the
    model is to have; beyond the original one longrope has other rates, for all positions. Raises CheckpointError for another
    scheme than `KINDS`, and for numbers that it lacks."""
    told, kind = scheme(config)
    if any(isinstance(each, Mapping) for each in told.values()):
        got, allowed = "some for each kind of layer", "the same for all layers"
        raise CheckpointError("config.json: rope_parameters", got=got, allowed=allowed)
    base = float(told.get("rope_theta") or config.get("rope_theta") or theta)
    plain = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    made, most, scale = plain, 0, 1.0
    if told and config.get("original_max_position_embeddings"):  # of Phi-3, and it counts
        told["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    try:
        if kind == "linear":
            made = plain / float(told["factor"])
        elif kind == "llama3":
            made = _llama3(plain, told)
        elif kind == "yarn":
            made, scale = _yarn(base, dims, told, config)
        elif kind == "longrope":
            made, most, scale = _longrope(base, dims, told, config, context)
        elif kind == RATES:
            made = torch.tensor(told["rates"])
        elif kind == "dynamic":  # it turns faster beyond this length, so that one request would have two tables
            most = int(told.get("original_max_position_embeddings") or config["max_position_embeddings"])
        elif kind != "default":
            raise CheckpointError("config.json: rope_type", got=kind, allowed=KINDS)
    except KeyError as error:
        raise CheckpointError(f"config.json: rope scaling of type {kind}", got=f"no {error.args[0]}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # a length of 0, a table that is no list of numbers
        got, allowed = first_line(error), "numbers that give a rate for each pair"
        raise CheckpointError(f"config.json: rope scaling of type {kind}", got=got, allowed=allowed) from error
    if not (torch.isfinite(made) & (made > 0)).all():
        raise CheckpointError(
            f"config.json: rope scaling of type {kind}", got="rates that are not finite, or not above 0"
        )
    if len(made) != len(plain):
        got, allowed = f"{len(made)} rates", f"{len(plain)}, one for each turned pair of dims"
        raise CheckpointError(f"config.json: rope scaling of type {kind}", got=got, allowed=allowed)
    return tuple(made.tolist()), most, scale


def by_length(config: Mapping[str, Any]) -> bool:
    """Does a ``config.json`` give a model other rates by how long its texts may be?"""
    return scheme(config)[1] == "longrope"


def scheme(config: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """What it says of the scheme, and its kind. Raises CheckpointError for what is no mapping, and for what should be numbers
    and is none."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # the older counts where there are both
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: {key}", got=given, allowed="a mapping")
    told = dict(given)
    for name in _NUMBERS:
        if told.get(name) is not None and not is_number(told[name]):
            raise CheckpointError(f"config.json: {key}.{name}", got=told[name], allowed="a number")
    kind = told.get("rope_type", told.get("type", "default"))
    return told, "longrope" if kind == "su" else kind  # as older checkpoints call it


def as_llama3(factors: Tensor, plain: Mapping[str, Any], dims: int, theta: float) -> dict[str, Any] | None:
    """The rope scaling `llama3` whose slower turns the `factors` of a GGUF are, as a ``config.json`` says it; None where they
    are none of it. `plain`: a config.json without it. Files do not keep its settings; those are of every Llama 3 so far."""
    told = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told["original_max_position_embeddings"] = 8192
    before, after = (torch.tensor(rates({**plain, **more}, dims, theta)[0]) for more in ({}, {"rope_scaling": told}))
    return told if len(factors) == len(before) and torch.allclose(before / factors, after, rtol=1e-6) else None


def _stretch(told: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """How many times the original context the model's is."""
    return float(told.get("factor") or config["max_position_embeddings"] / told["original_max_position_embeddings"])


def _yarn(base: float, dims: int, told: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Pairs that turn more than `beta_fast` times in the original context stay, those below `beta_slow` turns are slower by the
    factor, and those between go over from one to the other (arXiv 2309.00071); the scale grows with its logarithm."""
    factor, length = _stretch(told, config), float(told["original_max_position_embeddings"])

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def pair(turns: float) -> float:
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(told.get("beta_fast") or 32), pair(told.get("beta_slow") or 1)
    if told.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    kept = 1 - ((torch.arange(dims // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    turns = base ** (torch.arange(0, dims, 2).float() / dims)
    made = 1.0 / (factor * turns) * (1 - kept) + 1.0 / turns * kept
    scale = told.get("attention_factor")
    if scale is None:
        both = told.get("mscale"), told.get("mscale_all_dim")
        scale = grown(both[0]) / grown(both[1]) if both[0] and both[1] else grown(1)
    return made, float(scale)


def _longrope(
    base: float, dims: int, told: Mapping[str, Any], config: Mapping[str, Any], context: int
) -> tuple[Tensor, int, float]:
    """One factor a pair, of two tables: up to the original context, and beyond it. A request that grew from one to the other
    would have keys of both, so that a model has one."""
    factor, length = _stretch(told, config), int(told["original_max_position_embeddings"])
    long = context > length
    factors = torch.tensor(told["long_factor" if long else "short_factor"], dtype=torch.float32)
    if len(factors) != dims // 2:
        return factors, 0, 1.0  # which is refused
    made = 1.0 / (factors * base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims))
    scale = told.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return made, 0 if long else length, float(scale)


def _llama3(plain: Tensor, told: Mapping[str, Any]) -> Tensor:
    """Slow turns are `factor` times slower, fast ones as they were, and those between go over from one to the other."""
    factor, low, high = (float(told[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = float(told["original_max_position_embeddings"])
    turn = 2 * math.pi / plain  # tokens that a whole turn takes
    made = torch.where(turn > length / low, plain / factor, plain)
    share = (length / turn - low) / (high - low)
    between = (turn <= length / low) & (turn >= length / high)
    return torch.where(between, (1 - share) * made / factor + share * made, made)
