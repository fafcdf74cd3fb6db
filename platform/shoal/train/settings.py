"""What may be set of a run on the command line beside the options that have a name of their own: ``--set KEY=VALUE``."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from shoal.config import TrainConfig, typed
from shoal.errors import ConfigError, did_you_mean
from shoal.train.plan import FitPlan

SETTABLE = (
    "eval_every", "eval_rows", "checkpoint_minutes", "keep", "keep_best", "replicas", "recompute", "compile", "row_tokens",
    "replay_every",
)  # fmt: skip  # fields of FitPlan that `settings` may set


def merged(named: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Those of `named` that are not None, and the `settings` of `texts`. Raises ConfigError for a key that is in both."""
    given, found = {key: value for key, value in named.items() if value is not None}, settings(texts)
    if twice := given.keys() & found.keys():
        raise ConfigError(f"--set {min(twice)} and --{min(twice).replace('_', '-')}", do="give one of them")
    return given | found


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of TrainConfig and those of FitPlan in SETTABLE, from ``KEY=VALUE`` (a value in YAML): what the plans take as
    `more`. Raises ConfigError for a key that there is not, and for a value of a wrong type."""
    hints = typing.get_type_hints(FitPlan)
    hints = typing.get_type_hints(TrainConfig) | {name: hints[name] for name in SETTABLE}
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--set", got=text, allowed="KEY=VALUE")
        if key not in hints:
            raise ConfigError(f"--set {key}", allowed=sorted(hints), do=did_you_mean(key, hints))
        found[key] = typed(hints[key], _yaml_value(value), f"--set {key}")
    return found


def _yaml_value(text: str) -> Any:
    """YAML, and numbers such as 1e-3, which YAML 1.1 reads as text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("--set", got=text, allowed="KEY=VALUE, a value in YAML") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
