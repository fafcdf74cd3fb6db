"""What the HTTP side knows of the model behind it: its name, shape, tokenizer and chat template. No weights, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.api.policy import Policy
from shoal.config import ModelConfig
from shoal.engine.events import Sampling
from shoal.errors import CheckpointError, ConfigError, RequestError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import described

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of one of several models, and of an adapter
MOST_ADAPTERS = 16  # each a copy of its matrices in every engine


@dataclass(frozen=True)
class ServedModel:
    name: str  # what requests call it
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: str = DEFAULT_TEMPLATE
    created: int = 0  # Unix seconds
    aliases: tuple[str, ...] = ()  # other names for it
    parent: str | None = None  # of an adapter: the model that it stands beside
    weights: str = ""  # the first 16 hexadecimal digits of their sha256, where that is known
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of `described.DRAWN`, where a request is silent
    adapted: Mapping[str, Any] | None = None  # of exits that an imported model was given: `described.adapted`
    policy: Policy | None = None  # what its operator adds to its answers
    shared_prefix_cache: bool = False  # by all keys

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that one token stands for at most."""
        return max(len(self.tokenizer.token_bytes(token)) for token in range(len(self.tokenizer)))

    @classmethod
    def load(cls, directory: str | Path, name: str | None = None) -> ServedModel:
        """The model in a model directory, without its weights, under `name` (default: its own). A name may be several, with
        commas between: its own, then its aliases.

        Raises CheckpointError when a file is missing, of another format, or contradicts another; ConfigError for empty names.
        """
        it = described.read(directory)
        own, *aliases = names_of(name, it.name)
        created = int((Path(directory) / described.CONFIG).stat().st_mtime)
        drawn = described.sampling(directory)
        try:
            Sampling(**{**drawn, **({"top_k": 0} if drawn.get("top_k") == -1 else {})})
        except RequestError as error:
            where = f"{Path(directory) / described.SOURCE}: generation_config.{error.message}"
            raise CheckpointError(where, do="mend it there, and import the model again") from error
        known, told = described.known_weights(directory), described.adapted(directory)
        names = tuple(aliases)
        return cls(
            own, it.config, it.tokenizer, it.chat_template, created, names, weights=known, sampling=drawn, adapted=told
        )

    def fixed_depth(self, depth: str | int) -> str | None:
        """Exit name of a depth that was asked for; None where the router decides."""
        layers = self.config.asked(depth)
        return None if layers is None else self.depth_name(layers)

    def depth_name(self, layers: int) -> str:
        """Exit name of a depth in layers; ``none`` for 0, a request that never ran."""
        return {depth: name for name, depth in self.config.exit_names.items()}.get(layers, "none")


def names_of(given: str | None, own: str) -> list[str]:
    """What requests may call a model: the names in `given`, commas between them, or its `own`. Raises ConfigError for an empty
    one."""
    names = [own] if given is None else [part.strip() for part in given.split(",")]
    if not all(names):
        raise ConfigError("name", got=given, allowed="a name, or several with commas between")
    return names
