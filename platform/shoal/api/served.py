"""What the HTTP side knows of the model behind it: its name, shape, tokenizer and chat template. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shoal import config
from shoal.config import ModelConfig
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer

FORMAT, VERSION = "shoal-model", 1


@dataclass(frozen=True)
class ServedModel:
    name: str  # what requests call it
    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: str = DEFAULT_TEMPLATE
    created: int = 0  # Unix seconds
    aliases: tuple[str, ...] = ()  # other names for it

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
        directory = Path(directory)
        card = directory / "config.json"
        if not card.is_file():
            raise CheckpointError("model directory has no config.json", got=str(directory), do="give a model directory")
        values = config.read_file(card)
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            got = f"{values.get('format')} version {values.get('version')}"
            raise CheckpointError(f"{card}: format", got=got, allowed=f"{FORMAT} version {VERSION}")
        try:
            model = config.load(ModelConfig, values["model"], "model")
        except (ConfigError, KeyError) as error:
            raise CheckpointError(f"{card} cannot be used", got=str(error)) from error
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        if len(tokenizer) > model.vocab:
            raise CheckpointError(
                f"{directory}: tokens in tokenizer.json", got=len(tokenizer), allowed=f"at most vocab ({model.vocab})"
            )
        try:
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{directory}: chat_template.jinja", got=str(error)) from error
        own, *aliases = names_of(name, str(values["name"]))
        return cls(own, model, tokenizer, template, int(card.stat().st_mtime), tuple(aliases))

    def fixed_depth(self, depth: str | int) -> str | None:
        """Exit name of a depth that was asked for; None where the router decides."""
        return None if depth == "auto" else self.depth_name(self.config.depth(depth))

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
